"""What strangers get at the reception, over the in-memory twin: answers, measurements, a look back, and limits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koinon.errors import PeerError, Refused
from koinon.net.allowance import Allowance, Rate
from koinon.net.clock import run_virtual
from koinon.net.hub import Faults, Hub
from koinon.net.identity import NodeKey
from koinon.net.memory import MemoryTransport
from koinon.net.passes import verify_record
from koinon.net.transport import NodeAddr
from koinon.nodes import join_messages as j
from koinon.nodes import messages as m
from koinon.nodes.introducer import Introducer
from koinon.nodes.reception import AT_ONCE, KNOCKS, REACHES, Reception
from koinon.nodes.switchboard import Switchboard
from koinon.run import events as ev
from koinon.run.events import Member
from koinon.run.state import fold
from koinon.units import Bytes, PeerId, Seconds
from tests.nodes.leagues import spec_of

NOW = 1_900_000_000.0
SPEC = spec_of(1, league={"max_workers": 5})


def key(name: str) -> NodeKey:
    return NodeKey(sha256(name.encode()).digest())


class Hall:
    """A reception, and strangers who talk to it."""

    def __init__(self) -> None:
        self.hub, self.count = Hub(0, Faults(delay=Seconds(0.01))), 0

    async def __aenter__(self) -> Hall:
        seated = ev.Seated(Member(0), key("guest").peer_id, "somebody", 0, 0, ())
        state = fold([ev.RunOpened(SPEC.run_id, SPEC.to_toml(), "c", "c", 2, 4, ""), seated])
        board = Switchboard(Bytes.mib(4))
        self.reception = Reception(SPEC, lambda: state, board, key("control"), self.dialler, now=lambda: NOW)
        self.control = MemoryTransport(self.hub, key("control"))
        self.address = await self.control.start(board.services())
        self.reception.open_at(self.address.addresses)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.control.close()

    def dialler(self) -> MemoryTransport:
        self.count += 1
        return MemoryTransport(self.hub, key(f"dialler {self.count}"))

    async def guest(self, name: str = "guest", *, waves: bool = True) -> Guest:
        node, board = MemoryTransport(self.hub, key(name)), Switchboard(Bytes.mib(4))
        if waves:
            Introducer(board, None)
        mine = await node.start(board.services())
        node.learn(self.address)
        return Guest(node, self.address, mine)


class Guest:
    def __init__(self, node: MemoryTransport, host: NodeAddr, mine: NodeAddr) -> None:
        self.node, self.host, self.mine = node, host, mine

    async def ask(self, message: m.Message, body: bytes = b"") -> tuple[m.Message, bytearray]:
        reply = await self.node.request(self.host.peer, m.JOIN, message, body, deadline=Seconds(20.0))
        return reply.header, reply.body  # type: ignore[return-value]


def in_hall(act: Callable[[Hall], Awaitable[None]]) -> None:
    async def go() -> None:
        async with asyncio.timeout(600.0), Hall() as hall:
            await act(hall)

    run_virtual(go())


def test_a_knock_tells_what_the_run_is_and_whether_there_is_room() -> None:
    async def act(hall: Hall) -> None:
        opened, _ = await (await hall.guest()).ask(j.Knock())
        assert (opened.run, opened.spec, opened.phase) == (SPEC.run_id, SPEC.to_toml(), "training")
        assert (opened.taken, opened.places, opened.now, opened.has_seat) == (1, 5, NOW, True)
        verify_record(opened.whereabouts, run=SPEC.run_id, now=NOW)
        assert opened.whereabouts.addresses == hall.address.addresses
        stranger, _ = await (await hall.guest("stranger")).ask(j.Knock())
        assert not stranger.has_seat

    in_hall(act)


def test_a_probe_is_swallowed_and_answered_with_as_many_bytes_as_asked_for() -> None:
    async def act(hall: Hall) -> None:
        guest = await hall.guest()
        for up, back in ((0, 0), (1, 10), (300_000, 0), (0, 300_000), (j.PROBE_LIMIT, j.PROBE_LIMIT)):
            probed, body = await guest.ask(j.Probe(back, up), bytes(up))
            assert (probed, len(body)) == (j.Probed(back), back)
        assert hall.reception._bodies == set()

    in_hall(act)


@pytest.mark.parametrize("probe", [j.Probe(0, j.PROBE_LIMIT + 1), j.Probe(j.PROBE_LIMIT + 1, 0)])
def test_a_probe_beyond_the_limit_is_refused_at_its_header(probe: j.Probe) -> None:
    async def act(hall: Hall) -> None:
        with pytest.raises(Refused, match=r"1\.0 MiB at most"):
            await (await hall.guest()).ask(probe, bytes(probe.nbytes))

    in_hall(act)


def test_probed_bytes_are_rationed_per_key_and_come_back_with_time() -> None:
    async def act(hall: Hall) -> None:
        guest, other = await hall.guest(), await hall.guest("other")
        for _ in range(32):
            await guest.ask(j.Probe(j.PROBE_LIMIT))
        with pytest.raises(Refused, match="ask again in"):
            await guest.ask(j.Probe(j.PROBE_LIMIT))
        await other.ask(j.Probe(j.PROBE_LIMIT))
        await asyncio.sleep(5.0)
        await guest.ask(j.Probe(j.PROBE_LIMIT))

    in_hall(act)


def test_a_body_that_never_comes_gives_its_room_back() -> None:
    async def act(hall: Hall) -> None:
        lost = [await hall.guest(f"lost {n}") for n in range(AT_ONCE)]

        async def vanish(guest: Guest) -> None:
            asking = asyncio.create_task(guest.ask(j.Probe(0, 500_000), bytes(500_000)))
            await asyncio.sleep(0.035)  # the word to send the body is under way
            guest.node.kill()
            with pytest.raises(PeerError):
                await asking

        await asyncio.gather(*(vanish(guest) for guest in lost))
        guest = await hall.guest()
        with pytest.raises(Refused, match="in a moment"):
            await guest.ask(j.Probe(0, 0))
        await asyncio.sleep(60.0)
        await guest.ask(j.Probe(0, 0))

    in_hall(act)


def test_who_listens_is_seen_and_who_does_not_is_told_what_each_address_answered() -> None:
    async def act(hall: Hall) -> None:
        guest = await hall.guest()
        reached, _ = await guest.ask(j.Reach((*guest.mine.addresses, "memory:none", *hall.address.addresses)))
        assert reached.answers[0] == ""
        assert reached.answers[1] == reached.answers[2] == "no answer"
        assert not any(node.me == key("dialler 1").peer_id for node in hall.hub.members.values()), "it is gone again"

    in_hall(act)


def test_who_is_cut_off_from_outside_is_not_seen_though_it_can_ask() -> None:
    async def act(hall: Hall) -> None:
        guest = await hall.guest()
        hall.hub.block(key("dialler 1").peer_id, key("guest").peer_id)
        reached, _ = await guest.ask(j.Reach(guest.mine.addresses))
        assert reached.answers == ("no answer",)

    in_hall(act)


@pytest.mark.parametrize("addresses", [(), ("a:1", "b:1", "c:1", "d:1", "e:1")])
def test_nobody_has_long_lists_of_addresses_dialled(addresses: tuple[str, ...]) -> None:
    async def act(hall: Hall) -> None:
        with pytest.raises(Refused, match="1 to 4 addresses"):
            await (await hall.guest()).ask(j.Reach(addresses))
        assert hall.count == 0

    in_hall(act)


@pytest.mark.parametrize(
    ("message", "times"), [(j.Knock(), KNOCKS[0].burst), (j.Reach(("memory:0",)), REACHES[0].burst)]
)
def test_asking_again_and_again_is_refused_with_the_time_to_wait(message: m.Message, times: float) -> None:
    async def act(hall: Hall) -> None:
        guest = await hall.guest()

        async def insist() -> None:
            for _ in range(2 * int(times)):
                await guest.ask(message)

        with pytest.raises(Refused, match="ask again in"):
            await insist()
        await asyncio.sleep(30.0)
        await guest.ask(message)

    in_hall(act)


def test_a_member_tells_where_the_coordinator_is_with_a_record_that_it_cannot_forge() -> None:
    async def act(hall: Hall) -> None:
        opened, _ = await (await hall.guest()).ask(j.Knock())
        member, board = MemoryTransport(hall.hub, key("member")), Switchboard(Bytes.mib(1))
        Introducer(board, opened.whereabouts)
        where = await member.start(board.services())
        guest = await hall.guest("late")
        guest.node.learn(where)
        known = (await guest.node.request(member.me, m.JOIN, j.Whereabouts(SPEC.run_id))).header
        assert known == j.Known(opened.whereabouts)
        with pytest.raises(Refused, match="does not know run"):
            await guest.node.request(member.me, m.JOIN, j.Whereabouts("00" * 32))

    in_hall(act)


def test_a_worker_does_not_answer_knocks() -> None:
    async def act(hall: Hall) -> None:
        guest, other = await hall.guest(), await hall.guest("other")
        guest.node.learn(other.mine)
        with pytest.raises(Refused, match="does not answer Knock"):
            await guest.node.request(other.mine.peer, m.JOIN, j.Knock())

    in_hall(act)


asked = st.lists(st.tuples(st.integers(0, 20), st.floats(0, 5), st.floats(0, 10)), max_size=60)


@given(asked)
def test_no_crowd_and_no_single_key_gets_more_than_its_rate(script: list[tuple[int, float, float]]) -> None:
    each, together = Rate(10, 1.0), Rate(20, 2.0)
    allowance, now, given_to = Allowance(each, together, remembered=100), 0.0, dict[int, float]()
    for who, pause, amount in script:
        now += pause
        if allowance.take(PeerId(f"{who}"), amount, now).value == 0.0:
            given_to[who] = given_to.get(who, 0.0) + amount
    assert all(total <= each.burst + each.per_second * now + 1e-6 for total in given_to.values())
    assert sum(given_to.values()) <= together.burst + together.per_second * now + 1e-6


@given(asked)
def test_whoever_waits_as_long_as_it_was_told_is_served(script: list[tuple[int, float, float]]) -> None:
    allowance, now = Allowance(Rate(10, 1.0), Rate(20, 2.0)), 0.0
    for who, pause, amount in script:
        now += pause
        wait = allowance.take(PeerId(f"{who}"), amount, now).value
        now += wait
        if wait:
            assert allowance.take(PeerId(f"{who}"), amount, now + 1e-6).value == 0.0


def test_a_thousand_keys_take_no_more_memory_than_are_remembered() -> None:
    allowance = Allowance(Rate(1, 1), Rate(1e9, 1), remembered=50)
    for who in range(1000):
        allowance.take(PeerId(f"{who}"), 1, 0.0)
    assert len(allowance) == 50
