"""No room on the disk: the run ends with one sentence that says what to do, and goes on as if nothing had been.

Real processes. Limits on the size of a file stand in for a full disk one file at a time (the system answers EFBIG where
a disk answers ENOSPC); a tiny file system of its own is full for everybody at once.
"""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from koinon.nodes.rundir import RunDir
from koinon.run.state import Phase, fold
from tests.processes import (
    assert_whole,
    cmdline,
    complete,
    events,
    family,
    finish,
    resume,
    spec_of,
    start_run,
    wait_for_step,
)


def limit(member: psutil.Process, size: int) -> None:
    """No file of that process grows beyond `size` any more."""
    member.rlimit(psutil.RLIMIT_FSIZE, (size, size))


def assert_one_sentence(error: str) -> None:
    """All that stands on stderr: what happened and what to do."""
    assert error.count("\n") == 1, error
    assert "room" in error
    assert "ree some" in error, "what to do"


def test_a_full_log_ends_the_run_with_a_sentence_and_it_resumes(tmp_path: Path, undisturbed: dict[int, float]) -> None:
    process = start_run(tmp_path, spec_of(2))
    wait_for_step(process, tmp_path, 2)
    limit(psutil.Process(process.pid), (tmp_path / "here" / "run.log").stat().st_size + 100)
    status, _, error = finish(process)
    assert status == 1
    assert_one_sentence(error)
    assert "run.log" in error
    assert "then resume" in error
    assert fold(events(tmp_path)).phase is Phase.TRAINING, "what was not written has not happened"
    complete(resume(tmp_path))
    assert_whole(tmp_path, undisturbed)


def test_a_full_disk_of_one_worker_ends_the_run_with_a_sentence_and_it_resumes(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    process = start_run(tmp_path, spec_of(2))
    wait_for_step(process, tmp_path, 2)
    worker = [member for member in family(process) if "koinon.nodes.zygote" in cmdline(member)][-1]
    limit(worker, 20_000)
    status, _, error = finish(process)
    assert status == 1
    assert_one_sentence(error)
    assert ".safetensors" in error
    state = fold(events(tmp_path))
    assert state.phase is Phase.FAILED
    complete(resume(tmp_path))
    assert_whole(tmp_path, undisturbed)


def test_data_that_finds_no_room_ends_before_the_run_begins_and_the_same_command_starts_it(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))

    status, _, error = finish(start_run(tmp_path, spec_of(1), preexec_fn=no_room))
    assert status == 1
    assert_one_sentence(error)
    assert "start again" in error
    assert not RunDir(tmp_path / "here").log.exists()
    complete(start_run(tmp_path, spec_of(1)))
    assert_whole(tmp_path, undisturbed)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB, mounted where the run shall lie."""
    here = tmp_path / "here"
    here.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", here], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"a file system can be mounted by root only: {mounted.stderr.strip()}")
    yield here
    subprocess.run(["umount", "--lazy", here], check=True)


def fill(folder: Path, leave: int = 0) -> Path:
    """Take all room that is left but for `leave` bytes; returns the file that takes it."""
    room = os.statvfs(folder)
    ballast = folder / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_bsize - leave)
    return ballast


@pytest.mark.slow
def test_a_disk_that_is_full_for_everybody_ends_the_run_with_a_sentence_and_it_resumes(
    tmp_path: Path, tiny_disk: Path, undisturbed: dict[int, float]
) -> None:
    process = start_run(tmp_path, spec_of(1))
    wait_for_step(process, tmp_path, 2)
    ballast = fill(tiny_disk)
    status, _, error = finish(process)
    assert status == 1
    assert_one_sentence(error)
    status, _, error = finish(resume(tmp_path))
    assert status == 1
    assert_one_sentence(error)
    ballast.unlink()
    complete(resume(tmp_path))
    assert_whole(tmp_path, undisturbed)


def test_a_disk_that_is_full_from_the_beginning_is_told_at_once(tmp_path: Path, tiny_disk: Path) -> None:
    fill(tiny_disk)
    status, _, error = finish(start_run(tmp_path, spec_of(1)))
    assert status == 1
    assert_one_sentence(error)
    assert not RunDir(tiny_disk).log.exists()


def test_workers_that_find_no_room_when_they_begin_say_so(
    tmp_path: Path, tiny_disk: Path, undisturbed: dict[int, float]
) -> None:
    ballast = fill(tiny_disk, leave=360 * 1024)  # enough for the data, and not for a snapshot of each stage
    status, _, error = finish(start_run(tmp_path, spec_of(1)))
    assert status == 1
    assert_one_sentence(error)
    assert ".safetensors" in error
    ballast.unlink()
    complete(resume(tmp_path))
    assert_whole(tmp_path, undisturbed)
