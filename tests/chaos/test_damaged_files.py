"""A run directory that the CLI made and that was then damaged: resumed with equal losses, or refused in one sentence.

What no resume may do is go on from something else without a word.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from koinon.errors import LogCorrupt
from koinon.nodes.control import reopen
from koinon.nodes.rundir import RunDir
from koinon.run import events as ev
from koinon.run.state import fold
from koinon.run.storage import MAGIC
from tests.processes import (
    assert_whole,
    complete,
    events,
    finish,
    kill_all,
    resume,
    spec_of,
    start_run,
    wait_for_step,
)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was killed after some steps."""
    folder = tmp_path_factory.mktemp("killed")
    process = start_run(folder, spec_of(1))
    wait_for_step(process, folder, 4)
    kill_all(process)
    return folder


@pytest.fixture
def copy(killed: Path, tmp_path: Path) -> Path:
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    return tmp_path


def snapshots(folder: Path) -> list[Path]:
    return sorted(folder.glob("here/seats/*/step-*.safetensors"))


def newest(folder: Path) -> list[Path]:
    """Of each stage, those of the step that the run stands at; and beyond, where a stage was ahead."""
    step = fold(events(folder)).step
    return [path for path in snapshots(folder) if int(path.stem.removeprefix("step-")) >= step]


def flip(path: Path, part: str, random: Random) -> None:
    """A byte of one tensor of that part: the file still reads, and its label still says what it was."""
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    tensors = json.loads(content[8 : 8 + length])
    start, end = random.choice([value["data_offsets"] for name, value in tensors.items() if name.startswith(part)])
    content[8 + length + random.randrange(start, end)] ^= 0xFF
    path.write_bytes(content)


def test_a_log_cut_at_any_place_opens_as_its_own_beginning(killed: Path, tmp_path: Path) -> None:
    whole, content = events(killed), (killed / "here/run.log").read_bytes()
    shutil.copytree(killed / "here", tmp_path / "here")
    directory, random = RunDir(tmp_path / "here"), Random(1)
    for _ in range(60):
        cut, garbage = random.randrange(len(MAGIC), len(content)), random.randbytes(random.choice((0, 0, 5, 300)))
        directory.log.write_bytes(content[:cut] + garbage)
        run = reopen(directory)
        run.log.close()
        found = events(tmp_path)
        assert found[1:] == whole[1 : len(found)], "nothing else; the first event is written anew if it was cut"


def test_a_log_with_a_flipped_byte_opens_as_its_own_beginning_or_is_refused(killed: Path, tmp_path: Path) -> None:
    whole, content = events(killed), (killed / "here/run.log").read_bytes()
    shutil.copytree(killed / "here", tmp_path / "here")
    directory, random, refused = RunDir(tmp_path / "here"), Random(2), 0
    for _ in range(60):
        spoilt = bytearray(content)
        spoilt[random.randrange(len(MAGIC), len(content))] ^= 1 << random.randrange(8)
        directory.log.write_bytes(spoilt)
        try:
            reopen(directory).log.close()
        except LogCorrupt:
            refused += 1
            assert directory.log.read_bytes() == spoilt, "it is left as it was"
        else:
            found = events(tmp_path)
            assert found == whole[: len(found)]
            assert len(found) < len(whole)
    assert refused > 40


def cut_a_third(folder: Path, _random: Random) -> None:
    log = folder / "here/run.log"
    log.write_bytes(log.read_bytes()[: -log.stat().st_size // 3])


def append_garbage(folder: Path, random: Random) -> None:
    with (folder / "here/run.log").open("ab") as log:
        log.write(random.randbytes(777))


def flip_the_newest_snapshots(folder: Path, random: Random) -> None:
    """Where the weights are sound, and still what they are computed with and updated from is not."""
    for path in newest(folder):
        flip(path, "momentum/" if "00-00" in str(path) else "frozen/", random)


@pytest.mark.parametrize(
    ("damages", "steps_lost"),
    [
        pytest.param((append_garbage, flip_the_newest_snapshots), 1, id="garbage in the log, newest snapshots flipped"),
        pytest.param((cut_a_third,), 0, id="a third of the log lost"),
    ],
)
def test_what_can_be_mended_is_mended_and_the_losses_are_equal(
    copy: Path, undisturbed: dict[int, float], damages: tuple[Callable[[Path, Random], None], ...], steps_lost: int
) -> None:
    for damage in damages:
        damage(copy, Random(3))
    stood_at = fold(events(copy)).step
    complete(resume(copy))
    assert_whole(copy, undisturbed)
    assert [event.step for event in events(copy) if isinstance(event, ev.RunResumed)] == [stood_at - steps_lost]
    assert list(copy.glob("here/run.log.torn-*")), "what was cut is kept"


def test_a_run_without_one_sound_snapshot_is_refused_and_left_as_it_was(copy: Path) -> None:
    for path in snapshots(copy):
        flip(path, "weights/", Random(4))
    before = events(copy)
    status, _, error = finish(resume(copy))
    assert status == 1
    assert error.count("\n") == 1
    assert "No step can be restored" in error
    assert "Bring back the seats/ folders" in error
    assert [event for event in events(copy)[len(before) :] if not isinstance(event, ev.RunStopped)] == []


def test_a_log_damaged_in_its_middle_is_refused_and_left_as_it_was(copy: Path) -> None:
    log = copy / "here/run.log"
    content = bytearray(log.read_bytes())
    content[len(content) // 2] ^= 1
    log.write_bytes(content)
    status, _, error = finish(resume(copy))
    assert status == 1
    assert error.count("\n") == 1
    assert "is damaged" in error
    assert "Restore it from" in error
    assert log.read_bytes() == content
