"""LocalSwarm as docs/how-to/python.md shows it: in scripts, with everything that can happen inside a `with` block.

Each test looks for processes that were left behind. Real processes; specs as small as they come.
"""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from koinon import LocalSwarm, RunSpec
from koinon.errors import (
    Contradiction,
    DiskFull,
    LogInUse,
    NotARun,
    RunExists,
    SpecError,
    StagesDoNotDivide,
    StateError,
    UnknownKey,
    UserError,
)
from koinon.nodes.rundir import RunDir
from koinon.run import events as ev
from koinon.run.state import Phase
from tests.processes import STAGES, STEPS, losses, spec_of


@pytest.fixture(autouse=True)
def nobody_left_behind() -> Iterator[None]:
    """No process below ours, and no thread of a swarm, outlives its `with` block."""
    yield
    assert psutil.Process().children(recursive=True) == []
    assert [thread for thread in threading.enumerate() if thread.name == "koinon"] == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    with LocalSwarm(spec_of(1), tmp_path_factory.mktemp("calm")) as swarm:
        return losses(list(swarm.events()))


def test_the_example_at_the_head_of_the_module_is_a_program(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
            from koinon import LocalSwarm

            with LocalSwarm("spec.toml", "runs/mine") as swarm:
                for event in swarm.events():
                    print(type(event).__name__)
                print(repr(swarm.sample("def ", tokens=4, seed=1)))
        """)
    )
    (tmp_path / "spec.toml").write_text(spec_of(1, train={"steps": 2}).to_toml())
    done = subprocess.run([sys.executable, program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    *kinds, sample = done.stdout.splitlines()
    assert kinds[0] == "RunOpened"
    assert kinds[-1] == "RunCompleted"
    assert kinds.count("StageStepped") == 2 * STAGES
    assert sample.startswith("'")


def test_leaving_early_stops_the_run_which_is_resumed_in_the_same_program(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    """Two swarms after each other, and a sample from the second."""
    with LocalSwarm(spec_of(2), tmp_path) as swarm:
        seen = []
        for event in swarm.events():
            seen.append(event)
            if isinstance(event, ev.StepMeasured) and event.step == 2:
                break
    assert swarm.state.phase is Phase.STOPPED
    assert swarm.state.reason == "the caller closed it"
    with LocalSwarm(None, tmp_path, resume=True) as again:
        later = list(again.events())
        assert again.train().phase is Phase.COMPLETE, "nobody waits for events that have all been read"
        assert later[: len(seen)] == seen, "every event of the log from its first"
        assert losses(later) == pytest.approx(undisturbed, abs=1e-4)
        text = again.sample("def ", tokens=5, seed=3)
        assert text == again.sample("def ", tokens=5, seed=3), "equal seeds give equal texts"
        with pytest.raises(UserError, match="prompt is empty"):
            again.sample("")
        assert text == "".join(again.stream("def ", tokens=5, seed=3))
    assert again.state.phase is Phase.COMPLETE


class Mishap(Exception):
    """Something of the caller's own."""


@pytest.mark.parametrize("error", [Mishap, KeyboardInterrupt])
def test_an_exception_inside_the_block_comes_out_and_the_run_says_what_ended_it(
    tmp_path: Path, error: type[BaseException]
) -> None:
    swarm = LocalSwarm(spec_of(1), tmp_path)

    def fail_inside() -> None:
        with swarm:
            next(iter(swarm.events()))
            raise error

    with pytest.raises(error):
        fail_inside()
    assert swarm.state.phase is Phase.STOPPED
    assert swarm.state.reason == f"the caller ended with {error.__name__}"


def test_ctrl_c_ends_a_program_that_waits_for_training(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
            from koinon import LocalSwarm

            with LocalSwarm("spec.toml", "here") as swarm:
                for event in swarm.events():
                    print(type(event).__name__, flush=True)
        """)
    )
    (tmp_path / "spec.toml").write_text(spec_of(1, train={"steps": 5000}).to_toml())
    process = subprocess.Popen([sys.executable, program], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    while b"StepMeasured" not in process.stdout.readline():
        assert process.poll() is None
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 1 + STAGES
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert error.rstrip().endswith(b"KeyboardInterrupt"), "as any program ends that does not catch it"
    assert psutil.wait_procs(family, timeout=60)[1] == []


@pytest.mark.parametrize(
    ("tables", "error", "sentence"),
    [
        ({"train": {"stepz": 3}}, UnknownKey, "did you mean `train.steps`"),
        ({"train": {"batch": 10, "microbatch": 4}}, Contradiction, "Set `batch` to 8"),
        ({"model": {"layers": 2, "stages": 3}}, StagesDoNotDivide, "Set `stages` to at most 2"),
        ({"train": {"steps": "many"}}, SpecError, "train.steps"),
    ],
)
def test_a_wrong_spec_is_refused_where_it_is_written(tables: dict, error: type[SpecError], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        RunSpec.of(**tables)


def test_what_cannot_begin_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"), LocalSwarm(tmp_path / "none.toml", tmp_path / "a"):
        raise AssertionError("it began")
    with pytest.raises(NotARun, match="There is no run in"), LocalSwarm(None, tmp_path / "b", resume=True):
        raise AssertionError("it began")
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


def test_one_directory_holds_one_run_and_has_one_league(tmp_path: Path) -> None:
    spec = spec_of(1, train={"steps": 1})
    with LocalSwarm(spec, tmp_path) as swarm:
        with pytest.raises(LogInUse, match="a run has one writer"), LocalSwarm(None, tmp_path, resume=True):
            raise AssertionError("two leagues in one directory")
        assert swarm.train().phase is Phase.COMPLETE
    with pytest.raises(RunExists, match="resume"), LocalSwarm(spec, tmp_path):
        raise AssertionError("it began")


def test_a_swarm_that_was_not_entered_says_how_it_is_used(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="context manager"):
        _ = LocalSwarm(spec_of(1), tmp_path).state


def test_a_worker_that_dies_when_the_log_has_no_room_lets_go_of_the_run(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    """Its end cannot be written down any more; the error comes out once, and the same program can go on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def lose_a_worker_and_all_room() -> None:
        with LocalSwarm(spec_of(1), tmp_path) as swarm:
            for event in swarm.events():
                if isinstance(event, ev.StepMeasured) and event.step == 2:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (RunDir(tmp_path).log.stat().st_size, hard))
                    swarm.kill(0, 0)
            swarm.train()

    try:
        with pytest.raises(DiskFull, match="then resume"):
            lose_a_worker_and_all_room()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with LocalSwarm(None, tmp_path, resume=True) as again:
        found = losses(list(again.events()))
    assert found == pytest.approx({step: undisturbed[step] for step in found}, abs=1e-4)
    assert len(found) >= STEPS - 1
