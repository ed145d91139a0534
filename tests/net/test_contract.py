"""What every transport promises, checked over the network and over its twin."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import pytest

from koinon.errors import DeadlinePassed, FrameTooLarge, PeerError, PeerUnreachable, ProtocolMismatch, Refused
from koinon.net.transport import ACCEPTED, DONE, Busy, Drop, Hello, NodeAddr
from koinon.units import Bytes, PeerId, Seconds
from tests.net.support import CTL, WORK, Ask, Net, Stray, Tell, play, service

SOON = Seconds(0.3)


def contract(scene: Callable[[Net], Awaitable[None]]) -> Any:
    """A test of both carriers."""

    @pytest.mark.parametrize("carrier", ["memory", "iroh"])
    def test(carrier: str) -> None:
        play(carrier, scene)

    test.__name__, test.__doc__ = scene.__name__, scene.__doc__
    return test


@contract
async def test_a_request_brings_back_what_the_handler_gave(net: Net) -> None:
    a, b = await net.node("a"), await net.node("b")
    random = Random(0)
    for nbytes in (0, 1, 1000, 64 * 1024, 64 * 1024 + 1, 512 * 1024, 512 * 1024 + 1, 3_000_001):
        body = random.randbytes(nbytes)
        reply = await a.request(b.me, WORK, Ask(f"{nbytes}", nbytes), body)
        assert reply.header == Tell(f"{nbytes}", nbytes)
        assert reply.body == body


@contract
async def test_concurrent_requests_get_their_own_replies(net: Net) -> None:
    a, b = await net.node("a"), await net.node("b")
    words = [f"{n}" for n in range(200)]
    replies = await asyncio.gather(*(a.request(b.me, WORK, Ask(word)) for word in words))
    assert [reply.header.word for reply in replies] == words


@contract
async def test_a_handler_owns_the_body_it_gets(net: Net) -> None:
    async def spoil(_peer: PeerId, message: Any, body: bytearray) -> Any:
        body[:] = bytes(len(body))
        return Tell(message.word)

    a = await net.node("a", [service(spoil)])
    b = await net.node("b", [service(spoil)])
    mine = bytearray(b"mine")
    for peer in (a.me, b.me):
        await a.request(peer, WORK, Ask("x", 4), mine)
    assert mine == b"mine"


@contract
async def test_a_push_is_answered_by_a_verdict_before_its_body_is_sent(net: Net) -> None:
    handled: list[str] = []

    async def handle(_peer: PeerId, message: Any, _body: bytearray) -> None:
        handled.append(message.word)

    verdicts = {"take": 1 << 26, "busy": Busy(70), "drop": Drop("not my stage"), "done": DONE}
    a = await net.node("a")
    b = await net.node("b", [service(handle, body_limit=lambda _peer, header: verdicts[header.word])])
    large = bytes(2_000_000)
    for word, verdict in (("busy", Busy(70)), ("drop", Drop("not my stage")), ("done", DONE)):
        assert await a.push(b.me, WORK, Ask(word, len(large)), large) == verdict
        assert await a.push(b.me, WORK, Ask(word, 5), b"small") == verdict
    assert a.links()[b.me].sent[WORK] < 10_000
    assert await a.push(b.me, WORK, Ask("take", len(large)), large) == ACCEPTED
    assert a.links()[b.me].sent[WORK] + sum(a.links()[b.me].sent.values()) > len(large)
    assert handled == ["take"]


@contract
async def test_a_verdict_that_is_no_acceptance_refuses_a_request(net: Net) -> None:
    verdicts = {"busy": Busy(70), "drop": Drop("not my stage")}
    a = await net.node("a")
    b = await net.node("b", [service(body_limit=lambda _peer, header: verdicts[header.word])])
    with pytest.raises(Refused, match="busy; ask again in 70 ms"):
        await a.request(b.me, WORK, Ask("busy"))
    with pytest.raises(Refused, match="not my stage"):
        await a.request(b.me, WORK, Ask("drop"))


@contract
async def test_a_body_over_the_limit_is_refused_unread_and_its_room_is_freed(net: Net) -> None:
    freed: list[str] = []
    a = await net.node("a")
    b = await net.node(
        "b",
        [service(body_limit=lambda _peer, _header: 1000, abandoned=lambda _peer, header: freed.append(header.word))],
    )
    for nbytes in (1001, 5_000_000):
        with pytest.raises(Refused, match="1000 are allowed"):
            await a.request(b.me, WORK, Ask("x", nbytes), bytes(nbytes))
    assert freed == ["x", "x"]
    assert (await a.request(b.me, WORK, Ask("y", 1000), bytes(1000))).header == Tell("y", 1000)


@contract
async def test_a_reply_over_the_askers_limit_is_not_taken(net: Net) -> None:
    a = await net.node("a", [service(reply_limit=Bytes(1000))])
    b = await net.node("b")
    with pytest.raises(FrameTooLarge):
        await a.request(b.me, WORK, Ask("x", 2000), bytes(2000))


@contract
async def test_a_refusal_reaches_the_caller_word_for_word_and_a_defect_does_not(net: Net) -> None:
    async def refuse(_peer: PeerId, message: Any, _body: bytearray) -> None:
        raise Refused("no seat is free") if message.word == "refuse" else ValueError("secret detail")

    a, b = await net.node("a"), await net.node("b", [service(refuse)])
    with pytest.raises(Refused, match=r"^no seat is free$"):
        await a.request(b.me, WORK, Ask("refuse"))
    logger, records = logging.getLogger("koinon.net"), []
    logger.addFilter(keep := lambda record: records.append(record) or False)
    try:
        with pytest.raises(Refused) as caught:
            await a.request(b.me, WORK, Ask("defect"))
    finally:
        logger.removeFilter(keep)
    assert "secret" not in str(caught.value)
    [record] = [r for r in records if r.levelno == logging.ERROR]
    assert record.exc_info is not None
    assert "secret detail" in str(record.exc_info[1])


@contract
async def test_a_reply_of_a_type_that_was_not_agreed_is_a_defect_of_the_handler(net: Net) -> None:
    async def stray(_peer: PeerId, _message: Any, _body: bytearray) -> Any:
        return Stray()

    a, b = await net.node("a"), await net.node("b", [service(stray)])
    logging.getLogger("koinon.net").addFilter(quiet := lambda _record: False)
    try:
        with pytest.raises(Refused):
            await a.request(b.me, WORK, Ask("x"))
    finally:
        logging.getLogger("koinon.net").removeFilter(quiet)


@contract
async def test_a_caller_can_only_say_what_was_agreed(net: Net) -> None:
    a, b = await net.node("a"), await net.node("b")
    with pytest.raises(TypeError):
        await a.request(b.me, WORK, Stray())
    with pytest.raises(ValueError, match="says 5 bytes, the body has 3"):
        await a.request(b.me, WORK, Ask("x", 5), b"abc")
    with pytest.raises(ValueError, match="not among the services"):
        await a.request(b.me, "test/other/1", Ask("x"))


@contract
async def test_a_node_can_ask_itself(net: Net) -> None:
    a = await net.node("a", [service(), service(alpn=CTL, body_limit=lambda _peer, _header: Busy(9))])
    body = bytearray(b"self")
    reply = await a.request(a.me, WORK, Ask("me", 4), body)
    assert (reply.header, reply.body) == (Tell("me", 4), body)
    assert reply.body is not body
    assert await a.push(a.me, CTL, Ask("me"), b"") == Busy(9)


@contract
async def test_a_peer_without_a_known_address_is_unreachable(net: Net) -> None:
    a, b = await net.node("a"), await net.node("b", known=False)
    with pytest.raises(PeerUnreachable, match="no address is known"):
        await a.request(b.me, WORK, Ask("x"))


@contract
async def test_a_node_that_cannot_be_dialled_is_asked_over_the_connection_it_made(net: Net) -> None:
    a, b = await net.node("a"), await net.node("b", known=False)
    a.learn(b.addr)
    await a.request(b.me, WORK, Ask("hello"))
    assert (await b.request(a.me, WORK, Ask("back"))).header == Tell("back")


@contract
async def test_when_both_dial_at_once_both_are_served(net: Net) -> None:
    a, b = await net.node("a"), await net.node("b")
    replies = await asyncio.gather(a.request(b.me, WORK, Ask("ab")), b.request(a.me, WORK, Ask("ba")))
    assert [reply.header.word for reply in replies] == ["ab", "ba"]
    assert (await a.request(b.me, WORK, Ask("again"))).header == Tell("again")


@contract
async def test_a_service_without_a_handler_asks_but_does_not_answer(net: Net) -> None:
    a, b = await net.node("a"), await net.node("b", [service(None), service(alpn=CTL)])
    with pytest.raises(Refused, match="does not serve"):
        await a.request(b.me, WORK, Ask("x"))
    assert (await b.request(a.me, WORK, Ask("y"))).header == Tell("y")
    with pytest.raises(Refused, match="does not serve"):  # nor over the connection that it dialled itself
        await a.request(b.me, WORK, Ask("x"))


@contract
async def test_a_passed_deadline_is_an_error_and_the_next_request_goes_through(net: Net) -> None:
    stuck = asyncio.Event()

    async def hang(_peer: PeerId, message: Any, _body: bytearray) -> Any:
        if message.word == "hang":
            await stuck.wait()
        return Tell(message.word)

    a, b = await net.node("a"), await net.node("b", [service(hang)])
    await a.request(b.me, WORK, Ask("first"))
    with pytest.raises(DeadlinePassed, match="did not answer Ask"):
        await a.request(b.me, WORK, Ask("hang"), deadline=SOON)
    assert (await a.request(b.me, WORK, Ask("next"))).header == Tell("next")
    stuck.set()


@contract
async def test_a_caller_may_give_up_and_ask_again(net: Net) -> None:
    begun = asyncio.Event()

    async def hang(_peer: PeerId, message: Any, _body: bytearray) -> Any:
        begun.set()
        await asyncio.sleep(3600 if message.word == "hang" else 0)
        return Tell(message.word)

    a, b = await net.node("a"), await net.node("b", [service(hang)])
    call = asyncio.ensure_future(a.request(b.me, WORK, Ask("hang")))
    await begun.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert (await a.request(b.me, WORK, Ask("next"))).header == Tell("next")


@contract
async def test_versions_without_a_common_one_are_told_what_to_do(net: Net) -> None:
    a = await net.node("a", hello=Hello(protocol=(3, 4)))
    b = await net.node("b", hello=Hello(protocol=(5, 5)))
    with pytest.raises(ProtocolMismatch, match="you speak protocol 3-4, this run needs 5; upgrade koinon"):
        await a.request(b.me, WORK, Ask("x"))
    with pytest.raises(ProtocolMismatch, match="you speak protocol 5, this run needs 3-4; use an older koinon"):
        await b.request(a.me, WORK, Ask("x"))


@contract
async def test_a_gate_keeps_a_peer_out_on_either_side(net: Net) -> None:
    def members_only(_peer: PeerId, _alpn: str, hello: Hello) -> None:
        if hello.run != "ours":
            raise Refused("this is a private circle")

    a = await net.node("a", hello=Hello(run="theirs"))
    b = await net.node("b", gate=members_only)
    with pytest.raises(Refused, match="private circle"):
        await a.request(b.me, WORK, Ask("x"))
    with pytest.raises(Refused, match="private circle"):
        await b.request(a.me, WORK, Ask("x"))
    a.introduce(Hello(run="ours"))
    assert (await a.request(b.me, WORK, Ask("x"))).header == Tell("x")


@contract
async def test_pending_calls_fail_at_once_when_the_peer_closes_or_hangs_up(net: Net) -> None:
    begun: asyncio.Queue[None] = asyncio.Queue()

    async def hang(_peer: PeerId, _message: Any, _body: bytearray) -> None:
        begun.put_nowait(None)
        await asyncio.sleep(3600)

    a, b, c = await net.node("a"), await net.node("b", [service(hang)]), await net.node("c", [service(hang)])
    calls = [asyncio.ensure_future(a.request(p.me, WORK, Ask("x"), deadline=Seconds(3600.0))) for p in (b, c)]
    await begun.get()
    await begun.get()
    await b.close()
    with pytest.raises(PeerUnreachable, match="closed"):
        await calls[0]
    c.hang_up(a.me, "your pass was revoked")
    with pytest.raises(PeerError, match="your pass was revoked"):
        await calls[1]


@contract
async def test_a_peer_that_was_restarted_elsewhere_is_found_again(net: Net) -> None:
    a, b = await net.node("a"), await net.node("b")
    await a.request(b.me, WORK, Ask("first"))
    await b.close()
    again = await net.node("b")
    assert again.me == b.me
    assert (await a.request(b.me, WORK, Ask("second"))).header == Tell("second")
    assert (await again.request(a.me, WORK, Ask("third"))).header == Tell("third")


@contract
async def test_a_dial_to_an_old_address_is_given_up_when_the_new_one_is_learnt(net: Net) -> None:
    a, b = await net.node("a"), await net.node("b", known=False)
    a.learn(NodeAddr(b.me, ("127.0.0.1:9",)))
    calls = [asyncio.ensure_future(a.request(b.me, WORK, Ask(f"{n}"), deadline=Seconds(4.0))) for n in range(3)]
    await asyncio.sleep(0.05)
    a.learn(b.addr)
    replies = await asyncio.gather(*calls)  # the dial alone would have taken five seconds
    assert [reply.header.word for reply in replies] == ["0", "1", "2"]


@contract
async def test_both_ends_count_the_same_bytes(net: Net) -> None:
    a, b = await net.node("a"), await net.node("b")
    for nbytes in (5000, 300_000, 2_000_000, 10):
        await a.request(b.me, WORK, Ask("x", nbytes), bytes(nbytes))
    here, there = a.links()[b.me], b.links()[a.me]
    assert here.sent == there.received
    assert here.received == there.sent
    assert 2_305_010 < sum(here.sent.values()) < 2_306_500
    assert here.connections >= 1


@contract
async def test_addresses_that_lead_nowhere_are_named(net: Net) -> None:
    a = await net.node("a")
    b = await net.node("b", known=False)
    a.learn(NodeAddr(b.me, ("127.0.0.1:9",)))
    with pytest.raises(PeerUnreachable, match=r"127\.0\.0\.1:9"):
        await a.request(b.me, WORK, Ask("x"))
    a.learn(b.addr)
    assert (await a.request(b.me, WORK, Ask("x"))).header == Tell("x")
