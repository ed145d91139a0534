"""When a stage has lost its last replica: what the run waits for, and to which step it goes back if that never comes.

A stage's weights exist where a member is ready, and in snapshots. While none of its members is ready the run pauses; a
snapshot of the stage's own step ends the pause at no loss. Failing that, *all* stages go back to the newest step of
which each has a snapshot: a mixture of steps would be another model. Pure: no clock, no disk.
"""

from __future__ import annotations

from collections.abc import Mapping

from koinon.run.state import Phase, RunState, SeatStatus, StageState

Supplies = Mapping[int, Mapping[int, str]]
"""Stage -> step -> root, of every snapshot that was verified against the log."""


def emptied(state: RunState) -> list[StageState]:
    """Founded stages whose weights no member holds."""
    return [stage for stage in state.stages if stage.emptied is not None] if state.phase is Phase.TRAINING else []


def everybody_is_back(state: RunState, stage: int) -> bool:
    """Whether every machine that ever held the stage has a seat in it again: better snapshots will not come."""
    ever = {seat.worker for seat in state.seats.values() if seat.stage == stage}
    return ever == {seat.worker for seat in state.seats_of(stage, SeatStatus.SYNCING, SeatStatus.ATTENDING)}


def goes_back_to(state: RunState, supplies: Supplies) -> int | None:
    """The step to go back to; None where the run has to wait: for a member that is restoring the stage's own step, or
    for anybody who has what is needed."""
    if all(has(state, supplies, stage.index, stage.step) for stage in emptied(state)):
        return None
    return newest_common(state, supplies)


def newest_common(state: RunState, supplies: Supplies) -> int | None:
    """The newest step at which every stage can be restored."""
    steps = range(state.step, -1, -1)
    return next((step for step in steps if all(has(state, supplies, s.index, step) for s in state.stages)), None)


def has(state: RunState, supplies: Supplies, stage: int, step: int) -> bool:
    """Whether the stage can be restored at that step."""
    if not state.stages[stage].versions:
        return step == 0  # lost before the stage was founded: it is founded anew
    root = state.stages[stage].root_at(step)
    return root is not None and supplies.get(stage, {}).get(step) == root
