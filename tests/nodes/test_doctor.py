"""The way into a run over the in-memory twin: whatever stands in it is named at its own hop, with what to do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from koinon.errors import MachineUnfit, PortInUse
from koinon.net.clock import run_virtual
from koinon.net.hub import Faults, Hub
from koinon.net.identity import NodeKey
from koinon.net.invitation import invite
from koinon.net.memory import MemoryTransport
from koinon.net.passes import announce
from koinon.net.transport import Hello, NodeAddr
from koinon.nodes import doctor, machine
from koinon.nodes.doctor import Examination, Way
from koinon.nodes.findings import Finding, Verdict
from koinon.nodes.introducer import Introducer
from koinon.nodes.reception import Reception
from koinon.nodes.switchboard import Switchboard
from koinon.run import events as ev
from koinon.run.events import Event, Member
from koinon.run.spec import RunSpec
from koinon.run.state import fold
from koinon.units import BitsPerSecond, Bytes, RunId, Seconds
from tests.nodes.leagues import spec_of

NOW = 1_900_000_000.0
HOPS = [
    "invitation", "clock", "software", "UDP socket", "dial", "protocol", "clock against the coordinator", "run",
    "round trip", "up", "down", "link against the spec", "seen from outside", "memory", "disk",
]  # fmt: skip


def key(name: str) -> NodeKey:
    return NodeKey(sha256(name.encode()).digest())


class World:
    """A coordinator on a hub, and one who wants to join."""

    def __init__(self, spec: RunSpec, path: Path, events: list[Event], faults: Faults, hello: Hello) -> None:
        self.hub, self.spec, self.path, self.hello = Hub(0, faults), spec, path, hello
        self.events, self.strangers, self.now = events, 0, NOW

    async def __aenter__(self) -> World:
        state = fold(
            [ev.RunOpened(self.spec.run_id, self.spec.to_toml(), "c", "c", self.spec.model.stages, 4, ""), *self.events]
        )
        board = Switchboard(Bytes.mib(4))
        reception = Reception(self.spec, lambda: state, board, key("control"), self.node, now=lambda: NOW)
        self.control = MemoryTransport(self.hub, key("control"), hello=self.hello)
        self.address = await self.control.start(board.services())
        reception.open_at(self.address.addresses)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.control.close()

    def node(self) -> MemoryTransport:
        self.strangers += 1
        return MemoryTransport(self.hub, key(f"stranger {self.strangers}"))

    def invitation(self, **changes: Any) -> str:
        run, until = RunId(self.spec.run_id), int(NOW) + 100
        values = {"run": run, "addresses": self.address.addresses, "not_after": until} | changes
        return invite(key("control"), **values).text

    async def walk(self, text: str | None = None, **changes: Any) -> tuple[list[Finding], Examination]:
        way = Way(self.path, key("joiner"), lambda k, _bind: MemoryTransport(self.hub, k), now=lambda: self.now)
        examination = Examination(text or self.invitation(), replace(way, **changes))
        return [finding async for finding in examination.walk(computes=False)], examination


@pytest.fixture
def in_world(tmp_path: Path):
    """Runs `act(world)` in virtual time."""

    def go(
        act: Callable[[World], Awaitable[None]],
        *,
        spec: RunSpec | None = None,
        events: list[Event] | None = None,
        faults: Faults | None = None,
        hello: Hello | None = None,
    ) -> None:
        async def run() -> None:
            world = World(
                spec or spec_of(1), tmp_path, events or [], faults or Faults(delay=Seconds(0.02)), hello or Hello()
            )
            async with asyncio.timeout(600.0), world:
                await act(world)

        run_virtual(run())

    return go


def assert_stops_at(findings: list[Finding], hop: str, found: str, remedy: str = "") -> None:
    assert [f.verdict for f in findings[:-1]].count(Verdict.BAD) == 0
    last = findings[-1]
    assert (last.hop, last.verdict) == (hop, Verdict.BAD)
    assert found in last.found
    assert remedy in last.remedy
    assert isinstance(last.as_error(), MachineUnfit)


def test_a_clear_way_is_walked_to_its_end_hop_by_hop(in_world) -> None:
    async def act(world: World) -> None:
        findings, examination = await world.walk()
        assert [finding.hop for finding in findings] == HOPS
        assert {finding.verdict for finding in findings} == {Verdict.GOOD}
        assert examination.learned.spec == world.spec
        assert examination.learned.link is not None
        assert examination.learned.link.rtt.value == pytest.approx(0.04, abs=0.001)
        assert not examination.learned.waits

    in_world(act)


@pytest.mark.parametrize("rate", [1.0, 20.0])
def test_the_link_is_measured_about_right_both_ways(in_world, rate: float) -> None:
    async def act(world: World) -> None:
        _, examination = await world.walk()
        link = examination.learned.link
        assert link is not None
        for measured in link.up, link.down:
            assert 0.6 * rate < measured.value / 1e6 < 1.2 * rate

    in_world(act, faults=Faults(delay=Seconds(0.02), rate=BitsPerSecond.mbit(rate)))


def test_a_mistyped_invitation_is_the_first_thing_that_is_named(in_world) -> None:
    async def act(world: World) -> None:
        findings, _ = await world.walk(world.invitation()[:-3] + "aaa")
        assert len(findings) == 1
        assert_stops_at(findings, "invitation", "typing mistake")

    in_world(act)


def test_an_expired_invitation_is_refused_before_anything_is_sent(in_world) -> None:
    async def act(world: World) -> None:
        assert_stops_at((await world.walk(world.invitation(not_after=int(NOW) - 61)))[0], "clock", "was good until")

    in_world(act)


def test_a_port_that_is_taken_is_named(in_world) -> None:
    async def act(world: World) -> None:
        class Taken(MemoryTransport):
            async def start(self, services: Any) -> Any:
                raise PortInUse("0.0.0.0:4774")

        findings, _ = await world.walk(make=lambda k, _bind: Taken(world.hub, k))
        assert_stops_at(findings, "UDP socket", "0.0.0.0:4774 is in use", "--bind")

    in_world(act)


def test_a_dead_coordinator_is_named_with_what_each_address_answered(in_world) -> None:
    async def act(world: World) -> None:
        findings, _ = await world.walk(world.invitation(addresses=("memory:x", "memory:y")))
        assert_stops_at(findings, "dial", "memory:x: no answer; memory:y: no answer", "ask for a new invitation")
        assert "firewall" in findings[-1].remedy

    in_world(act)


def test_one_good_address_among_dead_ones_is_enough_and_is_the_one_used(in_world) -> None:
    async def act(world: World) -> None:
        findings, examination = await world.walk(world.invitation(addresses=("memory:x", *world.address.addresses)))
        assert "memory:x: no answer" in next(f.found for f in findings if f.hop == "dial")
        assert findings[-1].verdict is Verdict.GOOD
        assert examination.learned.coordinator == world.address.addresses

    in_world(act)


async def _introducer(world: World, signer: str, **changes: Any) -> NodeAddr:
    values = {
        "run": world.spec.run_id, "addresses": world.address.addresses, "sequence": 1, "expiry": int(NOW) + 9,
    } | changes  # fmt: skip
    node, board = MemoryTransport(world.hub, key(f"introducer {signer}")), Switchboard(Bytes.mib(1))
    Introducer(board, announce(key(signer), **values))
    return await node.start(board.services())


def test_a_coordinator_that_has_moved_is_found_through_any_member(in_world) -> None:
    async def act(world: World) -> None:
        member = await _introducer(world, "control")
        gone = NodeAddr(key("gone").peer_id, ("memory:gone",))
        old = world.invitation(addresses=("memory:old",), introducers=(gone, member))
        findings, examination = await world.walk(old)
        assert findings[-1].verdict is Verdict.GOOD
        assert examination.learned.coordinator == world.address.addresses

    in_world(act)


@pytest.mark.parametrize("forged", [{"signer": "liar"}, {"signer": "control", "run": "00" * 32}])
def test_a_member_cannot_lead_a_joiner_elsewhere(in_world, forged: dict[str, str]) -> None:
    async def act(world: World) -> None:
        member = await _introducer(world, **forged)
        old = world.invitation(addresses=("memory:old",), introducers=(member,))
        assert_stops_at((await world.walk(old))[0], "dial", "Nobody answers")

    in_world(act)


def test_another_protocol_is_told_from_silence(in_world) -> None:
    async def act(world: World) -> None:
        findings, _ = await world.walk()
        assert_stops_at(findings, "protocol", "this run needs 7-9; upgrade koinon")
        assert findings[-2].hop == "dial"

    in_world(act, hello=Hello(protocol=(7, 9)))


@pytest.mark.parametrize(("off", "way"), [(75.0, "ahead"), (-300.0, "behind")])
def test_a_clock_that_is_off_by_more_than_a_minute_is_refused_with_the_remedy(in_world, off: float, way: str) -> None:
    async def act(world: World) -> None:
        world.now = NOW + off
        findings, _ = await world.walk(world.invitation(not_after=int(NOW) + 1000))
        assert_stops_at(findings, "clock against the coordinator", way, "timedatectl")

    in_world(act)


def test_an_invitation_to_another_run_of_the_same_coordinator_is_named(in_world) -> None:
    async def act(world: World) -> None:
        findings, _ = await world.walk(world.invitation(run=RunId("ab" * 32)))
        assert_stops_at(findings, "run", "now leads run", "Ask for a new invitation")

    in_world(act)


def test_a_run_that_has_failed_or_is_complete_takes_nobody(in_world) -> None:
    async def failed(world: World) -> None:
        assert_stops_at((await world.walk())[0], "run", "It has failed: no disk", "resumed")

    async def complete(world: World) -> None:
        assert_stops_at((await world.walk())[0], "run", "It is complete")

    in_world(failed, events=[ev.RunFailed("no disk")])
    in_world(complete, events=[ev.RunCompleted(4)])


def test_a_full_or_stopped_league_is_waited_for_and_not_refused(in_world) -> None:
    async def act(world: World) -> None:
        findings, examination = await world.walk()
        (doubt,) = [f for f in findings if f.verdict is Verdict.DOUBTFUL]
        assert doubt.hop == "run"
        assert examination.learned.waits
        assert [f.hop for f in findings] == HOPS

    seats: list[Event] = [ev.Seated(Member(n), f"{n:064x}", f"a{n}", n % 2, n // 2, ()) for n in range(2)]
    in_world(act, spec=spec_of(1, league={"max_workers": 2}), events=seats)
    in_world(act, events=[ev.RunStopped("for the night")])


def test_whoever_has_a_seat_is_let_in_though_the_league_is_full(in_world) -> None:
    async def act(world: World) -> None:
        _, examination = await world.walk()
        assert not examination.learned.waits

    seats: list[Event] = [
        ev.Seated(Member(n), key(who).peer_id, who, n, 0, ()) for n, who in enumerate(("joiner", "x"))
    ]
    in_world(act, spec=spec_of(1, league={"max_workers": 2}), events=seats)


def test_a_link_that_is_too_slow_for_the_spec_is_refused(in_world) -> None:
    async def act(world: World) -> None:
        findings, _ = await world.walk()
        assert_stops_at(
            findings, "link against the spec", "too slow for this run: `rate_mbit` of its spec is 50 Mbit/s"
        )

    base = spec_of(1)
    spec = replace(base, link=replace(base.link, rate_mbit=50.0))
    in_world(act, spec=spec, faults=Faults(delay=Seconds(0.02), rate=BitsPerSecond.mbit(5.0)))


def test_who_cannot_be_reached_is_told_which_port_to_open(in_world, monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(world: World) -> None:
        world.hub.partition([key("joiner").peer_id], [key(f"stranger {n}").peer_id for n in range(1, 4)])
        findings, _ = await world.walk()
        assert_stops_at(findings, "seen from outside", "cannot reach this machine (memory:", "--advertise")

    in_world(act)


def test_too_little_memory_or_disk_is_refused_before_any_download(in_world, monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(world: World) -> None:
        enough = machine.facts(world.path)
        monkeypatch.setattr(doctor.machine, "facts", lambda _: replace(enough, memory=Bytes.mib(100)))
        assert_stops_at((await world.walk())[0], "memory", "too little for any stage", "more")
        monkeypatch.setattr(doctor.machine, "facts", lambda _: replace(enough, disk=Bytes(10)))
        assert_stops_at((await world.walk())[0], "disk", "10 B are free", "--dir")

    in_world(act)


def test_the_machine_alone_is_looked_at_without_an_invitation(in_world) -> None:
    async def act(world: World) -> None:
        way = Way(world.path, key("joiner"), lambda k, _bind: MemoryTransport(world.hub, k))
        findings = [finding async for finding in Examination(None, way).walk(computes=False)]
        assert [finding.hop for finding in findings] == ["software", "UDP socket", "memory", "disk"]

    in_world(act)


def test_the_run_can_be_asked_again_how_it_stands(in_world) -> None:
    async def act(world: World) -> None:
        _, examination = await world.walk()
        assert (await examination.knock()).run == world.spec.run_id

    in_world(act)


def test_names_of_hosts_are_looked_up_and_everything_else_is_left_as_it_is() -> None:
    async def go() -> None:
        for address in ("192.0.2.1:7", "[2001:db8::1]:7", "memory:12", "odd"):
            assert await doctor.resolved(address) == (address,)
        assert "127.0.0.1:7" in await doctor.resolved("localhost:7")

    asyncio.run(go())
