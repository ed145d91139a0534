"""The commands as processes on a real, small league: stopped, resumed, watched, asked, sampled."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import psutil
import pytest

STEPS = 12
RUN = ("run", "tiny", "--set", f"train.steps={STEPS}", "--set", "train.eval_every=0", "--dir", "here")
KOINON = (sys.executable, "-c", "from koinon.cli.main import run; run()")


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*KOINON, *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """(status, output, errors), for which any traceback is a failure."""
    out, error = process.communicate()
    assert "Traceback" not in error, error
    return process.returncode, out, error


def koinon(folder: Path, *words: str) -> str:
    status, out, error = finish(start(folder, *words))
    assert status == 0, error
    return out


def read_until(stream: IO[str] | None, what: str) -> str:
    assert stream is not None
    for line in stream:
        if what in line:
            return line
    raise AssertionError(f"{what!r} never came")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """A run that was stopped with Ctrl-C after its first steps: the folder, the status, the rest of its output."""
    folder = tmp_path_factory.mktemp("runs")
    process = start(folder, *RUN)
    read_until(process.stdout, "step 1 of")
    process.send_signal(signal.SIGINT)
    status, out, _ = finish(process)
    return folder, status, out


@pytest.fixture(scope="module")
def resumed(stopped: tuple[Path, int, str]) -> tuple[Path, str, str]:
    """The same, resumed to its end as it was told to be, while somebody follows the log: folder, output, that log."""
    folder, _, out = stopped
    process = start(folder, *out.split("koinon ")[-1].split())
    read_until(process.stdout, "goes on from step")
    followed = koinon(folder, "log", "here", "--follow", "--json")
    status, out, _ = finish(process)
    assert status == 0
    return folder, out, followed


def test_ctrl_c_drains_and_says_how_to_go_on(stopped: tuple[Path, int, str]) -> None:
    _, status, out = stopped
    assert status == 130
    assert "Stopping:" in out
    assert f"of {STEPS}. Go on with: koinon run --resume here\n" in out
    assert "\x1b" not in out


def test_a_resumed_run_takes_every_step_that_was_left(resumed: tuple[Path, str, str]) -> None:
    _, out, followed = resumed
    assert f"The run is complete: {STEPS} steps." in out
    assert out.rstrip().endswith('koinon sample here "def "')
    events = [json.loads(line) for line in followed.splitlines()]
    kinds = [event["type"] for event in events]
    assert (kinds[0], kinds.count("RunStopped"), kinds.count("RunResumed"), kinds.count("RunCompleted")) == (
        "RunOpened",
        1,
        1,
        1,
    )
    losses = {event["step"]: event["loss"] for event in events if event["type"] == "StepMeasured"}
    assert sorted(losses) == list(range(STEPS))


def test_the_log_and_the_status_tell_of_it(resumed: tuple[Path, str, str]) -> None:
    folder, _, _ = resumed
    lines = koinon(folder, "log", "here").splitlines()
    assert "was opened" in lines[0]
    assert sum("The run was stopped (the user stopped it)" in line for line in lines) == 1
    told = json.loads(koinon(folder, "status", "here", "--json"))
    assert (told["phase"], told["step"], told["is_running"], told["absorbed"]["resumes"]) == (
        "complete",
        STEPS,
        False,
        1,
    )
    assert {account: credit["items"] for account, credit in told["credit"].items()} == {
        f"local-{stage}-0": STEPS * 4 for stage in range(3)
    }
    assert f"step      {STEPS} of {STEPS}" in koinon(folder, "status", "here")


def test_a_text_is_continued_through_the_stages_and_the_run_stays_complete(resumed: tuple[Path, str, str]) -> None:
    folder, _, _ = resumed
    text = koinon(folder, "sample", "here", "def ", "--tokens", "12", "--seed", "7")
    assert text.startswith("def ")
    assert len(text) > len("def \n")
    assert "nothing to resume" in koinon(folder, "run", "--resume", "here")


def test_a_second_signal_ends_at_once_and_leaves_nobody_behind(tmp_path: Path) -> None:
    process = start(tmp_path, *RUN)
    read_until(process.stdout, "workers are ready")
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 4  # the zygote and three workers
    process.send_signal(signal.SIGTERM)
    read_until(process.stdout, "Stopping:")
    process.send_signal(signal.SIGTERM)
    status, out, _ = finish(process)
    assert status == 128 + signal.SIGTERM
    assert "Go on with" not in out
    assert psutil.wait_procs(family, timeout=60)[1] == []
    assert "koinon run --resume here" in koinon(tmp_path, "status", "here")


def test_whoever_reads_only_the_beginning_is_no_error(resumed: tuple[Path, str, str]) -> None:
    folder, _, _ = resumed
    process = start(folder, "log", "here")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait() == 0
