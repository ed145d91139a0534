"""`apply`, the fold that everybody shares: total, deaf to late twins, and exact about credit."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate
from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from koinon.run import events as ev
from koinon.run.events import Event, Member
from koinon.run.items import pack, unpack
from koinon.run.state import ROOTS_KEPT, Credit, Pause, Phase, RunState, SeatStatus, apply, fold

STAGES, MICROBATCHES = 2, 3
OPENED = ev.RunOpened("run", "spec", "coordinator", "trainer", STAGES, MICROBATCHES, "commitment")

# --- events of any kind in any order; the ranges are small, so that events meet each other

member, step, attempt = st.integers(-1, 4).map(Member), st.integers(-1, 4), st.integers(0, 2)
stage, number, text = st.integers(-1, STAGES), st.floats(0, 9), st.sampled_from(["a", "b"])
items = st.lists(st.integers(0, 9), max_size=4).map(pack)
several = st.lists(member, max_size=3).map(tuple), st.lists(items, max_size=3).map(tuple)
ANY: dict[type, st.SearchStrategy[Event]] = {
    ev.RunOpened: st.just(OPENED),
    ev.Queued: st.builds(
        ev.Queued, st.lists(st.builds(ev.Ticket, st.integers(0, 9), text, text), max_size=3).map(tuple)
    ),
    ev.Dequeued: st.builds(ev.Dequeued, st.lists(text, max_size=2).map(tuple), text),
    ev.Revoked: st.builds(ev.Revoked, text, text),
    ev.Seated: st.builds(ev.Seated, member, text, text, stage, st.integers(0, 2), st.just(())),
    ev.SeatReady: st.builds(ev.SeatReady, member, step, text),
    ev.Attending: st.builds(ev.Attending, member),
    ev.SeatMoved: st.builds(ev.SeatMoved, member, st.just(("there",))),
    ev.Unreachable: st.builds(ev.Unreachable, member, text),
    ev.Returned: st.builds(ev.Returned, member),
    ev.Draining: st.builds(ev.Draining, member, text),
    ev.SeatLeft: st.builds(ev.SeatLeft, member, text, st.booleans()),
    ev.Excluded: st.builds(ev.Excluded, member, step, text),
    ev.ItemsReleased: st.builds(ev.ItemsReleased, step, stage, member, items, text),
    ev.ItemDropped: st.builds(ev.ItemDropped, step, st.integers(0, 9), st.lists(stage, max_size=3).map(tuple), text),
    ev.ReduceOpened: st.builds(
        ev.ReduceOpened, stage, step, attempt, *several, st.lists(member, max_size=2).map(tuple)
    ),
    ev.ReduceAborted: st.builds(ev.ReduceAborted, stage, step, attempt, text),
    ev.Disputed: st.builds(ev.Disputed, stage, step, attempt, member, member, text, number),
    ev.MomentumLost: st.builds(ev.MomentumLost, stage, step, st.just(("tensor",))),
    ev.Contributed: st.builds(ev.Contributed, member, stage, step, items, st.integers(0, 9), st.integers(0, 9)),
    ev.StageStepped: st.builds(ev.StageStepped, stage, step, attempt, text, number, number),
    ev.StepMeasured: st.builds(ev.StepMeasured, step, number, number, st.integers(1, 9)),
    ev.Evaluated: st.builds(ev.Evaluated, step, number, st.integers(1, 9)),
    ev.RunStopped: st.builds(ev.RunStopped, text),
    ev.RunResumed: st.builds(ev.RunResumed, step, st.integers(1, 3)),
    ev.TermBegan: st.builds(ev.TermBegan, st.integers(0, 4), text, text, text),
    ev.Equivocated: st.builds(ev.Equivocated, st.integers(0, 4), text, st.binary(max_size=4), st.binary(max_size=4)),
    ev.RunCompleted: st.builds(ev.RunCompleted, step),
    ev.RunFailed: st.builds(ev.RunFailed, text),
}
chaos = st.lists(st.one_of(*ANY.values()), max_size=60)


def test_every_kind_of_event_is_drawn_here() -> None:
    assert set(ANY) == set(get_args(Event))


# --- logs as a coordinator writes them


@st.composite
def lives(draw: st.DrawFn) -> list[Event]:
    """A log that makes sense: seats, reduces that abort or commit, losses, resumes, a late twin now and then."""
    log: list[Event] = [OPENED]
    state = fold(log)
    for _ in range(draw(st.integers(0, 40))):
        here = draw(st.integers(0, STAGES - 1))
        for event in _what_comes(draw, state, here):
            log.append(event)
            state = apply(state, event)
            if draw(st.integers(0, 7)) == 0:
                log.append(event)
                state = apply(state, event)
    return log


def _what_comes(draw: st.DrawFn, state: RunState, here: int) -> list[Event]:
    now, ready = state.stages[here], state.ready(here)
    working = state.seats_of(here, SeatStatus.READY, SeatStatus.DRAINING)
    able = [seat.member for seat in working if state.may_contribute(seat.member, now.step)]
    match draw(
        st.sampled_from(
            [
                "join",
                "attend",
                "reduce",
                "reduce",
                "commit",
                "commit",
                "lose",
                "exclude",
                "return",
                "resume",
                "succeed",
            ]
        )
    ):
        case "join":
            who = Member(state.next_member)
            root = now.root_at(now.step) or "founded"
            account = f"account {here}{draw(st.integers(0, 2))}"
            begun: list[Event] = [ev.Seated(who, f"w{who}", account, here, 0, ())]
            if draw(st.booleans()):
                return [*begun, ev.Attending(who)]
            return [*begun, ev.SeatReady(who, now.step, root)]
        case "attend":
            late = state.seats_of(here, SeatStatus.ATTENDING)
            return [ev.SeatReady(late[0].member, now.step, now.root_at(now.step) or "founded")] if late else []
        case "reduce" if able and now.reduce is None:
            sets: list[list[int]] = [[] for _ in able]
            for microbatch in range(MICROBATCHES):
                sets[draw(st.integers(0, len(able) - 1))].append(microbatch)
            late = tuple(seat.member for seat in state.seats_of(here, SeatStatus.ATTENDING))
            return [ev.ReduceOpened(here, now.step, now.attempt, tuple(able), tuple(map(pack, sets)), late)]
        case "commit" if now.reduce is not None:
            paid: list[Event] = [
                ev.Contributed(who, here, now.step, bitmap, 10 * len(unpack(bitmap)), 100 * len(unpack(bitmap)))
                for who, bitmap in zip(now.reduce.members, now.reduce.sets, strict=True)
                if bitmap
            ]
            return [*paid, ev.StageStepped(here, now.step, now.attempt, f"root {here}.{now.step}", 1.0, 0.0)]
        case "lose" if ready:
            who = draw(st.sampled_from(ready)).member
            return [
                draw(st.sampled_from([ev.SeatLeft(who, "gone"), ev.Unreachable(who, "silent"), ev.Draining(who, "")]))
            ]
        case "exclude" if ready:
            return [ev.Excluded(draw(st.sampled_from(ready)).member, now.step, "late")]
        case "return":
            silent = state.seats_of(here, SeatStatus.UNREACHABLE)
            return [ev.Returned(silent[0].member)] if silent else []
        case "resume" if state.step:
            oldest = max(0, max(s.step for s in state.stages) - ROOTS_KEPT + 1)
            return [ev.RunResumed(draw(st.integers(min(oldest, state.step), state.step)), 1)]
        case "succeed":
            return [ev.TermBegan(state.term + 1, f"heir {state.term}", f"heir {state.term}", "silent")]
        case _:
            return []


# --- what holds for any events at all


@given(chaos)
def test_no_sequence_of_events_breaks_it(events: list[Event]) -> None:
    for state in accumulate(events, apply, initial=RunState()):
        assert len(state.stages) in (0, STAGES)
        assert all(seat.member == key for key, seat in state.seats.items())


@given(chaos)
def test_the_same_log_gives_the_same_state(events: list[Event]) -> None:
    assert fold(events) == fold([ev.decode(ev.encode(event)) for event in events])


@given(chaos, st.integers(0, 60))
def test_a_state_of_any_prefix_goes_on_as_the_whole(events: list[Event], cut: int) -> None:
    assert fold(events[cut:], fold(events[:cut])) == fold(events)


@given(chaos)
def test_it_leaves_the_state_it_was_given_as_it_was(events: list[Event]) -> None:
    states = list(accumulate(events, apply, initial=RunState()))
    assert states == list(accumulate(events, apply, initial=RunState()))
    assert states[0] == RunState()


@given(chaos)
def test_nobody_has_less_credit_than_nothing(events: list[Event]) -> None:
    for credit in fold([OPENED, *events]).credit.values():
        assert min(credit.items, credit.tokens, credit.flops) >= 0


# --- what holds for logs that make sense


@given(lives())
def test_credit_is_the_sum_of_the_contributions_that_no_resume_voided(log: list[Event]) -> None:
    state, paid = RunState(), dict[tuple[Member, int], ev.Contributed]()
    for event in log:
        if isinstance(event, ev.Contributed) and state.stages[event.stage].step == event.step:
            paid.setdefault((event.member, event.step), event)
        if isinstance(event, ev.RunResumed):
            paid = {key: contribution for key, contribution in paid.items() if key[1] < event.step}
        state = apply(state, event)
    expected: Counter[str] = Counter()
    for contribution in paid.values():
        expected[state.seats[contribution.member].account] += len(unpack(contribution.items))
    assert {account: credit.items for account, credit in state.credit.items() if credit.items} == dict(expected)
    assert all(c == Credit(c.items, 10 * c.items, 100 * c.items) for c in state.credit.values())


@given(lives())
def test_each_item_of_a_step_is_paid_once(log: list[Event]) -> None:
    state = fold(log)
    for here in state.stages:
        accounts = {seat.account for seat in state.seats.values() if seat.stage == here.index}
        assert sum(state.credit.get(a, Credit()).items for a in accounts) == here.step * MICROBATCHES


@given(lives())
def test_a_twin_of_any_seat_or_payment_changes_nothing(log: list[Event]) -> None:
    state = RunState()
    for event in log:
        state = apply(state, event)
        if isinstance(event, ev.Seated | ev.Contributed | ev.StageStepped | ev.Excluded | ev.SeatLeft | ev.RunOpened):
            assert apply(state, event) == state


@given(lives())
def test_a_stage_moves_one_step_at_a_time_and_back_only_by_a_resume(log: list[Event]) -> None:
    states = list(accumulate(log, apply, initial=RunState()))
    for event, before, after in zip(log, states, states[1:], strict=False):
        if not before.stages:
            continue
        for was, here in zip(before.stages, after.stages, strict=True):
            if isinstance(event, ev.RunResumed):
                assert here.step == min(was.step, event.step)
            else:
                assert here.step - was.step == (isinstance(event, ev.StageStepped) and was != here)


@given(lives())
def test_whoever_is_ready_has_the_weights_of_its_stage(log: list[Event]) -> None:
    state = fold(log)
    for seat in state.seats.values():
        if seat.status is SeatStatus.READY:
            assert seat.step == state.stages[seat.stage].step


@given(lives())
def test_a_run_pauses_for_the_founded_stages_that_nobody_holds_and_for_no_others(log: list[Event]) -> None:
    for state in accumulate(log, apply, initial=RunState()):
        holding = (SeatStatus.READY, SeatStatus.DRAINING, SeatStatus.UNREACHABLE)
        held = {seat.stage for seat in state.seats.values() if seat.status in holding}
        lost = {stage.index: stage.step for stage in state.stages if stage.versions and stage.index not in held}
        assert {pause.stage: pause.step for pause in state.pauses} == lost


def test_a_pause_says_since_when() -> None:
    log = [
        OPENED,
        *(ev.Seated(Member(i), f"w{i}", "a", 1, i, (), at=1.0) for i in (0, 1)),
        *(ev.SeatReady(Member(i), 0, "root", at=2.0) for i in (0, 1)),
        ev.SeatLeft(Member(0), "gone", at=3.0),
        ev.SeatLeft(Member(1), "gone", at=4.0),
        ev.Seated(Member(2), "w2", "a", 1, 0, (), at=5.0),
    ]
    assert fold(log[:-2]).pauses == ()
    assert fold(log).pauses == (Pause(1, 0, 4.0),)
    assert fold([*log, ev.SeatReady(Member(2), 0, "root", at=6.0)]).pauses == ()
    assert fold([*log, ev.RunStopped("enough", at=6.0)]).pauses == ()


@given(lives())
def test_no_open_reduce_names_anybody_who_is_gone_or_excluded(log: list[Event]) -> None:
    state = fold(log)
    for here in state.stages:
        for who in here.reduce.members if here.reduce else ():
            assert state.may_contribute(who, here.step)


@given(lives())
def test_after_a_resume_nobody_is_seated_and_nothing_is_open(log: list[Event]) -> None:
    state = fold([*log, ev.RunResumed(0, 9)])
    assert state.phase is Phase.TRAINING
    assert not any(state.seats_of(here.index) or here.reduce for here in state.stages)
    assert not state.excluded
