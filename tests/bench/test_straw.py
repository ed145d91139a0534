"""The straw: what a turn comes to, which turns count, and a league that really trains over emulated links."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bench.hosted import Step, hosted
from bench.peers.hosted import SlowedCompute
from bench.straw import DISTURBED, LINKS, QUICK, STAGES, Plan, Track, Turn, compared, weighed
from bench.twin import twin_turns
from bench.wan import Stats, Wan, why_not
from koinon.run.spec import RunSpec

SECONDS = 5.0
"""What a step of the scripted league takes."""


@dataclass
class ScriptedWan:
    """Notes what it is told, and has one packet in every `late_every` late."""

    late: Iterator[int]
    told: list[dict[str, str | float]] = field(default_factory=list)
    delivered: int = 0
    were_late: int = 0

    def set(self, **settings: str | float) -> None:
        self.told.append(settings)

    def stats(self) -> Stats:
        found = Stats(
            delivered=self.delivered,
            late=self.were_late,
            nbytes={(1, 2): 10 * self.delivered, (3, 2): 5 * self.delivered, (1, 5): 7 * self.delivered},
        )
        self.delivered += 1000
        self.were_late += next(self.late)
        return found


@dataclass
class ScriptedLeague:
    steps: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def next_step(self) -> Step:
        return step(next(self.steps))

    def overrun(self) -> float:
        return 0.0


def step(number: int) -> Step:
    return Step(number, SECONDS * number, 3.0, 30 * number, 2 * number, 0)


def track(late: list[int]) -> Track:
    """late: packets of 1000 that are late between one look at the stats and the next."""
    wan = ScriptedWan(itertools.chain(late, itertools.repeat(0)))
    return Track(wan, ScriptedLeague(), QUICK.spec("stream"), step(0))


def test_a_turn_is_tokens_over_the_time_of_its_steps_and_the_bytes_between_neighbours_only() -> None:
    spec = QUICK.spec("stream")
    found = track([0]).turn("near", steps=2, tries=1)
    assert found.per_second == pytest.approx(spec.step_tokens / SECONDS)
    tokens, boundaries = 2 * spec.step_tokens, STAGES - 1
    assert found.down == pytest.approx(10 * 1000 / tokens / boundaries)
    assert found.up == pytest.approx(5 * 1000 / tokens / boundaries)
    assert found.frames == 15.0


def test_a_step_passes_after_the_links_change_and_none_where_they_stay() -> None:
    run = track([])
    run.turn("near", steps=1, tries=1)
    assert (run.last.step, run.wan.told) == (1, [])
    run.turn("straw", steps=1, tries=1)
    assert (run.last.step, run.wan.told) == (3, [LINKS["straw"]])


def test_a_turn_in_which_the_network_was_late_is_measured_again() -> None:
    run = track([500, 900, 0])  # in the first try, between the two, in the second
    assert not run.turn("near", steps=1, tries=3).is_disturbed
    assert run.discarded == 1


def test_the_last_try_counts_and_is_called_disturbed() -> None:
    run = track([500] * 9)
    assert run.turn("near", steps=1, tries=3).is_disturbed
    assert run.discarded == 2


@pytest.mark.parametrize("turn", [Turn(1.0, late=2 * DISTURBED), Turn(1.0, absent=2 * DISTURBED)])
def test_late_packets_and_absent_cores_disturb(turn: Turn) -> None:
    assert turn.is_disturbed


def test_figures_are_ratios_of_single_turns_held_to_the_targets() -> None:
    per_second = {"near": [100.0, 200.0, 100.0], "straw": [96.0, 190.0, 97.0], "lossy": [80.0, 180.0, 84.0]}
    found = {figure.name: figure for figure in compared(per_second, "straw", targets=True)}
    assert found["straw_80mbit"].value == pytest.approx(0.96)
    assert found["straw_80mbit"].target == 0.95
    assert found["straw_80mbit"].holds
    assert found["straw_80mbit_1pct"].value == pytest.approx(0.84)
    assert not found["straw_80mbit_1pct"].holds
    assert found["straw_80mbit_spread"].value == pytest.approx([0.95, 0.97])
    assert all(figure.target is None for figure in compared(per_second, "dense", targets=False))


def test_the_link_carries_what_the_heavier_direction_lets_it() -> None:
    turns = {links: [Turn(1.0, down=20.0, up=10.0, frames=9.0)] for links in LINKS}
    found = {figure.name: figure.value for figure in weighed(turns, "straw")}
    assert found["straw_link_carries"] == 500_000
    assert found["straw_bytes_per_token"] == {"frames": 9.0, "wire_down": 20.0, "wire_up": 10.0}


def test_the_uncompressed_league_differs_in_its_boundaries_only() -> None:
    plan = Plan(repeats=1, steps=1, batch=16, dense_repeats=1, tries=1)
    stream, dense = plan.spec("stream").model, plan.spec("dense").model
    assert dense.bytes_per_token == 4 * dense.size
    assert stream.bytes_per_token < dense.bytes_per_token / 32
    assert (stream.layers, stream.size, stream.cuts()) == (dense.layers, dense.size, dense.cuts())


SMALL = RunSpec.of(
    name="small",
    seed=1,
    model={"stages": 2, "layers": 2, "size": 16, "context": 32, "rank": 4, "table": 16},
    train={"steps": 1000, "batch": 8, "microbatch": 1, "eval_every": 0, "snapshot_every": 100},
    data={"max_bytes": 100_000},
    league={"replicas": 1},
)


def test_the_twin_pays_for_far_links_in_virtual_time() -> None:
    found = twin_turns(SMALL, repeats=1, steps=1, slower=1.0)
    assert found["near"][0] > 2 * found["straw"][0]
    assert len(found["lossy"]) == 1


@pytest.mark.slow
@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
def test_a_league_trains_on_hosts_of_its_own_while_its_links_change() -> None:
    with Wan(hosts=3, rate="unlimited", rtt=0, seed=2) as wan, hosted(wan, SMALL, slower=2.0) as league:
        first = league.next_step()
        wan.set(rtt="50ms", rate="80mbit")
        far = [league.next_step() for _ in range(12)]
        then = far[-1]
        assert then.at - far[2].at > 5 * 0.05, "nine steps, each there and back; some may be told of together"
        assert then.step == first.step + 12
        assert then.loss < 8
        assert wan.stats().nbytes[1, 2] > 0
        assert league.overrun() >= 0.0


def test_a_slowed_core_takes_as_much_longer_as_was_asked_for(tmp_path: Path) -> None:
    async def spent() -> tuple[float, float]:
        compute = SlowedCompute(10.0, tmp_path / "overrun")

        def job() -> float:
            began = time.thread_time()
            sum(range(300_000))
            return time.thread_time() - began

        try:
            return await compute.run(job), compute.busy_seconds
        finally:
            compute.close()

    needed, busy = asyncio.run(spent())
    assert busy > 9 * needed
