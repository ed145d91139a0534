"""Everything is killed with kill -9 at once, as when the power goes; a resumed run goes on as if nothing had been.

Real processes, real files. The same at every moment of a run, over the twin, is in tests/nodes/test_resume.py.
"""

from __future__ import annotations

from pathlib import Path
from subprocess import Popen

import pytest

from koinon.run import events as ev
from koinon.run.state import fold
from tests.processes import (
    STAGES,
    assert_whole,
    cmdline,
    complete,
    events,
    family,
    kill_all,
    resume,
    spec_of,
    start_run,
    wait_for_step,
    wait_until,
)


def resumes(folder: Path) -> list[int]:
    return [event.step for event in events(folder) if isinstance(event, ev.RunResumed)]


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_league_that_is_killed_whole_goes_on_from_its_last_committed_step(
    tmp_path: Path, undisturbed: dict[int, float], replicas: int
) -> None:
    process = start_run(tmp_path, spec_of(replicas))
    wait_for_step(process, tmp_path, 3)
    killed = kill_all(process)
    assert len(killed) >= 2 + replicas * STAGES, "control process, zygote and every worker"
    state = fold(events(tmp_path))
    assert not isinstance(events(tmp_path)[-1], ev.RunStopped), "nobody had the time to say anything"
    complete(resume(tmp_path))
    assert resumes(tmp_path) == [state.step]
    assert_whole(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_league_can_be_killed_twice_in_a_row_and_at_any_moment_of_a_resume(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    process = start_run(tmp_path, spec_of(1))
    wait_for_step(process, tmp_path, 2)
    kill_all(process)
    moments = (the_snapshots_are_read, the_resume_is_logged, a_step_was_taken)
    for moment in moments:
        before = events(tmp_path)
        process = resume(tmp_path)
        wait_until(process, lambda: moment(process, events(tmp_path)[len(before) :]))  # noqa: B023
        kill_all(process)
    complete(resume(tmp_path))
    assert len(resumes(tmp_path)) == len(moments), "the first was killed before it had written anything"
    assert_whole(tmp_path, undisturbed)


def the_snapshots_are_read(process: Popen[str], _since: list[ev.Event]) -> bool:
    return any("koinon.nodes.inventory" in cmdline(member) for member in family(process))


def the_resume_is_logged(_process: Popen[str], since: list[ev.Event]) -> bool:
    return any(isinstance(event, ev.RunResumed) for event in since)


def a_step_was_taken(_process: Popen[str], since: list[ev.Event]) -> bool:
    return any(isinstance(event, ev.StepMeasured) for event in since)
