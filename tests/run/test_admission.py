"""The waiting line: first come first served, positions that only fall, and limits that hold."""

from __future__ import annotations

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from koinon.run import events as ev
from koinon.run.events import Event, Member, Ticket
from koinon.run.policies import admission
from koinon.run.policies.admission import PER_ACCOUNT, TRIES, Line, Wish, called, issued, poll_after
from koinon.run.state import RunState, SeatStatus, apply, fold

OPENED = ev.RunOpened("run", "spec", "coordinator", "trainer", 1, 1, "")
WORKERS = [f"w{number}" for number in range(8)]
worker = st.sampled_from(WORKERS)
wishes = st.lists(st.builds(Wish, worker, st.sampled_from(["a", "b"])), max_size=12)


def line_of(count: int) -> Line:
    return Line().with_tickets(Ticket(number, f"w{number - 1}", "a") for number in range(1, count + 1))


@st.composite
def scripts(draw: st.DrawFn) -> list[Event]:
    """What a coordinator may write about a line, in any order that it may happen, with late twins."""
    log: list[Event] = [OPENED]
    state = fold(log)
    for _ in range(draw(st.integers(0, 50))):
        who = draw(worker)
        seat = state.member_of(who)
        match draw(st.sampled_from(["queue", "queue", "leave", "seat", "ready", "lose", "resume", "twin", "revoke"])):
            case "queue":
                event: Event = ev.Queued(issued(state.line, draw(wishes))[0])
            case "leave":
                event = ev.Dequeued((who,), "left")
            case "seat" if seat is None:
                event = ev.Seated(Member(state.next_member), who, "a", 0, 0, ())
            case "ready" if seat is not None:
                event = ev.SeatReady(seat.member, 0, "root")
            case "lose" if seat is not None:
                event = ev.SeatLeft(seat.member, "gone", drained=draw(st.booleans()))
            case "resume":
                event = ev.RunResumed(0, 2)
            case "revoke":
                event = ev.Revoked(who, "it lied") if draw(st.booleans()) else ev.Dequeued((), "")
            case _:
                event = draw(st.sampled_from(log))
        log.append(event)
        state = apply(state, event)
    return log


def states_of(log: list[Event]) -> list[RunState]:
    return list(accumulate(log, apply, initial=RunState()))


@given(scripts())
def test_a_position_never_increases(log: list[Event]) -> None:
    seen: dict[int, int] = {}
    for state in states_of(log):
        for name, ticket in state.line.tickets.items():
            position = state.line.position(name)
            assert position is not None
            assert 1 <= position <= seen.get(ticket.number, position)
            seen[ticket.number] = position


@given(scripts())
def test_a_number_is_given_once_and_the_line_is_in_the_order_of_numbers(log: list[Event]) -> None:
    holders: dict[int, str] = {}
    for state in states_of(log):
        line = state.line
        assert list(line.numbers) == sorted(line.numbers) == [ticket.number for ticket in line.tickets.values()]
        assert all(holders.setdefault(ticket.number, name) == name for name, ticket in line.tickets.items())
        assert sum(line.accounts.values()) == len(line) == len(line.tickets)
        assert set(line.lost) <= set(line.tickets)
        assert all(number < line.next_number for number in line.numbers)


@given(scripts())
def test_whoever_is_ready_in_a_seat_does_not_wait(log: list[Event]) -> None:
    for event, state in zip(log, states_of(log)[1:], strict=True):
        if isinstance(event, ev.SeatReady) and state.seats[event.member].status is SeatStatus.READY:
            assert state.seats[event.member].worker not in state.line.tickets


@given(wishes, st.integers(0, 6))
def test_tickets_follow_the_order_of_wishes_and_stop_at_the_length(asked: list[Wish], length: int) -> None:
    line = line_of(2)
    given_out, refused = issued(line, asked, length=length)
    order = list(dict.fromkeys(wish.worker for wish in asked if wish.worker not in line.tickets))
    room = max(0, length - len(line))
    assert [ticket.worker for ticket in given_out] == order[:room]
    assert [ticket.number for ticket in given_out] == list(range(3, 3 + len(given_out)))
    assert set(refused) == set(order[room:])
    assert all("ask again" in sentence for sentence in refused.values())


def test_one_account_does_not_fill_the_line() -> None:
    crowd = [Wish(f"m{number}", "one") for number in range(PER_ACCOUNT + 1)]
    given_out, refused = issued(Line(), [*crowd, Wish("other", "two")])
    assert len(given_out) == PER_ACCOUNT + 1
    assert given_out[-1].worker == "other"
    assert list(refused) == [f"m{PER_ACCOUNT}"]
    later = Line().with_tickets(given_out)
    assert issued(later, [Wish("late", "one")])[1]
    assert not issued(later.without({"m0"}), [Wish("late", "one")])[1]


@given(st.integers(0, 8), st.integers(0, 9), st.sets(worker), st.sets(worker))
def test_a_free_seat_goes_to_the_first_who_is_there(count: int, free: int, seated: set[str], absent: set[str]) -> None:
    line = line_of(count)
    turn = called(line, free, seated=seated, absent=absent)
    there = [name for name in line.tickets if name not in seated and name not in absent]
    assert list(turn) == there[:free]


def test_a_lost_seat_is_retried_at_the_front_and_not_for_ever() -> None:
    state = fold([OPENED, ev.Queued(tuple(Ticket(n, f"w{n}", "a") for n in (1, 2, 3)))])
    for attempt in range(TRIES):
        assert called(state.line, 1, seated=(), absent=()) == ("w1",)
        assert [state.line.position(name) for name in ("w1", "w2", "w3")] == [1, 2, 3]
        state = apply(state, ev.Seated(Member(attempt), "w1", "a", 0, 0, ()))
        assert state.line.position("w1") == 1, "it keeps its place until it is ready"
        state = apply(state, ev.SeatLeft(Member(attempt), "it crashed"))
    assert state.line.position("w1") is None
    assert called(state.line, 1, seated=(), absent=()) == ("w2",)


def test_whoever_leaves_a_seat_on_purpose_leaves_the_line_too() -> None:
    state = fold(
        [
            OPENED,
            ev.Queued((Ticket(1, "w1", "a"),)),
            ev.Seated(Member(0), "w1", "a", 0, 0, ()),
            ev.SeatLeft(Member(0), "goodbye", drained=True),
        ]
    )
    assert len(state.line) == 0


def test_a_line_outlives_its_coordinator() -> None:
    state = fold([OPENED, ev.Queued((Ticket(1, "w1", "a"), Ticket(2, "w2", "a"))), ev.RunResumed(0, 2)])
    assert [state.line.position(name) for name in ("w1", "w2")] == [1, 2]
    assert state.term == 2


def test_a_full_line_asks_at_a_rate_that_one_node_can_answer() -> None:
    per_second = sum(1 / poll_after(position) for position in range(1, 10_001))
    assert per_second < 30
    assert poll_after(1) == 1.0
    assert poll_after(admission.LENGTH) == 600.0
