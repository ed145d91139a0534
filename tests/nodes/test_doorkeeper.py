"""Who gets in: passes that are expired, renewed, revoked, stolen, replayed, of another run or term, and no pass."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from hashlib import sha256
from pathlib import Path

import msgspec
import pytest

from koinon.errors import PeerError, Refused
from koinon.net.clock import run_virtual
from koinon.net.hub import Hub
from koinon.net.identity import NodeKey
from koinon.net.lanes import LANE
from koinon.net.memory import MemoryTransport
from koinon.net.passes import GRACE, Pass
from koinon.net.transport import Hello
from koinon.nodes import messages as m
from koinon.nodes.doorkeeper import Doorkeeper
from koinon.nodes.follower import RunFollower
from koinon.nodes.pass_keeper import PassKeeper
from koinon.nodes.pass_office import LIFETIME, PassOffice
from koinon.nodes.switchboard import Switchboard
from koinon.run import events as ev
from koinon.run.events import Event, Member
from koinon.run.state import RunState, apply, fold
from koinon.run.terms import Book, Term, enrolled
from koinon.units import Bytes, RunId
from tests.nodes.leagues import Paced, Rehearsal, assert_whole, run_league, spec_of

START = 1_900_000_000.0
RUN = RunId("ab" * 32)


def key(name: str) -> NodeKey:
    return NodeKey(sha256(name.encode()).digest())


def seated(member: int, name: str) -> ev.Seated:
    return ev.Seated(Member(member), key(name).peer_id, name, 0, 0, ())


class House:
    """A node's door, the log as that node knows it, and a coordinator that knows more of it."""

    def __init__(self) -> None:
        opened = ev.RunOpened(RUN, "", key("control").peer_id, key("control").peer_id, 1, 1, "")
        self.known = self.told = fold([opened])
        self.hung_up: list[tuple[str, str]] = []
        self.late = 0.0
        self.door = Doorkeeper(key("control").peer_id, RUN, now=self.now)
        self.door.watch(lambda: self.known, lambda peer, reason: self.hung_up.append((peer, reason)))
        self.office = PassOffice(key("control"), lambda: self.told, Switchboard(Bytes.mib(1)), now=self.now)

    def now(self) -> float:
        return START + self.late + asyncio.get_running_loop().time()

    def happens(self, event: Event, *, known: bool) -> RunState:
        """In the log; `known`: this node has read it."""
        self.told = apply(self.told, event)
        if known:
            self.known = self.told
        return self.told

    def pass_of(self, name: str) -> Pass:
        seat = self.told.member_of(key(name).peer_id)
        assert seat is not None
        return msgspec.msgpack.decode(self.office.issued(seat), type=Pass)

    def knock(self, name: str, shown: Pass | None, alpn: str = m.WORK, run: str = RUN) -> None:
        self.door.admit(key(name).peer_id, alpn, Hello(run=run, shown=shown))


def in_house(act: Callable[[House], Awaitable[None] | None]) -> None:
    async def go() -> None:
        ending = act(House())
        if ending is not None:
            await ending

    run_virtual(go())


@pytest.mark.parametrize("alpn", [m.CTL, m.WORK, m.BULK])
def test_a_stranger_gets_to_admission_and_nowhere_else(alpn: str) -> None:
    def act(house: House) -> None:
        house.knock("stranger", None, m.JOIN)
        house.knock("stranger", None, LANE)
        with pytest.raises(Refused, match="join the run first"):
            house.knock("stranger", None, alpn)
        house.knock("control", None, alpn)

    in_house(act)


def test_the_holder_of_a_new_term_is_let_in_before_the_log_knows_it_and_its_passes_count() -> None:
    def act(house: House) -> None:
        terms = tuple(
            Term(number=number, holder=key(name).peer_id, not_after=0.0)
            for number, name in enumerate(("control", "heir"), 1)
        )
        house.door.watch(lambda: house.known, lambda *_: None, lambda: Book(RUN, terms))
        for alpn in m.CTL, m.WORK, m.BULK:
            house.knock("heir", None, alpn)
        house.happens(ev.TermBegan(2, key("heir").peer_id, key("heir").peer_id, "gone"), known=False)
        house.happens(seated(0, "b"), known=False)
        with pytest.raises(Refused, match="not signed"):
            house.knock("b", house.pass_of("b"))  # the former coordinator's key, for a term that is not its own
        house.office = PassOffice(key("heir"), lambda: house.told, Switchboard(Bytes.mib(1)), now=house.now)
        house.knock("b", house.pass_of("b"))
        house.known = house.told
        with pytest.raises(Refused, match="join the run first"):
            house.knock("control", None)

    in_house(act)


def test_those_who_stand_by_or_look_on_read_the_log_and_get_nowhere_else() -> None:
    def act(house: House) -> None:
        book = enrolled(Book(RUN), key("heir").peer_id)
        house.door.watch(lambda: house.known, lambda *_: None, lambda: book)
        house.knock("heir", None, m.CTL)
        for alpn in m.WORK, m.BULK:
            with pytest.raises(Refused, match="join the run first"):
                house.knock("heir", None, alpn)

    in_house(act)


def test_whoever_the_log_knows_needs_no_pass_and_whoever_it_does_not_know_yet_shows_one() -> None:
    def act(house: House) -> None:
        house.happens(seated(0, "a"), known=True)
        house.knock("a", None)
        house.happens(seated(1, "b"), known=False)
        house.knock("b", house.pass_of("b"))
        with pytest.raises(Refused, match="no pass was shown"):
            house.knock("b", None)

    in_house(act)


def test_a_stolen_pass_is_refused_everywhere_even_from_a_member() -> None:
    def act(house: House) -> None:
        house.happens(seated(0, "a"), known=True)
        house.happens(seated(1, "b"), known=False)
        for alpn in m.CTL, m.WORK, m.BULK, m.JOIN, LANE:
            for thief in "thief", "a":
                with pytest.raises(Refused, match="belongs to"):
                    house.knock(thief, house.pass_of("b"), alpn)

    in_house(act)


def test_a_forged_pass_is_refused() -> None:
    def act(house: House) -> None:
        house.happens(seated(0, "b"), known=False)
        real = house.pass_of("b")
        for change in ({"member": 7}, {"not_after": real.not_after + 1}, {"node": key("thief").peer_id}):
            name = "thief" if "node" in change else "b"
            with pytest.raises(Refused, match="not signed"):
                house.knock(name, msgspec.structs.replace(real, **change))

    in_house(act)


def test_an_expired_pass_is_refused_after_its_grace_and_its_bearer_is_hung_up() -> None:
    async def act(house: House) -> None:
        house.happens(seated(0, "b"), known=False)
        shown = house.pass_of("b")
        await asyncio.sleep(LIFETIME.value + GRACE.value - 1.0)
        house.knock("b", shown)
        assert not house.hung_up
        await asyncio.sleep(3.0)
        assert [(peer, "expired" in reason) for peer, reason in house.hung_up] == [(key("b").peer_id, True)]
        with pytest.raises(Refused, match="expired"):
            house.knock("b", shown)
        house.knock("b", house.pass_of("b"))

    in_house(act)


def test_nobody_is_hung_up_whose_seat_the_log_has_told_of_meanwhile() -> None:
    async def act(house: House) -> None:
        event = seated(0, "b")
        house.happens(event, known=False)
        house.knock("b", house.pass_of("b"))
        house.known = apply(house.known, event)
        await asyncio.sleep(2 * LIFETIME.value)
        assert not house.hung_up

    in_house(act)


def test_the_pass_of_a_seat_that_was_left_is_void_and_replaying_it_does_not_help() -> None:
    def act(house: House) -> None:
        house.happens(seated(0, "b"), known=True)
        old = house.pass_of("b")
        house.happens(ev.SeatLeft(Member(0), "gone"), known=True)
        for _ in range(3):
            with pytest.raises(Refused, match="void"):
                house.knock("b", old)
        house.happens(seated(1, "b"), known=False)
        with pytest.raises(Refused, match="void"):
            house.knock("b", old)
        house.knock("b", house.pass_of("b"))

    in_house(act)


def test_a_revoked_key_is_refused_whatever_it_shows() -> None:
    def act(house: House) -> None:
        house.happens(seated(0, "b"), known=True)
        shown = house.pass_of("b")
        house.happens(ev.Revoked(key("b").peer_id, "it computed wrongly"), known=True)
        for alpn in m.CTL, m.WORK, m.BULK:
            with pytest.raises(Refused, match="it computed wrongly"):
                house.knock("b", shown, alpn)

    in_house(act)


def test_passes_and_hellos_of_another_run_are_refused() -> None:
    def act(house: House) -> None:
        house.happens(seated(0, "b"), known=False)
        shown = house.pass_of("b")
        with pytest.raises(Refused, match=r"for run|of run"):
            house.knock("b", msgspec.structs.replace(shown, run="cd" * 32))
        with pytest.raises(Refused, match="of run"):
            house.knock("b", shown, run="cd" * 32)

    in_house(act)


def test_a_pass_of_an_older_term_is_refused_and_one_of_a_newer_term_is_believed() -> None:
    def act(house: House) -> None:
        house.happens(seated(0, "b"), known=False)
        old = house.pass_of("b")
        house.known = apply(house.known, ev.RunResumed(0, 2))
        with pytest.raises(Refused, match="term 1"):
            house.knock("b", old)
        house.told = apply(house.told, ev.RunResumed(0, 3))
        house.happens(seated(1, "b"), known=False)
        house.knock("b", house.pass_of("b"))

    in_house(act)


def test_a_pass_is_renewed_at_half_of_its_life_until_the_seat_is_lost() -> None:
    async def act(house: House) -> None:
        hub, board = Hub(0), Switchboard(Bytes.mib(1))
        PassOffice(key("control"), lambda: house.told, board, now=house.now)
        control, member = MemoryTransport(hub, key("control")), MemoryTransport(hub, key("b"))
        where = await control.start(board.services())
        await member.start(Switchboard(Bytes.mib(1)).services())
        member.learn(where)
        house.happens(seated(0, "b"), known=False)
        keeper = PassKeeper(member, RunFollower(member, Switchboard(Bytes.mib(1)), where.peer, RUN), RUN, now=house.now)
        keeper.hold(house.office.issued(house.told.seats[Member(0)]))
        keeping = asyncio.create_task(keeper.keep(0))
        for _ in range(6):
            await asyncio.sleep(0.6 * LIFETIME.value)
            assert keeper.held is not None
            assert member.hello.shown == keeper.held
            assert keeper.held.not_after - house.now() > 0.35 * LIFETIME.value
        house.happens(ev.SeatLeft(Member(0), "gone"), known=False)
        await asyncio.sleep(LIFETIME.value)
        assert keeping.done()
        await control.close()
        await member.close()

    in_house(act)


# --- a whole league


def test_workers_are_closed_to_strangers_and_to_the_revoked_and_open_to_each_other(tmp_path: Path) -> None:
    async def act(league: Rehearsal) -> None:
        await league.ready()
        victim, culprit = league.workers[0, 0].transport, league.workers[1, 1].transport
        stranger = MemoryTransport(league.hub, key("stranger"))
        await stranger.start(Switchboard(Bytes.mib(1)).services())
        stolen = culprit.hello
        assert stolen.shown is not None
        for target in victim, league.control.transport:
            stranger.learn(league.hub_address(target))
            for alpn, message in (
                (m.CTL, m.Heartbeat(0, m.Telemetry())),
                (m.WORK, m.Backward(0, 0, 0, 0)),
                (m.BULK, m.ContentWanted(0)),
            ):
                stranger.introduce(Hello())
                with pytest.raises(Refused, match="join the run first"):
                    await stranger.request(target.me, alpn, message)
                stranger.introduce(stolen)
                with pytest.raises(Refused, match="belongs to"):
                    await stranger.request(target.me, alpn, message)
        await asyncio.sleep(2.0)
        assert victim._connections, "members talk"
        league.restarts = False
        league.control.coordinator.revoke(culprit.me, "it computed wrongly")
        await asyncio.sleep(0.5)
        assert not any(peer == culprit.me for peer, _ in victim._connections)
        with pytest.raises(PeerError, match="computed wrongly"):
            await culprit.request(victim.me, m.BULK, m.ContentWanted(0))
        with pytest.raises(Refused, match="computed wrongly"):
            await culprit.request(league.control.transport.me, m.JOIN, m.Join("a", (), "w"))
        await stranger.close()

    league = run_league(spec_of(2), tmp_path, act, make_compute=Paced)
    assert_whole(league, league.losses())
