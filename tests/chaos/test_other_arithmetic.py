"""Replicas whose processors round differently hold the same bytes at every step.

Real processes: torch reads ATEN_CPU_CAPABILITY as it is loaded and then uses those instructions and no others.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from koinon import LocalSwarm
from koinon.cli.single import losses as losses_of_one_process
from koinon.nodes.rundir import RunDir
from koinon.nodes.syncer import snapshots, verified
from koinon.run import events as ev
from koinon.run.state import Phase
from tests.processes import STAGES, losses, spec_of

STEPS, COMPARED = 100, 10

SCRIPT = """
import torch
torch.manual_seed(0)
a, b = torch.randn(64, 64), torch.randn(64, 64)
print(torch.backends.cpu.get_cpu_capability(), float((a @ b).softmax(-1).pow(2).mean().mul(1e6)), float(a.exp().sum()))
"""


def arithmetic(capability: str) -> tuple[str, str]:
    """(what torch then uses, what it computes with it)."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    name, _, results = done.stdout.strip().partition(" ")
    return name, results


def test_replicas_with_other_instructions_keep_equal_roots_at_every_step(tmp_path: Path) -> None:
    (plain, slow), (wide, fast) = arithmetic("default"), arithmetic("avx2")
    if plain == wide or slow == fast:
        pytest.skip(f"this processor has one kind of arithmetic: {plain}, {wide}")
    other = {(stage, 1): {"ATEN_CPU_CAPABILITY": "default"} for stage in range(STAGES)}
    here = {(stage, 0): {"ATEN_CPU_CAPABILITY": "avx2"} for stage in range(STAGES)}
    # So many that the second replicas, whose processes load torch anew, are there for most of them.
    spec = spec_of(2, train={"steps": STEPS, "keep_snapshots": STEPS + 1})
    with LocalSwarm(spec, tmp_path, environments=other | here) as swarm:
        events = []
        for event in swarm.events():
            events.append(event)
            if isinstance(event, ev.StageStepped) and (event.stage, event.step) == (0, 0):
                processes = psutil.Process().children(recursive=True)
                kinds = {process.environ().get("ATEN_CPU_CAPABILITY") for process in processes}
        assert kinds >= {"default", "avx2"}
        assert swarm.state.phase is Phase.COMPLETE
    assert [event for event in events if isinstance(event, ev.Disputed | ev.ReduceAborted)] == []
    roots = {(event.stage, event.step + 1): event.root for event in events if isinstance(event, ev.StageStepped)}
    assert len(roots) == STAGES * STEPS
    held = [event for event in events if isinstance(event, ev.ReduceOpened)]
    assert all(any(len(reduce.members) == 2 for reduce in held if reduce.stage == stage) for stage in range(STAGES))
    seen = 0
    for (stage, _), folder in RunDir(tmp_path).seats().items():
        for path, label in snapshots(folder).items():
            if label.step > 0:
                assert label.root == roots[stage, label.step]
                assert verified(path, roots[stage, label.step])
                seen += 1
    assert seen >= sum(len(reduce.members) for reduce in held), "every member of every reduce"
    first = dict(itertools.islice(enumerate(losses_of_one_process(RunDir(tmp_path))), COMPARED))
    assert {step: losses(events)[step] for step in first} == pytest.approx(first, abs=1e-3), "the same run"
