"""A stage loses its last replica: the run pauses and says so, keeps everything, and goes on with the same losses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from koinon.nodes.faults import Point
from koinon.run import events as ev
from koinon.run.state import Pause, Phase, RunState
from tests.nodes.leagues import Paced, Rehearsal, assert_whole, run_league, spec_of
from tests.nodes.test_resume import damage, snapshots


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Rehearsal:
    return run_league(spec_of(1), tmp_path_factory.mktemp("calm"), make_compute=Paced)


def went_back_to(league: Rehearsal) -> list[int]:
    return [event.step for event in league.events if isinstance(event, ev.RunResumed)]


def at(stage: int, step: int) -> Callable[[RunState], bool]:
    return lambda state: state.stages[stage].step == step


async def kill_all(league: Rehearsal, stage: int, seats: int) -> None:
    for seat in range(seats):
        await league.kill(stage, seat)


def test_an_emptied_stage_pauses_the_run_for_hours_and_its_newest_snapshot_ends_the_pause_at_no_loss(
    tmp_path: Path, undisturbed: Rehearsal
) -> None:
    paused: list[tuple[Pause, ...]] = []

    async def scene(league: Rehearsal) -> None:
        await league.until(at(1, 2))
        await kill_all(league, 1, 2)
        await asyncio.sleep(1200.0)
        paused.append(league.state.pauses)
        await league.start(1, 0)
        await league.until(lambda state: not state.pauses)

    league = run_league(spec_of(2), tmp_path, scene, make_compute=Paced)
    assert_whole(league, undisturbed.losses())
    assert [(pause.stage, pause.step) for pause in paused[0]] == [(1, 2)]
    assert paused[0][0].since > 0
    assert went_back_to(league) == []
    assert sum(isinstance(event, ev.Seated) for event in league.events) == 5, "nobody asks for seats in vain"


def test_whoever_comes_without_a_snapshot_waits_for_one_who_has_it(tmp_path: Path, undisturbed: Rehearsal) -> None:
    async def scene(league: Rehearsal) -> None:
        await league.until(at(1, 2))
        await league.kill(1, 0)
        await league.start(1, 1)
        await asyncio.sleep(120.0)
        assert league.state.pauses
        await league.start(1, 0)

    league = run_league(spec_of(1), tmp_path, scene, make_compute=Paced)
    assert_whole(league, undisturbed.losses())
    assert went_back_to(league) == []
    assert sum(isinstance(event, ev.Seated) for event in league.events) == 4


@pytest.mark.parametrize("replicas", [1, 2])
def test_an_older_snapshot_takes_the_whole_league_back_together(
    tmp_path: Path, undisturbed: Rehearsal, replicas: int
) -> None:
    async def scene(league: Rehearsal) -> None:
        await league.until(at(1, 3))
        await kill_all(league, 1, replicas)
        for path in snapshots(tmp_path, 3):
            if path.parent.name.startswith("01-"):
                path.unlink()
        for seat in range(replicas):
            await league.start(1, seat)

    league = run_league(spec_of(replicas), tmp_path, scene, make_compute=Paced)
    assert went_back_to(league) == [2]
    assert_whole(league, undisturbed.losses())
    credited = sum(credit.items for credit in league.state.credit.values())
    assert credited == sum(credit.items for credit in undisturbed.state.credit.values()), "void credit is void"
    assert league.ended_at < 60.0


def test_one_who_comes_with_an_older_snapshot_first_waits_for_the_other(tmp_path: Path, undisturbed: Rehearsal) -> None:
    async def scene(league: Rehearsal) -> None:
        await league.until(at(1, 3))
        await kill_all(league, 1, 2)
        (league.directory.seat(1, 1) / "step-00000003.safetensors").unlink()
        await league.start(1, 1)
        await asyncio.sleep(20.0)
        await league.start(1, 0)

    league = run_league(spec_of(2), tmp_path, scene, make_compute=Paced)
    assert went_back_to(league) == []
    assert_whole(league, undisturbed.losses())


def test_corrupt_snapshots_cost_the_steps_that_they_hold(tmp_path: Path, undisturbed: Rehearsal) -> None:
    async def scene(league: Rehearsal) -> None:
        await league.until(at(1, 3))
        await kill_all(league, 1, 2)
        for path in snapshots(tmp_path, 3):
            if path.parent.name.startswith("01-"):
                damage(path)
        for seat in 0, 1:
            await league.start(1, seat)

    league = run_league(spec_of(2), tmp_path, scene, make_compute=Paced)
    assert went_back_to(league) == [2]
    assert_whole(league, undisturbed.losses())


def test_two_emptied_stages_go_back_to_what_both_have(tmp_path: Path, undisturbed: Rehearsal) -> None:
    spec = spec_of(1, stages=3)
    calm = run_league(spec, tmp_path / "calm", make_compute=Paced)

    async def scene(league: Rehearsal) -> None:
        await league.until(lambda state: state.step == 3)
        for stage, lost in ((0, (3,)), (2, (3, 4))):
            await league.kill(stage, 0)
            for step in lost:
                (league.directory.seat(stage, 0) / f"step-{step:08d}.safetensors").unlink(missing_ok=True)
        await league.until(lambda state: len(state.pauses) == 2)
        for stage in 0, 2:
            await league.start(stage, 0)
            await asyncio.sleep(15.0)

    league = run_league(spec, tmp_path / "run", scene, make_compute=Paced)
    assert went_back_to(league) == [2]
    assert_whole(league, calm.losses())


def test_a_run_that_saves_every_other_step_goes_back_by_itself(tmp_path: Path, undisturbed: Rehearsal) -> None:
    spec = spec_of(2, train={"snapshot_every": 2})

    async def scene(league: Rehearsal) -> None:
        await league.until(at(0, 3))
        await kill_all(league, 0, 2)
        for seat in 0, 1:
            await league.start(0, seat)

    league = run_league(spec, tmp_path, scene, make_compute=Paced)
    assert went_back_to(league) == [2]
    assert_whole(league, undisturbed.losses())


def test_it_goes_back_again_and_again(tmp_path: Path, undisturbed: Rehearsal) -> None:
    async def scene(league: Rehearsal) -> None:
        for _ in range(3):
            await league.until(lambda state: state.step == 3 and not state.pauses)
            newest = max(stage.step for stage in league.state.stages)
            await league.kill(0, 0)
            for step in range(3, newest + 1):
                (league.directory.seat(0, 0) / f"step-{step:08d}.safetensors").unlink(missing_ok=True)
            await league.start(0, 0)
            await league.until(lambda state: state.step == 2)

    league = run_league(spec_of(1), tmp_path, scene, make_compute=Paced)
    assert went_back_to(league) == [2, 2, 2]
    assert_whole(league, undisturbed.losses())


@pytest.mark.parametrize("point", [Point.FORWARD, Point.FOLDED, Point.SLICED, Point.HELD, Point.COMMITTED])
def test_wherever_the_last_replica_dies(tmp_path: Path, undisturbed: Rehearsal, point: Point) -> None:
    """Snapshots are written at every other step, so what it dies in is often lost with it."""
    spec = spec_of(1, train={"snapshot_every": 2})
    league = run_league(spec, tmp_path, make_compute=Paced, plan={(0, 0): {(point, 3)}})
    assert_whole(league, undisturbed.losses())


def test_when_nobody_comes_back_the_run_fails_at_its_last_deadline_and_says_what_to_do(
    tmp_path: Path, undisturbed: Rehearsal
) -> None:
    spec = spec_of(1, league={"pause_s": 600.0})

    async def scene(league: Rehearsal) -> None:
        await league.until(at(0, 2))
        await league.kill(0, 0)

    league = run_league(spec, tmp_path, scene, make_compute=Paced)
    assert league.state.phase is Phase.FAILED
    assert "Nobody has stage 0 at step 2 any more" in league.state.reason
    assert "pause_s" in league.state.reason
    assert "resume" in league.state.reason
    assert 600.0 < league.ended_at < 700.0
    assert_whole(run_league(spec, tmp_path, make_compute=Paced, resume=True), undisturbed.losses())


def test_a_deadline_of_nothing_is_for_ever(tmp_path: Path, undisturbed: Rehearsal) -> None:
    spec: Any = spec_of(1, league={"pause_s": 0.0})

    async def scene(league: Rehearsal) -> None:
        await league.until(at(0, 2))
        await league.kill(0, 0)
        await asyncio.sleep(2000.0)
        await league.start(0, 0)

    assert_whole(run_league(spec, tmp_path, scene, make_compute=Paced), undisturbed.losses())
