"""Everything is gone at once; what lies on the disk goes on as if nothing had been, or says why it cannot.

Real nodes and real files over the in-memory twin, in virtual time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from koinon.errors import LogCorrupt, NothingToResume
from koinon.net.clock import run_virtual
from koinon.net.hub import Faults
from koinon.nodes.control import reopen, resume_point_elsewhere
from koinon.nodes.rundir import RunDir
from koinon.run import events as ev
from koinon.run.events import Member
from koinon.run.state import RunState, fold
from koinon.run.storage import MAGIC
from koinon.units import Seconds
from tests.nodes.leagues import Paced, Rehearsal, assert_whole, run_league, spec_of

SPEC = spec_of(1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Rehearsal:
    return run_league(SPEC, tmp_path_factory.mktemp("calm"), make_compute=Paced)


def interrupted(
    path: Path,
    replicas: int = 1,
    *,
    at: Callable[[RunState], bool],
    first: Callable[[Rehearsal], None] = lambda _league: None,
) -> RunState:
    """The state in which a league was when everything vanished, as soon as `at` held. `first` comes before that."""

    async def go() -> RunState:
        league = await Rehearsal(spec_of(replicas), path, make_compute=Paced).__aenter__()
        first(league)
        await league.until(at)
        await league.vanish()
        return league.state

    return run_virtual(go())


def resumed(path: Path, replicas: int = 1) -> Rehearsal:
    return run_league(spec_of(replicas), path, make_compute=Paced, resume=True)


def at_step(step: int) -> Callable[[RunState], bool]:
    return lambda state: state.step == step


def snapshots(path: Path, step: int) -> list[Path]:
    return sorted(path.glob(f"seats/*/step-{step:08d}.safetensors"))


def damage(path: Path) -> None:
    """Flip a bit of the last number: the file still reads, and its label still says what it was."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("moment", [0.0, 0.15, 0.21, 0.3, 0.5, 0.75, 1.0, 1.3, 1.6, 1.9, 2.2, 3.0])
def test_a_league_that_vanished_at_any_moment_goes_on_with_the_same_losses(
    tmp_path: Path, undisturbed: Rehearsal, moment: float, replicas: int
) -> None:
    async def go() -> None:
        league = await Rehearsal(spec_of(replicas), tmp_path, make_compute=Paced).__aenter__()
        await asyncio.sleep(moment)
        await league.vanish()

    run_virtual(go())
    assert_whole(resumed(tmp_path, replicas), undisturbed.losses())


def test_it_vanishes_again_and_again(tmp_path: Path, undisturbed: Rehearsal) -> None:
    interrupted(tmp_path, at=at_step(1))
    for step in 2, 3:

        async def go(step: int = step) -> None:
            league = await Rehearsal(SPEC, tmp_path, make_compute=Paced, resume=True).__aenter__()
            await league.until(at_step(step))
            await league.vanish()

        run_virtual(go())
    league = resumed(tmp_path)
    assert_whole(league, undisturbed.losses())
    assert league.state.tally.resumes == 3


def test_a_run_that_was_complete_is_complete_after_a_resume(tmp_path: Path, undisturbed: Rehearsal) -> None:
    run_league(SPEC, tmp_path, make_compute=Paced)
    assert_whole(resumed(tmp_path), undisturbed.losses())


def test_a_stage_that_was_ahead_goes_back_and_nobody_is_credited_twice(tmp_path: Path, undisturbed: Rehearsal) -> None:
    state = interrupted(tmp_path, at=lambda state: state.stages[1].step == 3)
    assert [stage.step for stage in state.stages] == [2, 3], "one stage has taken the step, the other has not"
    league = resumed(tmp_path)
    assert [event.step for event in league.events if isinstance(event, ev.RunResumed)] == [2]
    assert_whole(league, undisturbed.losses())
    assert league.state.credit == undisturbed.state.credit


def test_a_stage_that_was_founded_alone_does_not_keep_the_run_from_resuming(
    tmp_path: Path, undisturbed: Rehearsal
) -> None:
    def slow_down_one(league: Rehearsal) -> None:
        league.hub.set_faults(league.address.peer, league.workers[1, 0].transport.me, Faults(delay=Seconds(0.2)))

    state = interrupted(tmp_path, at=lambda state: any(stage.versions for stage in state.stages), first=slow_down_one)
    assert sorted(bool(stage.versions) for stage in state.stages) == [False, True]
    assert_whole(resumed(tmp_path), undisturbed.losses())


def test_one_damaged_snapshot_of_two_costs_nothing(tmp_path: Path, undisturbed: Rehearsal) -> None:
    interrupted(tmp_path, 2, at=at_step(3))
    damage(snapshots(tmp_path, 3)[0])
    league = resumed(tmp_path, 2)
    assert [event.step for event in league.events if isinstance(event, ev.RunResumed)] == [3]
    assert_whole(league, undisturbed.losses())


def test_all_snapshots_of_the_newest_step_damaged_cost_that_step(tmp_path: Path, undisturbed: Rehearsal) -> None:
    interrupted(tmp_path, 2, at=at_step(3))
    for path in snapshots(tmp_path, 3):
        damage(path)
    league = resumed(tmp_path, 2)
    assert [event.step for event in league.events if isinstance(event, ev.RunResumed)] == [2]
    assert_whole(league, undisturbed.losses())


def test_a_snapshot_cut_short_is_a_damaged_one(tmp_path: Path, undisturbed: Rehearsal) -> None:
    interrupted(tmp_path, at=at_step(3))
    half = snapshots(tmp_path, 3)[0]
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    assert_whole(resumed(tmp_path), undisturbed.losses())


def test_without_any_snapshot_it_says_which_stage_has_none(tmp_path: Path) -> None:
    interrupted(tmp_path, at=at_step(3))
    for path in tmp_path.glob("seats/01-*/*.safetensors"):
        path.unlink()
    with pytest.raises(NothingToResume, match=r"stages \[1\] have no snapshot .* Bring back the seats/ folders"):
        resumed(tmp_path)


def test_one_kept_snapshot_is_enough_when_a_stage_was_ahead(tmp_path: Path, undisturbed: Rehearsal) -> None:
    spec = spec_of(1, train={"keep_snapshots": 1})

    async def go() -> None:
        league = await Rehearsal(spec, tmp_path, make_compute=Paced).__aenter__()
        await league.until(lambda state: state.stages[1].step == 3)
        await league.vanish()

    run_virtual(go())
    assert_whole(run_league(spec, tmp_path, make_compute=Paced, resume=True), undisturbed.losses())


@pytest.mark.parametrize("lost", [1, 7, 40, 200, 1000])
def test_a_log_cut_short_is_repaired_and_says_so(tmp_path: Path, undisturbed: Rehearsal, lost: int) -> None:
    interrupted(tmp_path, at=at_step(3))
    log = RunDir(tmp_path).log
    log.write_bytes(log.read_bytes()[:-lost])
    with reopen(RunDir(tmp_path)).log as opened:
        assert opened.repair is not None
        assert opened.repair.kept_in.exists()
    assert_whole(resumed(tmp_path), undisturbed.losses())


def test_a_log_damaged_in_the_middle_is_refused_and_left_alone(tmp_path: Path) -> None:
    interrupted(tmp_path, at=at_step(3))
    log = RunDir(tmp_path).log
    content = bytearray(log.read_bytes())
    content[len(MAGIC) + len(content) // 2] ^= 1
    log.write_bytes(content)
    with pytest.raises(LogCorrupt, match="damaged"):
        reopen(RunDir(tmp_path))
    assert log.read_bytes() == content


def _stepped(steps: dict[int, int]) -> RunState:
    """Two stages that were founded and have taken so many steps."""
    events: list[ev.Event] = [ev.RunOpened("r", "", "c", "c", 2, 4, "")]
    for stage, taken in steps.items():
        member = Member(stage)
        events += [ev.Seated(member, f"w{stage}", "a", stage, 0, ()), ev.SeatReady(member, 0, "root 0")]
        for step in range(taken):
            events.append(ev.ReduceOpened(stage, step, 0, (member,), (b"\x0f",)))
            events.append(ev.StageStepped(stage, step, 0, f"root {step + 1}", 0.0, 0.0))
    return fold(events)


@pytest.mark.parametrize(
    ("steps", "every", "expected"),
    [
        ({}, 1, 0),
        ({0: 3}, 1, 0),
        ({0: 5, 1: 4}, 1, 4),
        ({0: 5, 1: 5}, 3, 3),
        ({0: 13, 1: 14}, 8, 8),
        ({0: 2, 1: 2}, 9, 0),
    ],
)
def test_a_run_of_others_goes_back_to_the_newest_step_that_all_stages_have_kept(
    steps: dict[int, int], every: int, expected: int
) -> None:
    assert resume_point_elsewhere(_stepped(steps), every) == expected


def test_a_step_whose_roots_are_forgotten_is_not_resumed_from() -> None:
    with pytest.raises(NothingToResume, match="snapshot_every"):
        resume_point_elsewhere(_stepped({0: 29, 1: 29}), 20)
