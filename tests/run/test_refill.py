"""Where a run goes back to when a stage is emptied: never a mixture of steps, and never further than it must."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from koinon.run import events as ev
from koinon.run.events import Member
from koinon.run.policies.refill import Supplies, emptied, everybody_is_back, goes_back_to, has, newest_common
from koinon.run.state import RunState, apply
from tests.run.test_state import OPENED, STAGES, lives

supplies = st.dictionaries(
    st.integers(0, STAGES - 1), st.sets(st.integers(0, 8), max_size=6).map(tuple), max_size=STAGES
)


def folded(log: list[ev.Event]) -> RunState:
    state = RunState()
    for event in log:
        state = apply(state, event)
    return state


def as_logged(state: RunState, steps: dict[int, tuple[int, ...]]) -> Supplies:
    """Snapshots of these steps whose roots are the log's, as far as it knows them."""
    return {
        stage: {step: root for step in some if (root := state.stages[stage].root_at(step)) is not None}
        for stage, some in steps.items()
    }


@given(lives(), supplies)
def test_it_goes_back_to_a_step_that_every_stage_has_and_to_the_newest_of_them(
    log: list[ev.Event], steps: dict[int, tuple[int, ...]]
) -> None:
    state = folded(log)
    found = as_logged(state, steps)
    step = newest_common(state, found)
    everywhere = [s for s in range(state.step + 1) if all(has(state, found, i, s) for i in range(STAGES))]
    assert step == max(everywhere, default=None)


@given(lives(), supplies)
def test_after_going_back_all_stages_stand_at_one_step(log: list[ev.Event], steps: dict[int, tuple[int, ...]]) -> None:
    state = folded(log)
    step = goes_back_to(state, as_logged(state, steps))
    if step is not None:
        after = apply(state, ev.RunResumed(step, 1))
        assert {stage.step for stage in after.stages} == {step}
        assert all(
            stage.root_at(step) == was.root_at(step) for stage, was in zip(after.stages, state.stages, strict=True)
        )


@given(lives())
def test_it_does_not_go_back_while_somebody_restores_what_was_lost(log: list[ev.Event]) -> None:
    state = folded(log)
    own = {stage.index: (stage.step,) for stage in emptied(state)}
    assert goes_back_to(state, as_logged(state, own)) is None


def test_everybody_is_back_once_each_machine_that_ever_held_the_stage_has_a_seat_in_it() -> None:
    seated = [ev.Seated(Member(i), f"w{i % 2}", "a", 0, i % 2, ()) for i in range(4)]
    log = [OPENED, *seated[:2], *(ev.SeatReady(Member(i), 0, "root") for i in (0, 1))]
    log += [ev.SeatLeft(Member(0), "gone"), ev.SeatLeft(Member(1), "gone")]
    assert not everybody_is_back(folded(log), 0)
    assert not everybody_is_back(folded([*log, seated[2]]), 0)
    assert everybody_is_back(folded([*log, *seated[2:]]), 0)
