"""Processes that kill -9 themselves at every point of a step: the run ends as one undisturbed process would.

Real processes over real connections. Each league meets a handful of the points, one per seat, at different steps; the
matrix of every point, stage and number of replicas runs over the twin in tests/nodes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from koinon import LocalSwarm, RunSpec
from koinon.cli.single import losses
from koinon.nodes.faults import Point
from koinon.nodes.rundir import RunDir
from koinon.run import events as ev
from koinon.run.items import unpack
from koinon.run.state import Phase

STAGES, STEPS, MICROBATCHES = 3, 10, 4
POINTS = list(Point)
PLACES = {1: 3, 2: 6}
"""Seats of a league, by replicas: as many points are met in one run."""


def spec_of(replicas: int) -> RunSpec:
    return RunSpec.of(
        name="chaos",
        seed=5,
        model={"size": 32, "layers": 3, "stages": STAGES, "context": 32, "rank": 4, "codec": "fp32", "table": 64},
        train={"steps": STEPS, "batch": 8, "microbatch": 2, "eval_every": 0, "eval_sequences": 4},
        league={"replicas": replicas},
        data={"max_bytes": 200_000},
    )


def plan_of(replicas: int, first: int) -> dict[tuple[int, int], tuple[tuple[str, int], ...]]:
    """Points `first`, `first + 1`, ... for the seats in turn, each from another step on."""
    seats = [(stage, seat) for seat in range(replicas) for stage in reversed(range(STAGES))]
    met = POINTS[first : first + len(seats)]
    return {place: ((point.value, 1 + index),) for index, (place, point) in enumerate(zip(seats, met, strict=False))}


@pytest.mark.slow
@pytest.mark.parametrize(("replicas", "first"), [(r, f) for r in PLACES for f in range(0, len(POINTS), PLACES[r])])
def test_killed_processes_are_absorbed(tmp_path: Path, replicas: int, first: int) -> None:
    with LocalSwarm(spec_of(replicas), tmp_path, faults=plan_of(replicas, first)) as swarm:
        events = list(swarm.events())
        state = swarm.state
    assert state.phase is Phase.COMPLETE, state.reason
    assert state.tally.vanished >= 1, "no fault struck"
    assert state.tally.items_dropped == 0
    league = {e.step: e.loss for e in events if isinstance(e, ev.StepMeasured)}
    assert league == pytest.approx(dict(enumerate(losses(RunDir(tmp_path)))), abs=1e-4)
    for stage in range(STAGES):
        for step in range(STEPS):
            sets = [e for e in events if isinstance(e, ev.Contributed) and (e.stage, e.step) == (stage, step)]
            assert sorted(i for e in sets for i in unpack(e.items)) == list(range(MICROBATCHES))
