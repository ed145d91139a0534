"""The run log: what was appended is there after any crash, and damage is never mistaken for history."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from koinon.errors import (
    DiskFull,
    LogCorrupt,
    LogGap,
    LogInUse,
    NotARun,
    RunExists,
    SignatureInvalid,
    StateError,
    TermPassed,
)
from koinon.run.log import follow
from koinon.run.logfile import LogFile
from koinon.run.record import genesis, seal
from koinon.run.storage import MAGIC, MAX_EVENT, pack_frame
from tests.run.note import KEY, OTHER_RUN, RUN, Note, create, decode, encode, key_of, notes, reader, reopen, texts_of
from tests.run.note import written as write_log

TEXTS = ["one", "two", "three", "x" * 40, "five"]
on_disk = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.log"


def test_what_is_appended_is_read_back_in_order(path: Path) -> None:
    with create(path) as log:
        first = log.append(Note("one"))
        rest = log.append_many(notes("two", "three"), sync=True)
        assert [record.seq for record in [first, *rest]] == [1, 2, 3]
        assert log.head == rest[-1].head
        assert texts_of(log) == ["one", "two", "three"]
        assert list(log.records(2)) == rest
    with reopen(path) as log:
        assert log.head == rest[-1].head
        assert log.repair is None
        log.append(Note("four"))
        assert texts_of(log) == ["one", "two", "three", "four"]


@on_disk
@given(batches=st.lists(st.lists(st.text(max_size=60), max_size=5), max_size=5), again=st.booleans())
def test_any_batches_make_one_history(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[str]], again: bool
) -> None:
    path = tmp_path_factory.mktemp("log") / "run.log"
    create(path).close()
    for batch in batches:
        with reopen(path) as log:
            log.append_many(notes(*batch))
    with reopen(path, every_signature=again) as log:
        assert texts_of(log) == [text for batch in batches for text in batch]


def test_a_log_cut_at_any_byte_opens_as_a_prefix_and_goes_on(path: Path) -> None:
    whole = write_log(path, TEXTS)
    ends = _ends(whole)
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends)
        with reopen(path) as log:
            assert texts_of(log) == TEXTS[:kept]
            torn = cut - ([len(MAGIC), *ends][kept] if cut > len(MAGIC) else cut)
            assert (log.repair.bytes_dropped if log.repair else 0) == torn
            log.append(Note("after"))
            assert texts_of(log) == [*TEXTS[:kept], "after"]


def test_the_bytes_that_are_cut_are_kept_beside_the_log(path: Path) -> None:
    whole = write_log(path, TEXTS)
    for number in (1, 2):
        path.write_bytes(whole[:-3])
        with reopen(path) as log:
            assert log.repair is not None
            assert log.repair.records_kept == len(TEXTS) - 1
            assert log.repair.kept_in.name == f"run.log.torn-{number}"
            assert path.read_bytes() + log.repair.kept_in.read_bytes() == whole[:-3]
            assert "half-written" in str(log.repair)


def test_without_repair_a_half_written_end_is_an_error_and_nothing_is_touched(path: Path) -> None:
    torn = write_log(path, TEXTS)[:-3]
    path.write_bytes(torn)
    with pytest.raises(LogCorrupt, match="half-written"):
        reopen(path, repair=False)
    assert path.read_bytes() == torn
    reopen(path).close()  # and the lock was let go


def test_a_flipped_byte_is_corruption_or_at_the_end_a_cut_and_never_another_history(path: Path) -> None:
    whole = write_log(path, TEXTS)
    last = _ends(whole)[-2]
    for at in range(len(whole)):
        for mask in (0x01, 0x80, 0xFF):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
            if at < last:
                with pytest.raises(LogCorrupt):
                    reopen(path)
            else:
                with reopen(path) as log:
                    assert log.repair is not None
                    assert texts_of(log) == TEXTS[:-1]


@on_disk
@given(data=st.data())
def test_any_damage_leaves_a_prefix_or_a_refusal(path: Path, data: st.DataObject) -> None:
    path.unlink(missing_ok=True)
    whole = write_log(path, TEXTS)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    path.write_bytes(whole[:start] + data.draw(st.binary(max_size=80)) + whole[stop:])
    try:
        with reopen(path) as log:
            found = texts_of(log)
    except LogCorrupt:
        found = []
    assert found == TEXTS[: len(found)]


def test_corruption_names_the_byte_and_what_to_do(path: Path) -> None:
    whole = write_log(path, TEXTS)
    second = _ends(whole)[0]
    path.write_bytes(whole[: second + 20] + b"?" + whole[second + 21 :])
    with pytest.raises(LogCorrupt, match=f"record 2 at byte {second}.*truncate -s {second}"):
        reopen(path)
    path.write_bytes(path.read_bytes()[:second])  # the remedy it names
    with reopen(path) as log:
        assert texts_of(log) == ["one"]


def test_zeros_behind_the_last_record_are_a_torn_end(path: Path) -> None:
    """What a file system may leave after a power cut."""
    whole = write_log(path, TEXTS)
    path.write_bytes(whole + bytes(4096))
    with reopen(path) as log:
        assert log.repair is not None
        assert log.repair.bytes_dropped == 4096
        assert texts_of(log) == TEXTS


@pytest.mark.parametrize("texts", [["a"], ["a", "b"]])
def test_a_record_by_another_key_is_corruption_even_with_a_good_checksum(path: Path, texts: list[str]) -> None:
    head = genesis(RUN)
    frames = []
    for text in texts:
        record = seal(head, 0, encode(Note(text)), run=RUN, key=key_of("impostor"))
        frames.append(pack_frame(record))
        head = record.head
    path.write_bytes(MAGIC + b"".join(frames))
    with pytest.raises(LogCorrupt, match="not signed"):
        reopen(path)


def test_records_exchanged_or_left_out_break_the_chain(path: Path) -> None:
    whole = write_log(path, TEXTS)
    ends = [len(MAGIC), *_ends(whole)]
    frames = [whole[start:end] for start, end in pairwise(ends)]
    for order in ([1, 0, 2, 3, 4], [0, 2, 3, 4], [0, 0, 1, 2, 3, 4], [1, 2, 3, 4], [0, 1, 2, 4]):
        path.write_bytes(MAGIC + b"".join(frames[n] for n in order))
        with pytest.raises(LogCorrupt):
            reopen(path)


def test_one_bad_signature_in_the_middle_is_found_when_asked_for(path: Path) -> None:
    first = seal(genesis(RUN), 0, encode(Note("a")), run=RUN, key=key_of("impostor"))
    second = seal(first.head, 0, encode(Note("b")), run=RUN, key=KEY)
    path.write_bytes(MAGIC + pack_frame(first) + pack_frame(second))
    with reopen(path) as log:  # the second signature vouches for what the first record says
        assert texts_of(log) == ["a", "b"]
    with pytest.raises(LogCorrupt, match="record 1 is not signed"):
        reopen(path, every_signature=True)


def test_a_log_of_another_run_or_another_file_is_refused_and_left_alone(path: Path) -> None:
    write_log(path, TEXTS)
    with pytest.raises(LogCorrupt, match="another run"):
        reopen(path, run=OTHER_RUN)
    path.write_bytes(b"# a text file\n")
    with pytest.raises(LogCorrupt, match="byte 0"):
        reopen(path)
    assert path.read_bytes() == b"# a text file\n"


def test_missing_and_existing_files_are_told_in_a_sentence(path: Path) -> None:
    with pytest.raises(NotARun):
        reopen(path)
    with pytest.raises(NotARun):
        reader(path)
    with pytest.raises(NotARun):
        create(path.parent / "nowhere" / "run.log")
    create(path).close()
    with pytest.raises(RunExists):
        create(path)


def test_a_second_writer_is_told_who_has_the_log(path: Path) -> None:
    with create(path), pytest.raises(LogInUse, match=f"process {os.getpid()}"):
        reopen(path)
    reopen(path).close()


def test_a_term_is_kept_and_never_goes_back(path: Path) -> None:
    with create(path) as log:
        log.append(Note("a"))
        log.begin_term(3)
        assert log.append(Note("b")).term == 3
    with reopen(path) as log:
        assert log.term == 3
        with pytest.raises(TermPassed):
            log.begin_term(2)


def test_a_standby_adopts_what_the_coordinator_signed_and_goes_on_in_the_next_term(path: Path, tmp_path: Path) -> None:
    successor = key_of("successor")
    with create(path) as log, create(tmp_path / "copy.log", key=successor) as copy:
        log.append_many(notes("a", "b", "c"))
        records = list(log.records())
        with pytest.raises(LogGap):
            copy.adopt(records[1:], issuer=KEY.peer_id)
        with pytest.raises(SignatureInvalid):
            copy.adopt(records, issuer=successor.peer_id)
        copy.adopt(records, issuer=KEY.peer_id)
        assert copy.head == log.head
        copy.begin_term(1)
        copy.append(Note("d"))
    issuers = {0: KEY.peer_id, 1: successor.peer_id}.get
    with reopen(tmp_path / "copy.log", key=successor, issuer=issuers) as copy:
        assert texts_of(copy) == ["a", "b", "c", "d"]
    with pytest.raises(LogCorrupt, match="not signed"):
        reopen(tmp_path / "copy.log", key=successor)


def test_a_record_out_of_range_is_an_index_error(path: Path) -> None:
    with create(path) as log:
        log.append(Note("a"))
        for seq in (-1, 0, 2):
            with pytest.raises(IndexError):
                log.record(seq)
        assert list(log.records(2)) == []


def test_an_event_of_an_unknown_kind_is_named_not_skipped(path: Path) -> None:
    with create(path, encode=lambda note: b"\xc0") as log:
        log.append(Note("a"))
        with pytest.raises(LogCorrupt, match="record 1 is signed and whole"):
            list(log.events())


def test_an_event_that_would_not_fit_is_refused_before_it_is_written(path: Path) -> None:
    with create(path) as log:
        with pytest.raises(StateError, match="does not fit"):
            log.append(Note("x" * (MAX_EVENT + 1)))
        log.append(Note("x" * (MAX_EVENT - 100)))
    with reopen(path) as log:
        assert log.head.seq == 1


def test_damage_on_the_disk_while_the_log_is_open_is_seen_on_reading(path: Path) -> None:
    whole = write_log(path, TEXTS)
    with reopen(path) as log:
        with path.open("r+b") as file:
            file.seek(_ends(whole)[1] + 30)
            file.write(b"????")
        with pytest.raises(LogCorrupt, match="record 3"):
            texts_of(log)


# --- a full disk


@pytest.fixture
def file_limit() -> Iterator[Callable[[int], None]]:
    """Sets the largest size of a file for this process, and takes it back."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_on_a_full_disk_the_log_stays_whole_and_goes_on_when_there_is_room(
    path: Path, file_limit: Callable[[int], None]
) -> None:
    whole = write_log(path, TEXTS)
    for room in (0, 1, 7, 8, 100):
        path.write_bytes(whole)
        with reopen(path) as log:
            file_limit(len(whole) + room)
            with pytest.raises(DiskFull, match=f"the {len(TEXTS)} records in it are intact"):
                log.append(Note("y" * 200))
            assert path.read_bytes() == whole
            assert log.head.seq == len(TEXTS)
            file_limit(resource.RLIM_INFINITY)
            log.append(Note("after"))
        with reopen(path) as log:
            assert log.repair is None
            assert texts_of(log) == [*TEXTS, "after"]


def test_of_a_batch_that_does_not_fit_the_whole_records_stay(path: Path, file_limit: Callable[[int], None]) -> None:
    whole = write_log(path, TEXTS)
    path.unlink()
    with create(path) as log:
        file_limit(_ends(whole)[2] + 5)
        with pytest.raises(DiskFull):
            log.append_many(notes(*TEXTS))
        file_limit(resource.RLIM_INFINITY)
        assert log.head.seq == 3
        assert texts_of(log) == TEXTS[:3]
        log.append_many(notes(*TEXTS[3:]))
    assert path.read_bytes() == whole


# --- killed writers

WRITER = """
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from tests.run.note import Note, reopen, notes
with reopen(Path(sys.argv[1])) as log:
    while True:
        n = log.head.seq
        log.append_many(notes(*(f"{i} " + "z" * (i * 37 % 900) for i in range(n, n + 1 + n % 4))))
        sys.stdout.write(f"{log.head.seq}\\n")
        sys.stdout.flush()
"""


def test_kill_9_of_the_writer_loses_nothing_that_was_acknowledged(path: Path) -> None:
    create(path).close()
    root = Path(__file__).parents[2]
    for patience in (1, 2, 3, 20, 150):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, cwd=root)
        assert writer.stdout is not None
        acknowledged = [int(writer.stdout.readline()) for _ in range(patience)]
        writer.kill()
        acknowledged += [int(line) for line in writer.stdout.read().split(b"\n")[:-1]]
        writer.wait()
        writer.stdout.close()
        with reopen(path, every_signature=True) as log:
            assert acknowledged[-1] <= log.head.seq <= acknowledged[-1] + 4
            assert [text.split()[0] for text in texts_of(log)] == [str(i) for i in range(log.head.seq)]


# --- readers of a live log


def test_a_reader_sees_records_as_they_become_whole(path: Path) -> None:
    whole = write_log(path, TEXTS)
    ends = _ends(whole)
    path.write_bytes(b"")
    with reader(path) as live, path.open("r+b", buffering=0) as file:
        seen: list[str] = []
        for at in range(len(whole)):
            file.write(whole[at : at + 1])
            seen += [note.text for note in live.poll()]
            assert seen == TEXTS[: sum(end <= at + 1 for end in ends)]
        assert live.head.seq == len(TEXTS)


def test_a_reader_can_start_behind_what_it_knows(path: Path) -> None:
    write_log(path, TEXTS)
    with reader(path, after=3) as live:
        assert [note.text for note in live.poll()] == TEXTS[3:]


def test_a_reader_does_not_hand_out_what_the_issuer_did_not_sign(path: Path) -> None:
    with create(path) as log, reader(path) as live:
        log.append(Note("a"))
        assert len(live.poll()) == 1
        forged = seal(log.head, 0, encode(Note("b")), run=RUN, key=key_of("impostor"))
        with path.open("ab") as file:
            file.write(pack_frame(forged))
        with pytest.raises(LogCorrupt):
            live.poll()


def test_a_reader_notices_that_what_it_read_was_taken_back(path: Path) -> None:
    whole = write_log(path, TEXTS)
    with reader(path) as live:
        live.poll()
        os.truncate(path, _ends(whole)[0])
        with pytest.raises(LogCorrupt, match="cut back"):
            live.poll()


def test_following_yields_events_as_they_are_written(path: Path) -> None:
    async def scenario() -> list[str]:
        with create(path) as log:
            log.append(Note("a"))
            seen = []
            async for note in follow(path, run=RUN, decode=decode, issuer=KEY.peer_id):
                seen.append(note.text)
                if len(seen) == 4:
                    return seen
                log.append(Note(note.text + "+"))
        raise AssertionError("a log is followed without end")

    assert asyncio.run(scenario()) == ["a", "a+", "a++", "a+++"]


def _ends(whole: bytes) -> list[int]:
    """Where each record ends, by the lengths in front of them."""
    ends, at = [], len(MAGIC)
    while at < len(whole):
        at += 8 + int.from_bytes(whole[at : at + 4], "big")
        ends.append(at)
    return ends


def test_a_disk_that_refuses_to_sync_or_to_cut_gets_nothing_more(tmp_path: Path) -> None:
    """/dev/full: writing finds no room, and neither syncing nor truncating works."""
    for first_failure, kind in ((LogFile.sync, StateError), (lambda file: file.grow([b"frame"]), DiskFull)):
        file = LogFile(Path("/dev/full"), os.open("/dev/full", os.O_RDWR), os.open(tmp_path, os.O_RDONLY))
        with pytest.raises(kind):
            first_failure(file)
        with pytest.raises(StateError, match="pen it again"):
            file.grow([b"frame"])
        assert len(file.starts) == 0
        file.close()
        file.close()
