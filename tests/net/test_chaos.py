"""The twin under faults: every call ends by its deadline, with the right answer or a PeerError, and history repeats."""

from __future__ import annotations

import asyncio
from collections import Counter
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from koinon.errors import DeadlinePassed, PeerError, PeerUnreachable
from koinon.net.hub import Fate, Faults
from koinon.net.transport import Busy
from koinon.units import BitsPerSecond, PeerId, Seconds
from tests.net.support import WORK, Ask, Net, Tell, play, service

LIMIT = Seconds(4.0)


def storm(faults: Faults, seed: int, calls: int = 60) -> tuple[Counter[str], Counter[str], list[Fate]]:
    """Requests of two nodes to a third; outcomes, how often each was handled, and the hub's history."""
    outcomes: Counter[str] = Counter()
    handled: Counter[str] = Counter()
    history: list[Fate] = []

    async def handle(_peer: PeerId, message: Any, body: bytearray) -> Any:
        handled[message.word] += 1
        return Tell(message.word, len(body)), body

    async def call(node: Any, peer: PeerId, word: str, body: bytes) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            reply = await node.request(peer, WORK, Ask(word, len(body)), body, deadline=LIMIT)
        except PeerError as error:
            outcomes[type(error).__name__] += 1
        else:
            assert (reply.header, reply.body) == (Tell(word, len(body)), body)
            outcomes["right"] += 1
        assert loop.time() - started <= LIMIT.value + 1e-9

    async def scene(net: Net) -> None:
        a, b, c = [await net.node(name, [service(handle)]) for name in "abc"]
        random = Random(seed)
        sizes = [random.choice((0, 10, 5000, 70_000, 600_000)) for _ in range(calls)]
        for first in range(0, calls, 10):
            await asyncio.gather(
                *(
                    call((a, b)[n % 2], c.me, f"{n}", Random(n).randbytes(sizes[n]))
                    for n in range(first, min(first + 10, calls))
                )
            )
        history.extend(net.hub.history)

    play("memory", scene, faults=faults, seed=seed)
    return outcomes, handled, history


PROBABILITY = st.sampled_from([0.0, 0.1, 0.4])
FAULTS = st.builds(
    Faults,
    delay=st.sampled_from([Seconds(0.0), Seconds(0.05)]),
    jitter=st.sampled_from([Seconds(0.0), Seconds(0.3)]),
    loss=PROBABILITY,
    duplicate=PROBABILITY,
    late=PROBABILITY,
    corrupt=PROBABILITY,
)


@settings(max_examples=40)
@given(FAULTS, st.integers(0, 1000))
def test_every_call_ends_with_the_right_answer_or_a_peer_error(faults: Faults, seed: int) -> None:
    outcomes, handled, _ = storm(faults, seed, calls=30)
    assert outcomes.total() == 30
    if not (faults.loss or faults.corrupt):
        assert outcomes["right"] == 30
    assert set(handled) <= {f"{n}" for n in range(30)}


def test_one_seed_is_one_history() -> None:
    faults = Faults(jitter=Seconds(0.2), loss=0.2, duplicate=0.2, late=0.2, corrupt=0.2)
    assert storm(faults, 5) == storm(faults, 5)
    assert storm(faults, 5)[2] != storm(faults, 6)[2]


def test_loss_duplication_and_corruption_happen() -> None:
    outcomes, handled, history = storm(Faults(loss=0.2, duplicate=0.3, corrupt=0.2), 1, calls=100)
    assert outcomes["right"] > 20
    assert outcomes["DeadlinePassed"] > 5
    assert outcomes["FrameMalformed"] + outcomes["FrameTooLarge"] + outcomes["Refused"] > 5
    assert max(handled.values()) > 1, "a duplicated request is handled twice: at least once, not exactly once"
    assert any(fate.flipped for fate in history)


def test_letters_overtake_each_other() -> None:
    async def scene(net: Net) -> None:
        order: list[str] = []

        async def note(_peer: PeerId, message: Any, _body: bytearray) -> None:
            order.append(message.word)

        a, b = await net.node("a", [service(note)]), await net.node("b", [service(note)])
        await a.push(b.me, WORK, Ask("first"), b"")
        order.clear()
        await asyncio.gather(*(a.push(b.me, WORK, Ask(f"{n:02}"), b"") for n in range(40)))
        assert len(order) == 40
        assert order != sorted(order)

    play("memory", scene, faults=Faults(late=0.3, jitter=Seconds(0.01)))


def test_a_partition_stops_calls_and_healing_lets_them_through() -> None:
    async def scene(net: Net) -> None:
        a, b = await net.node("a"), await net.node("b")
        await a.request(b.me, WORK, Ask("before"))
        net.hub.partition([a.me], [b.me])
        with pytest.raises(DeadlinePassed):
            await a.request(b.me, WORK, Ask("cut"))
        with pytest.raises(PeerUnreachable, match="no answer"):
            await a.request(b.me, WORK, Ask("cut, and not dialled"))
        net.hub.heal()
        assert (await a.request(b.me, WORK, Ask("after"))).header == Tell("after")

    play("memory", scene)


def test_a_one_way_cut_loses_the_answer_not_the_request() -> None:
    async def scene(net: Net) -> None:
        handled: list[str] = []

        async def handle(_peer: PeerId, message: Any, _body: bytearray) -> None:
            handled.append(message.word)

        a, b = await net.node("a"), await net.node("b", [service(handle)])
        await a.push(b.me, WORK, Ask("before"), b"")
        net.hub.block(b.me, a.me)
        with pytest.raises(DeadlinePassed):
            await a.push(b.me, WORK, Ask("heard"), b"")
        assert handled == ["before", "heard"]

    play("memory", scene)


def test_room_that_was_reserved_is_freed_when_the_body_does_not_come() -> None:
    async def scene(net: Net) -> None:
        freed: list[str] = []
        a = await net.node("a")
        b = await net.node("b", [service(abandoned=lambda _peer, header: freed.append(header.word))])
        await a.request(b.me, WORK, Ask("warm"))
        net.hub.block(b.me, a.me)
        with pytest.raises(DeadlinePassed):
            await a.push(b.me, WORK, Ask("large", 1 << 20), bytes(1 << 20))
        await asyncio.sleep(60)
        assert freed == ["large"]

    play("memory", scene)


def test_a_killed_peer_is_missed_by_deadline_then_found_when_it_is_back() -> None:
    async def scene(net: Net) -> None:
        a, b = await net.node("a"), await net.node("b")
        await a.request(b.me, WORK, Ask("before"))
        b.kill()
        started = asyncio.get_running_loop().time()
        with pytest.raises(DeadlinePassed):
            await a.request(b.me, WORK, Ask("dead"))
        assert asyncio.get_running_loop().time() - started < 3
        await net.node("b")
        assert (await a.request(b.me, WORK, Ask("back"))).header == Tell("back")

    play("memory", scene)


def test_a_restart_that_nobody_announced_ends_calls_to_the_former_self() -> None:
    async def scene(net: Net) -> None:
        a, b = await net.node("a"), await net.node("b")
        await a.request(b.me, WORK, Ask("before"))
        net.hub.block(a.me, b.me)  # the call below hangs in the former connection
        call = asyncio.ensure_future(a.request(b.me, WORK, Ask("lost"), deadline=Seconds(3600.0)))
        await asyncio.sleep(1)
        net.hub.heal()
        b.kill()
        again = await net.node("b")
        await again.request(a.me, WORK, Ask("here I am"))
        with pytest.raises(PeerUnreachable, match="restarted"):
            await call
        assert asyncio.get_running_loop().time() < 2

    play("memory", scene)


def test_a_link_that_becomes_slow_is_waited_for_longer() -> None:
    async def scene(net: Net) -> None:
        a, b = await net.node("a"), await net.node("b")
        for _ in range(20):
            await a.request(b.me, WORK, Ask("fast", 60_000), bytes(60_000))
        net.hub.faults = Faults(rate=BitsPerSecond(120_000.0))  # 60 kB each way: 8 s
        outcomes = []
        for _ in range(6):
            try:
                await a.request(b.me, WORK, Ask("slow", 60_000), bytes(60_000))
                outcomes.append("right")
            except DeadlinePassed:
                outcomes.append("late")
        assert outcomes[-1] == "right"

    play("memory", scene)


def test_a_busy_answer_teaches_nothing_about_the_time_a_body_takes() -> None:
    async def scene(net: Net) -> None:
        answers: dict[str, Any] = {"busy": Busy(1), "take": 1 << 26}
        a = await net.node("a")
        b = await net.node("b", [service(body_limit=lambda _peer, header: answers[header.word])])
        before = a.deadlines.of((b.me, WORK, "Ask"), 1 << 20)
        for _ in range(50):
            await a.push(b.me, WORK, Ask("busy", 1 << 20), bytes(1 << 20))
        assert a.deadlines.of((b.me, WORK, "Ask"), 1 << 20) == before

    play("memory", scene)


def test_the_twin_also_runs_in_real_time() -> None:
    async def main() -> None:
        net = Net("memory")
        a, b = await net.node("a"), await net.node("b")
        assert (await a.request(b.me, WORK, Ask("x"))).header == Tell("x")
        await net.close()

    asyncio.run(main())
