"""Real leagues as a user starts them: `koinon` as a process, its workers below it, and what lies on the disk.

Knows nothing of what a test does to them.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from koinon.nodes.rundir import RunDir
from koinon.run import events as ev
from koinon.run.reader import LogReader
from koinon.run.spec import RunSpec
from koinon.run.state import Phase, RunState, fold
from koinon.units import RunId

KOINON = (sys.executable, "-c", "from koinon.cli.main import run; run()")
STEPS, STAGES, MICROBATCHES = 10, 2, 16


def spec_of(replicas: int = 1, **tables: dict[str, object]) -> RunSpec:
    """The same text and the same losses for any number of replicas. `tables` override single keys."""
    model = {"size": 32, "layers": 2, "stages": STAGES, "context": 32, "rank": 4, "codec": "fp32", "table": 64}
    train = {"steps": STEPS, "batch": MICROBATCHES, "microbatch": 1, "eval_every": 0, "eval_sequences": 4}
    return RunSpec.of(
        name="here",
        seed=5,
        model=model,
        train=train | tables.get("train", {}),
        optim=tables.get("optim", {}),
        league={"replicas": replicas},
        data={"max_bytes": 100_000},
    )


def start(folder: Path, *words: str, **options: object) -> subprocess.Popen[str]:
    """`koinon WORDS` in a folder."""
    return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
        [*KOINON, *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1, **options
    )


def start_run(folder: Path, spec: RunSpec, **options: object) -> subprocess.Popen[str]:
    (folder / "spec.toml").write_text(spec.to_toml())
    return start(folder, "run", "spec.toml", "--dir", "here", **options)


def resume(folder: Path, **options: object) -> subprocess.Popen[str]:
    return start(folder, "run", "--resume", "here", **options)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """(status, output, errors), for which any traceback is a failure."""
    out, error = process.communicate()
    assert "Traceback" not in out + error, out + error
    return process.returncode, out, error


def complete(process: subprocess.Popen[str]) -> str:
    """The output of a process that must end well."""
    status, out, error = finish(process)
    assert status == 0, out + error
    return out


def events(folder: Path) -> list[ev.Event]:
    """Everything in the log of the run in FOLDER/here; nothing while there is none."""
    directory = RunDir(folder / "here")
    if not directory.log.exists():  # it is made last
        return []
    run = RunId(RunSpec.load(directory.spec).run_id)
    with LogReader(directory.log, run=run, decode=ev.decode) as reader:
        return reader.poll()


def losses(events: list[ev.Event]) -> dict[int, float]:
    return {event.step: event.loss for event in events if isinstance(event, ev.StepMeasured)}


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> RunState:
    """The state as soon as every stage has taken that many steps; a process that ends first is a failure."""
    wait_until(process, lambda: fold(events(folder)).step >= step)
    return fold(events(folder))


def wait_until(process: subprocess.Popen[str], holds: Callable[[], bool]) -> None:
    """Until something holds; a process that ends first is a failure."""
    while not holds():
        assert process.poll() is None, f"it ended too early: {finish(process)}"
        time.sleep(0.005)


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """A process and all below it, itself first."""
    head = psutil.Process(process.pid)
    return [head, *head.children(recursive=True)]


def cmdline(member: psutil.Process) -> list[str]:
    """Its command line; nothing once it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return member.cmdline()
    return []


def kill_all(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """kill -9 of the whole league; returns who was killed."""
    members = family(process)
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    _, alive = psutil.wait_procs(members, timeout=60)
    assert not alive
    process.communicate()
    return members


def assert_whole(folder: Path, undisturbed: dict[int, float]) -> RunState:
    """The run completed with these losses, and every item is in one committed set of each stage.

    A step that was committed and not yet measured when everything was killed has no loss in the log: only it may lack.
    """
    told = events(folder)
    state, found = fold(told), losses(told)
    assert state.phase is Phase.COMPLETE, state.reason
    resumed_at = {event.step - 1 for event in told if isinstance(event, ev.RunResumed)}
    assert set(undisturbed) - set(found) <= resumed_at
    assert found == pytest.approx({step: undisturbed[step] for step in found}, abs=1e-4)
    assert state.tally.items_dropped == 0
    for stage in range(STAGES):
        credit = [c.items for account, c in state.credit.items() if account.startswith(f"local-{stage}-")]
        assert sum(credit) == STEPS * MICROBATCHES, "each item is paid once"
    return state
