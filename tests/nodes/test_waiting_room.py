"""The waiting room: exact seats under any interleaving, order among the living, numbers that outlive a coordinator."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koinon.errors import Refused
from koinon.net.clock import run_virtual
from koinon.nodes import messages as m
from koinon.nodes.applicant import Applicant
from koinon.nodes.clock import loop_time
from koinon.nodes.switchboard import Switchboard
from koinon.nodes.waiting_room import BATCH, LINGER, WaitingRoom
from koinon.run import events as ev
from koinon.run.events import Event, Member
from koinon.run.policies import admission
from koinon.run.state import Phase, SeatStatus, apply, fold
from koinon.units import Bytes, PeerId
from tests.nodes.leagues import Paced, Rehearsal, assert_whole, run_league, spec_of

OPENED = ev.RunOpened("run", "spec", "coordinator", "trainer", 1, 1, "")


def wish(worker: str, account: str = "a") -> m.Join:
    return m.Join(account or worker, ("memory:1",), "wish")


class Doors:
    """A room, and as much of a coordinator as it needs."""

    def __init__(self, places: int) -> None:
        self.places, self.state, self.log = places, fold([OPENED]), list[Event]()
        self.open()

    def open(self) -> None:
        """A coordinator begins, with the log of the one before."""
        board = Switchboard(Bytes.mib(1))
        self.room = WaitingRoom(self.places, lambda: self.state, self.write, board, loop_time)

    def write(self, *events: Event) -> None:
        for event in events:
            self.log.append(event)
            self.state = apply(self.state, event)

    @property
    def living(self) -> list[str]:
        return [s.worker for s in self.state.seats.values() if s.status is not SeatStatus.LEFT]

    async def join(self, worker: str, account: str = "") -> m.Waiting | m.Later | None:
        """None: seated."""
        message = wish(worker, account)
        if worker in self.living:
            return None
        if not self.room.has_seat_for(PeerId(worker), message):
            return await self.room.line_up(PeerId(worker), message)
        self.write(ev.Seated(Member(self.state.next_member), worker, message.account, 0, 0, ()))
        return None

    def ready(self, worker: str) -> None:
        seat = self.state.member_of(worker)
        if seat is not None:
            self.write(ev.SeatReady(seat.member, 0, "root"))

    def lose(self, worker: str, *, drained: bool = False) -> None:
        seat = self.state.member_of(worker)
        if seat is not None:
            self.write(ev.SeatLeft(seat.member, "gone", drained=drained))


names = st.sampled_from([f"w{number}" for number in range(7)])
acts = st.one_of(
    st.tuples(st.sampled_from(["join", "wait", "wait"]), names),
    st.tuples(st.sampled_from(["ready", "lose", "leave"]), st.integers(0, 6)),
    st.tuples(st.just("withdraw"), names),
    st.tuples(st.just("pass"), st.sampled_from([0.0, 0.01, 1.0, 9.0, 40.0, 1000.0])),
    st.tuples(st.just("restart"), st.none()),
)


class Watched(Doors):
    """Holds every seat that is given against what the log and the clock say."""

    def __init__(self, places: int) -> None:
        super().__init__(places)
        self.heard: dict[str, float] = {}
        self.places_seen: dict[int, int] = {}

    def write(self, *events: Event) -> None:
        for event in events:
            if isinstance(event, ev.Seated):
                self.judge(event.worker)
            super().write(event)
        assert len(self.living) <= self.places
        for name, ticket in self.state.line.tickets.items():
            place = self.state.line.position(name)
            assert place is not None
            assert place <= self.places_seen.get(ticket.number, place)
            self.places_seen[ticket.number] = place

    def judge(self, worker: str) -> None:
        """Nobody who is there and came before is passed over."""
        free, line = self.places - len(self.living), self.state.line
        mine = line.tickets[worker].number if worker in line.tickets else line.next_number
        now = loop_time()
        ahead = [
            name
            for name, ticket in line.tickets.items()
            if ticket.number < mine
            and name not in self.living
            and now - self.heard.get(name, -1e9) < admission.absent_after(1) - 1.0
        ]
        assert len(ahead) < free, f"{worker} was seated before {ahead}"


@given(st.integers(1, 3), st.lists(acts, min_size=12, max_size=60))
def test_seats_are_exact_and_first_come_is_first_served_whatever_happens(
    places: int, script: list[tuple[str, object]]
) -> None:
    async def go() -> None:
        doors = Watched(places)
        asking: set[asyncio.Task[object]] = set()

        async def join(name: str) -> None:
            doors.heard[name] = loop_time()
            await doors.join(name)

        for act, what in script:
            match act, what:
                case "join" | "wait", str():
                    asking.add(asyncio.create_task(join(what)))
                    await asyncio.sleep(0 if act == "join" else 2 * LINGER)  # before its number is written, or after
                case "ready" | "lose" | "leave", int() if doors.living:
                    one = doors.living[what % len(doors.living)]
                    if act == "ready":
                        doors.ready(one)
                    else:
                        doors.lose(one, drained=act == "leave")
                case "withdraw", str():
                    await doors.room._on_withdraw(PeerId(what), m.Withdraw(), bytearray())
                case "pass", float():
                    await asyncio.sleep(what)
                    doors.room.tick()
                case "restart", _:
                    await asyncio.gather(*asking, return_exceptions=True)
                    doors.open()
                case _:
                    pass  # nobody is seated
        ended = await asyncio.gather(*asking, return_exceptions=True)
        assert all(isinstance(one, Refused | None) for one in ended), ended
        await asyncio.sleep(10.0)
        doors.room.tick()
        assert set(doors.room._late) <= set(doors.state.line.tickets)

    run_virtual(go())


def test_many_wishes_are_one_record_and_each_has_its_own_number() -> None:
    async def go() -> None:
        doors = Doors(1)
        await doors.join("first")
        answers = await asyncio.gather(*(doors.join(f"w{n}", f"a{n}") for n in range(BATCH + 50)))
        queued = [event for event in doors.log if isinstance(event, ev.Queued)]
        assert [len(event.tickets) for event in queued] == [BATCH, 50]
        assert [a.ticket for a in answers if isinstance(a, m.Waiting)] == list(range(1, BATCH + 51))
        assert [a.position for a in answers if isinstance(a, m.Waiting)] == list(range(1, BATCH + 51))

    run_virtual(go())


def test_a_replayed_join_gets_the_same_number_and_writes_nothing() -> None:
    async def go() -> None:
        doors = Doors(1)
        await doors.join("first")
        answers = await asyncio.gather(*(doors.join("w") for _ in range(20)))
        answers += [await doors.join("w") for _ in range(20)]
        assert {(a.ticket, a.position) for a in answers if isinstance(a, m.Waiting)} == {(1, 1)}
        assert len(doors.log) == 2

    run_virtual(go())


def test_a_free_seat_waits_for_the_front_and_not_for_those_who_are_gone() -> None:
    async def go() -> None:
        doors = Doors(1)
        await doors.join("first")
        for name in "abc":
            await doors.join(name)
        doors.lose("first", drained=True)
        assert isinstance(await doors.join("b"), m.Waiting), "a is there, and before it"
        assert isinstance(await doors.join("new"), m.Waiting)
        await asyncio.sleep(admission.absent_after(2))
        told = await doors.join("c")
        assert told is None, "a and b were not heard of"
        doors.lose("c", drained=True)
        assert await doors.join("a") is None, "the ticket of whoever comes back in time is good"

    run_virtual(go())


def test_a_ticket_of_somebody_who_does_not_poll_is_kept_for_a_time() -> None:
    async def go() -> None:
        doors = Doors(1)
        await doors.join("first")
        await doors.join("a")
        await asyncio.sleep(admission.PATIENCE)
        doors.room.tick()
        again = await doors.join("a")
        assert isinstance(again, m.Waiting)
        assert again.ticket == 1
        for _ in range(3):
            await asyncio.sleep(admission.PATIENCE)
            doors.room.tick()
        assert not doors.state.line.tickets
        assert isinstance(doors.log[-1], ev.Dequeued)

    run_virtual(go())


def test_a_new_coordinator_waits_a_moment_for_those_in_front() -> None:
    async def go() -> None:
        doors = Doors(1)
        await doors.join("first")
        for name in "ab":
            await doors.join(name)
        doors.open()
        doors.room.tick()
        doors.lose("first", drained=True)
        assert isinstance(await doors.join("b"), m.Waiting)
        assert await doors.join("a") is None

    run_virtual(go())


def test_a_crowd_beyond_the_length_is_refused_with_a_sentence() -> None:
    async def go() -> None:
        doors = Doors(1)
        await doors.join("first")
        full = replace(doors.state.line, numbers=tuple(range(1, admission.LENGTH + 1)), next_number=99_999)
        doors.state = replace(doors.state, line=full)
        with pytest.raises(Refused, match=r"20,000 wait already: ask again"):
            await doors.join("late")

    run_virtual(go())


def test_one_key_gets_few_new_numbers_and_is_told_when_to_come_back() -> None:
    async def go() -> None:
        doors = Doors(1)
        await doors.join("first")
        told = []
        for _ in range(4):
            told.append(await doors.join("w"))
            await doors.room._on_withdraw(PeerId("w"), m.Withdraw(), bytearray())
        assert [type(answer) for answer in told] == [m.Waiting, m.Waiting, m.Later, m.Later]
        assert isinstance(told[-1], m.Later)
        await asyncio.sleep(told[-1].after + 1.0)
        assert isinstance(await doors.join("w"), m.Waiting)

    run_virtual(go())


@pytest.mark.parametrize(
    "message",
    [
        m.Join("", (), "w"),
        m.Join("a" * 65, (), "w"),
        m.Join("a\n", (), "w"),
        m.Join("a", ("x" * 65,), "w"),
        m.Join("a", ("x",) * 9, "w"),
        m.Join("a", (), "w" * 65),
        m.Join("a", (), "w", 0, ((0, "r"),) * 65),
        m.Join("a", (), "w", 0, ((0, "r" * 65),)),
    ],
)
def test_an_oversized_wish_is_refused_before_anything_is_kept(message: m.Join) -> None:
    async def go() -> None:
        doors = Doors(1)
        with pytest.raises(Refused, match="shorter account or fewer"):
            doors.room.has_seat_for(PeerId("w"), message)
        assert not doors.room._late

    run_virtual(go())


def test_a_revoked_key_is_refused_with_the_reason() -> None:
    async def go() -> None:
        doors = Doors(1)
        await doors.join("w")
        doors.write(ev.Revoked("w", "it computed wrongly"))
        assert doors.living == []
        with pytest.raises(Refused, match="it computed wrongly"):
            await doors.join("w")
        assert await doors.join("other") is None

    run_virtual(go())


class Scripted:
    """An office that answers with these, one after the other."""

    def __init__(self, *answers: m.Message) -> None:
        self.answers, self.asked = list(answers), list[tuple[float, m.Message]]()

    async def insist(self, message: m.Message, _alpn: str = m.CTL) -> m.Message:
        self.asked.append((loop_time(), message))
        return self.answers.pop(0)

    async def ask(self, message: m.Message, alpn: str = m.CTL, **_more: object) -> m.Message:
        return await self.insist(message, alpn)


def test_an_applicant_asks_the_same_again_when_it_was_told_to_and_says_where_it_stands() -> None:
    async def go() -> None:
        welcome = m.Welcome(1, 0, 0, "fetch", 0, "", b"")
        waiting = [m.Waiting(40, place, 10.0, "all 4 seats are taken") for place in (9, 2)]
        office = Scripted(m.Later(5.0, "many"), *waiting, welcome, m.Ack())
        applicant = Applicant(office)
        asking = asyncio.create_task(applicant.seat(wish("w")))
        await asyncio.sleep(5.5)
        assert applicant.waiting == waiting[0]
        assert await asking == welcome
        assert applicant.waiting is None
        assert [message for _, message in office.asked] == [wish("w")] * 4
        times = [at for at, _ in office.asked]
        assert all(0.8 * said <= b - a <= said for said, a, b in zip((5.0, 10.0, 10.0), times, times[1:], strict=False))

    run_virtual(go())


# --- whole leagues


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return run_league(spec_of(1), tmp_path_factory.mktemp("calm"), make_compute=Paced).losses()


FULL = spec_of(2, league={"max_workers": 4})


def test_a_worker_waits_in_line_until_a_seat_is_free_and_takes_it(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    seen: list[tuple[str, int]] = []

    async def act(league: Rehearsal) -> None:
        await league.ready()
        for seat in 2, 3, 4:
            await league.start(0, seat)
        await league.until(lambda state: len(state.line) == 3)
        waiting = league.workers[0, 2].worker.report()
        assert (waiting.state, waiting.ticket > 0) == ("waiting", True)
        assert waiting.waits_for == "all 4 seats are taken"
        first = next(iter(league.state.line.tickets))
        league.restarts = False
        await league.kill(0, 0)
        await league.until(lambda state: state.member_of(first) is not None)
        assert len(league.state.line) == 3, "it keeps its place until it is ready"
        await league.until(lambda state: len(state.line) == 2)
        seen.append((first, len(league.state.line)))

    league = run_league(FULL, tmp_path, act, make_compute=Paced)
    assert seen
    assert_whole(league, undisturbed)
    alive = 0
    for event in league.events:
        alive += isinstance(event, ev.Seated) - isinstance(event, ev.SeatLeft)
        assert alive <= 4


def test_queue_numbers_outlive_the_coordinator(tmp_path: Path, undisturbed: dict[int, float]) -> None:
    before: dict[str, int] = {}

    async def crowd(league: Rehearsal) -> None:
        await league.ready()
        for seat in 2, 3:
            await league.start(0, seat)
        await league.until(lambda state: len(state.line) == 2)
        before.update({name: ticket.number for name, ticket in league.state.line.tickets.items()})

    async def go() -> None:
        async with Rehearsal(FULL, tmp_path, make_compute=Paced) as league:
            await crowd(league)
            await league.vanish()

    run_virtual(go())

    async def look(league: Rehearsal) -> None:
        after = {name: ticket.number for name, ticket in league.state.line.tickets.items()}
        assert after == before

    league = run_league(FULL, tmp_path, look, make_compute=Paced, resume=True)
    assert league.state.phase is Phase.COMPLETE
    assert_whole(league, undisturbed)


def test_a_league_trains_on_as_if_nothing_were_while_ten_thousand_come(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    """Many keys at once, and one key again and again: the answers are bounded, and so is the log."""
    told: dict[str, list[object]] = {"crowd": [], "one": []}

    async def flood(league: Rehearsal) -> None:
        await league.ready()
        coordinator = league.control.coordinator

        async def ask(name: str, wish: str) -> object:
            return await coordinator._on_join(PeerId(name), m.Join(f"account {name}", (), wish), bytearray())

        for start in range(0, 10_000, 500):
            told["crowd"] += await asyncio.gather(*(ask(f"w{n}", "wish") for n in range(start, start + 500)))
            told["one"] += await asyncio.gather(*(ask("w7", f"wish {number}") for number in range(100)))
            await asyncio.sleep(0.5)

    league = run_league(FULL, tmp_path, flood, make_compute=Paced)
    assert_whole(league, undisturbed)
    assert [answer.ticket for answer in told["crowd"] if isinstance(answer, m.Waiting)] == list(range(1, 10_001))
    assert {answer.ticket for answer in told["one"] if isinstance(answer, m.Waiting)} == {8}
    queued = [event for event in league.events if isinstance(event, ev.Queued)]
    assert len(league.state.line) == len(league.control.coordinator.room._late) == 10_000
    assert len(queued) < 100
    assert league.control.follower.state.line == league.state.line
