"""A joiner's folder: one worker at a time, told to leave by what is locked now and never by a stale number."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from koinon.errors import OtherRun, SeatInUse
from koinon.net.identity import NodeKey
from koinon.net.invitation import Invitation, invite
from koinon.nodes.tenancy import Tenancy
from koinon.units import RunId

HOLDER = """
import signal, sys, time
from pathlib import Path
from koinon.nodes.tenancy import Tenancy
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
with Tenancy(Path(sys.argv[1])).claimed():
    print("claimed", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "claimed\n"
    return process


def invitation(run: str, key: NodeKey) -> Invitation:
    return invite(key, run=RunId(run * 32), addresses=("127.0.0.1:1",), not_after=int(time.time()) + 99)


def test_a_second_worker_in_one_folder_is_told_who_is_there(tmp_path: Path) -> None:
    process = holder(tmp_path)
    with pytest.raises(SeatInUse, match=f"the seat of process {process.pid}") as refused, Tenancy(tmp_path).claimed():
        pass
    assert "koinon leave" in str(refused.value)
    process.kill()
    process.communicate()
    with Tenancy(tmp_path).claimed():
        pass


def test_leave_reaches_the_process_that_is_at_work_and_waits_for_it(tmp_path: Path) -> None:
    process = holder(tmp_path)
    assert Tenancy(tmp_path).leave()
    process.communicate(timeout=10)
    assert process.returncode == 7


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_number_of_a_process_that_is_gone_is_never_believed(tmp_path: Path, how: signal.Signals) -> None:
    process = holder(tmp_path)
    process.send_signal(how)
    process.communicate()
    (tmp_path / "at-work").write_text(f"{os.getpid()}\n")  # as if the number had been given to another
    assert not Tenancy(tmp_path).leave(), "this very process would have been told to end"


def test_nobody_leaves_a_folder_that_nobody_joined_from(tmp_path: Path) -> None:
    assert not Tenancy(tmp_path / "nowhere").leave()
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    key, tenancy = NodeKey.generate(), Tenancy(tmp_path)
    tenancy.keep(invitation("ab", key))
    tenancy.keep(invitation("ab", NodeKey.generate()))
    with pytest.raises(OtherRun, match="run ababababab, and the invitation is to run cdcdcdcdcd"):
        tenancy.keep(invitation("cd", key))
    assert tenancy.key().peer_id == tenancy.key().peer_id
