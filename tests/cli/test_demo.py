"""The demonstration, on a real league that is small enough for a test."""

from __future__ import annotations

import asyncio
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from koinon.cli.comparison import EARLY
from koinon.cli.demo import remove_run, run_demo
from koinon.cli.history import History
from koinon.errors import UserError
from koinon.run.spec import RunSpec
from koinon.run.state import Phase

SPEC = RunSpec.recipe("tiny", overrides=[f"train.steps={EARLY + 4}", "league.replicas=2"])


def test_a_worker_dies_and_the_losses_are_those_of_one_process(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=100, soft_wrap=True, highlight=False, markup=False)
    taken = tmp_path / "demo"
    taken.mkdir()
    asyncio.run(run_demo(SPEC, taken, console, picture=tmp_path / "live.svg"))
    out = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("now the demo kills a worker", "killed by SIGKILL", "works again", "were dropped.", "\ndef ", "Next:"):
        assert part in out
    early, steps = re.search(r"Largest difference: ([\d.]+) in the first 20 steps, [\d.]+ in all (\d+)", out).groups()
    assert (float(early) < 1e-4, int(steps)) == (True, SPEC.train.steps)
    assert "nothing else differs" in out
    assert (tmp_path / "live.svg").exists()
    history = History(tmp_path / "demo-2")
    assert [state.phase for _, state in history.poll()][-1] is Phase.COMPLETE
    assert history.state.tally.vanished == 1


def test_only_a_run_that_nobody_works_on_is_removed(tmp_path: Path) -> None:
    remove_run(tmp_path / "nothing")
    (tmp_path / "letters").mkdir()
    with pytest.raises(UserError, match="holds no run"):
        remove_run(tmp_path / "letters")
    assert (tmp_path / "letters").exists()
