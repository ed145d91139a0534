"""A worker vanishes at any point of a step; with one worker per stage or two, the run ends as if it had not.

Real nodes and real arithmetic over the in-memory twin, in virtual time, in which computing takes time: a run must not
be over before the second replicas have joined it. tests/chaos does the same with processes.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from koinon.net.clock import run_virtual
from koinon.nodes.faults import Point
from koinon.run import events as ev
from koinon.run.items import unpack
from koinon.run.spec import RunSpec
from koinon.run.state import Phase
from tests.nodes.leagues import Paced
from tests.twin import TwinLeague

STEPS, MICROBATCHES = 10, 4
FAULT_AT = 3
"""Or at the first later step at which that worker has something to do at that point."""


def spec_of(replicas: int) -> RunSpec:
    return RunSpec.of(
        name="matrix",
        seed=3,
        model={"size": 16, "layers": 3, "stages": 3, "context": 16, "rank": 4, "codec": "fp32", "table": 16},
        train={"steps": STEPS, "batch": 8, "microbatch": 2, "eval_every": 0, "eval_sequences": 4},
        league={"replicas": replicas},
        data={"max_bytes": 100_000},
    )


def run_league(path: Path, replicas: int, plan: dict[tuple[int, int], set[tuple[Point, int]]]) -> TwinLeague:
    async def go() -> TwinLeague:
        async with TwinLeague(spec_of(replicas), path, plan=plan, make_compute=Paced) as league:
            await asyncio.wait_for(league.trained(), 300)
            return league

    return run_virtual(go())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return run_league(tmp_path_factory.mktemp("calm"), 1, {}).losses()


def assert_whole(league: TwinLeague, undisturbed: dict[int, float]) -> None:
    assert league.state.phase is Phase.COMPLETE
    assert league.losses() == pytest.approx(undisturbed, abs=1e-4)
    assert league.state.tally.items_dropped == 0
    for stage in range(3):
        for step in range(STEPS):
            sets = [e for e in league.events if isinstance(e, ev.Contributed) and (e.stage, e.step) == (stage, step)]
            items = sorted(i for e in sets for i in unpack(e.items))
            assert items == list(range(MICROBATCHES)), f"stage {stage}, step {step}: each item once"


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("point", list(Point))
def test_a_worker_that_vanishes_is_absorbed(
    tmp_path: Path, undisturbed: dict[int, float], point: Point, stage: int, replicas: int
) -> None:
    if (point is Point.FORWARD and stage == 2) or (point is Point.FORWARDED and stage == 2):
        pytest.skip("the last stage does forward and backward in one")
    league = run_league(tmp_path, replicas, {(stage, 0): {(point, FAULT_AT)}})
    assert league.deaths, "the fault never struck"
    assert_whole(league, undisturbed)
