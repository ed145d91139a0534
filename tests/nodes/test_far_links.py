"""Links of 50 ms: what they cost a step is the crossings that nothing can hide, and not claims or idle workers."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TypeVar

import pytest

from koinon.net.hub import Faults
from koinon.nodes.compute import InlineCompute
from koinon.run import events as ev
from koinon.units import BitsPerSecond, Seconds
from tests.nodes.leagues import run_league, spec_of

T = TypeVar("T")
STAGES, ITEMS, PACE = 4, 32, 0.05
NEAR = Faults(delay=Seconds.ms(0.1))
FAR = Faults(delay=Seconds.ms(25), rate=BitsPerSecond.mbit(80))


class Paced(InlineCompute):
    """A forward or a backward takes 50 virtual milliseconds; what is done once in a step takes none."""

    async def run(self, job: Callable[[], T]) -> T:
        pace = PACE if "_do" in job.__code__.co_names else 0.0
        await asyncio.sleep(pace)
        self.busy_seconds += pace
        return job()


def step_seconds(path: Path, faults: Faults, in_flight: int = 16) -> float:
    """Virtual seconds of a step, once the league has measured its links."""
    at: list[float] = []
    spec = spec_of(
        stages=STAGES,
        train={"steps": 6, "batch": ITEMS, "microbatch": 1, "snapshot_every": 100},
        league={"in_flight": in_flight},
    )

    async def act(league) -> None:
        def heard(event: ev.Event, _state: object) -> None:
            if isinstance(event, ev.StepMeasured):
                at.append(asyncio.get_running_loop().time())

        league.control.follower.listen(heard)
        await league.trained()

    run_league(spec, path, act, faults=faults, make_compute=Paced)
    return median(later - sooner for sooner, later in itertools.pairwise(at[2:]))


@pytest.fixture(scope="module")
def near(tmp_path_factory: pytest.TempPathFactory) -> float:
    return step_seconds(tmp_path_factory.mktemp("near"), NEAR)


def test_near_links_cost_a_step_nothing(near: float) -> None:
    """A flush of 1F1B: every item twice at a middle stage, and the way down and up of one item to begin and end."""
    assert near == pytest.approx((2 * ITEMS + 2 * (STAGES - 1) - 2) * PACE, rel=0.02)


def test_far_links_cost_a_step_its_crossings_and_no_claim(near: float, tmp_path: Path) -> None:
    """Down and up the stages, and at stage 0 the word that it is done and the commit: eight; ten, where an offer or the
    reduce comes at an ill moment."""
    crossings = (2 * (STAGES - 1) + 2) * FAR.delay.value
    assert 0.9 * crossings < step_seconds(tmp_path, FAR) - near < crossings + 2 * FAR.delay.value + 0.02


def test_a_worker_that_may_hold_little_keeps_the_league_waiting(near: float, tmp_path: Path) -> None:
    """What `in_flight` is for: the window follows measured crossings only as far as workers can hold it."""
    assert step_seconds(tmp_path, FAR, in_flight=4) > near + 1.0
