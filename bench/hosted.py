"""A real league on an emulated network: one process per node, each on a host of its own.

Hosts 1 to S are the stages' workers, host S + 1 the control process. Knows nothing of what is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from bench.wan import Wan
from koinon.nodes.control import stage_secret
from koinon.nodes.process import WorkerOptions
from koinon.run.spec import RunSpec

ROOT = Path(__file__).resolve().parents[1]
_NODES = [sys.executable, "-m", "bench.peers.hosted"]
_ONE_THREAD = {"OMP_NUM_THREADS": "1"}
_STREAMS: dict[str, Any] = {
    "cwd": ROOT,
    "env": _ONE_THREAD,
    "text": True,
    "stdin": subprocess.PIPE,
    "stdout": subprocess.PIPE,
}
_FAREWELL = 15.0
"""Seconds that the control process may take to drain."""


class LeagueFailed(RuntimeError):
    """The league ended under the measurement; the sentence says why."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step that was measured. `at`: on the machine's monotonic clock. Counts are since the league's start."""

    step: int
    at: float
    loss: float
    boundary_bytes: int
    """Frames that crossed a boundary, headers included, as the members told with their last heartbeats."""
    boundary_tokens: int
    recomputed_flops: int


class Hosted:
    """A league that is at work. `next_step` waits for the next one that it takes."""

    def __init__(self, control: subprocess.Popen[str], folder: Path) -> None:
        self._control, self._folder = control, folder

    def next_step(self) -> Step:
        return Step(**self.hear())

    def hear(self) -> dict[str, Any]:
        """The control process's next line. Raises LeagueFailed."""
        assert self._control.stdout is not None
        line = self._control.stdout.readline()
        told: dict[str, Any] = json.loads(line) if line else {"failed": "the control process ended"}
        if "failed" in told:
            raise LeagueFailed(f"{told['failed']}; {self._complaints()}")
        return told

    def overrun(self) -> float:
        """Seconds so far that jobs took beyond what a slower core would have taken, all workers together."""
        told = [path.read_text() for path in self._folder.glob("*/overrun")]
        return sum(float(text) for text in told if text)

    def _complaints(self) -> str:
        logs = {path.parent.name: path.read_text() for path in sorted(self._folder.glob("*/worker.log"))}
        return "; ".join(f"{name}: {text.strip().splitlines()[-1]}" for name, text in logs.items() if text.strip())


@contextmanager
def hosted(wan: Wan, spec: RunSpec, *, slower: float) -> Iterator[Hosted]:
    """The league of `spec` with one worker per stage, on cores `slower` times slower than this machine's.

    Its processes have ended when this is left.
    """
    with tempfile.TemporaryDirectory(prefix="koinon-wan-") as name:
        folder = Path(name)
        (folder / "spec.toml").write_text(spec.to_toml(), encoding="utf-8")
        host = spec.model.stages + 1
        command = ["control", str(folder / "run"), wan.address(host), str(folder / "spec.toml")]
        processes = [wan.popen(host, [*_NODES, *command], **_STREAMS)]
        try:
            league = Hosted(processes[0], folder)
            found = league.hear()
            seats = [
                (wan.namespace(stage + 1), msgspec.to_builtins(_options(wan, spec, stage, folder, found)))
                for stage in range(spec.model.stages)
            ]
            command = [*_NODES, "workers", str(slower), json.dumps(seats)]
            processes.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | _ONE_THREAD, text=True))
            yield league
        finally:
            _end(processes)


def _options(wan: Wan, spec: RunSpec, stage: int, folder: Path, found: dict[str, Any]) -> WorkerOptions:
    return WorkerOptions(
        directory=str(folder / f"stage-{stage}"),
        run=found["run"],
        coordinator=found["peer"],
        coordinator_addresses=tuple(found["addresses"]),
        account=f"host-{stage + 1}",
        stage=stage,
        secret=stage_secret(spec, stage).hex(),
        bind=f"{wan.address(stage + 1)}:0",
    )


def _end(processes: list[subprocess.Popen[str]]) -> None:
    """The control process first: it tells the workers that the run has stopped."""
    control, *others = processes
    assert control.stdin is not None
    control.stdin.close()
    _wait(control)
    for process in others:
        process.terminate()
        _wait(process)


def _wait(process: subprocess.Popen[str]) -> None:
    try:
        process.wait(_FAREWELL)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
