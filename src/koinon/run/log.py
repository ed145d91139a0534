"""The run log on disk: append-only, hash-chained, signed, with one writer and any number of readers.

A crash leaves at most a half-written last record: it is cut off when the log is next opened, and kept beside it.
Damage with whole records behind it is not a crash, and refused. `append` returns when the operating system has the
bytes, so killing the process loses nothing that was appended; what must outlive a power cut is followed by `sync`.
A record that others were shown before a `sync` can be lost with the power: then ask them for it (`adopt`) before
signing another in its place, or begin a new term, or be convicted of two heads.
Knows nothing of what events mean: their codec is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Generic, Self, TypeVar

from koinon.errors import KoinonError, LogCorrupt, StateError, TermPassed
from koinon.run.logfile import LogFile, Repair
from koinon.run.reader import LogReader, Walk, check_magic, damage, decoded, follow
from koinon.run.record import (
    Equivocation,
    Follower,
    Head,
    Issuer,
    Record,
    Signer,
    check_equivocation,
    check_follows,
    check_signed,
    genesis,
    seal,
)
from koinon.run.storage import MAX_EVENT, Fault, pack_frame
from koinon.units import RunId

__all__ = [
    "Equivocation",
    "Follower",
    "Head",
    "LogReader",
    "Record",
    "Repair",
    "RunLog",
    "Signer",
    "check_equivocation",
    "follow",
]

E = TypeVar("E")


class RunLog(Generic[E]):
    """The single writer's hold on a log. A context manager; until it is closed nobody else can write.

    `head`: where the history stands. `term`: what the next record is signed under. `repair`: what opening had to cut.
    """

    def __init__(
        self, file: LogFile, key: Signer, *, run: RunId, encode: Callable[[E], bytes], decode: Callable[[bytes], E]
    ) -> None:
        """For `create` and `open`, which see to it that the file is whole and nobody else writes it."""
        self.run, self.head, self.term = run, genesis(run), 0
        self.repair: Repair | None = None
        self._file, self._key = file, key
        self._encode, self._decode = encode, decode

    @classmethod
    def create(
        cls, path: Path, key: Signer, *, run: RunId, encode: Callable[[E], bytes], decode: Callable[[bytes], E]
    ) -> Self:
        """A new, empty log. Raises RunExists if the file is there, NotARun if its directory is not, DiskFull."""
        return cls(LogFile.create(path), key, run=run, encode=encode, decode=decode)

    @classmethod
    def open(
        cls,
        path: Path,
        key: Signer,
        *,
        run: RunId,
        encode: Callable[[E], bytes],
        decode: Callable[[bytes], E],
        issuer: Issuer | None = None,
        repair: bool = True,
        every_signature: bool = False,
    ) -> Self:
        """An existing log, checked from its first byte.

        The chain is checked at every record, the signature at the last record of each term, which vouches for all
        before it; `every_signature` checks each. `issuer`: who signs in which term; by default `key` in all.
        Raises NotARun, LogInUse, LogCorrupt; with `repair=False` a half-written end is LogCorrupt too.
        """
        log = cls(LogFile.open(path), key, run=run, encode=encode, decode=decode)
        try:
            log._read_through(issuer or key.peer_id, repair=repair, every_signature=every_signature)
        except KoinonError:
            log.close()
            raise
        return log

    @property
    def path(self) -> Path:
        return self._file.path

    def append(self, event: E, *, sync: bool = False) -> Record:
        """Sign an event into the next place and write it. Errors as in `append_many`."""
        return self.append_many([event], sync=sync)[0]

    def append_many(self, events: Sequence[E], *, sync: bool = False) -> list[Record]:
        """Write several in one call to the system. When it returns they survive the process; with `sync`, the power.

        Raises DiskFull, or StateError if the disk fails otherwise; either leaves the log whole, and `head` says
        how many of the events it holds.
        """
        records, head = [], self.head
        for event in events:
            record = seal(head, self.term, self._packed(event), run=self.run, key=self._key)
            records.append(record)
            head = record.head
        self._write(records)
        if sync:
            self.sync()
        return records

    def adopt(self, records: Iterable[Record], *, issuer: Issuer) -> None:
        """Append records that their coordinator signed, as they are: a standby catches up with others' copies.

        Raises RecordRefused at the first that does not follow (those before it are kept), and as `append_many`.
        """
        for record in records:
            check_follows(self.head, record)
            check_signed(record, run=self.run, issuer=issuer)
            self._write([record])
            self.term = max(self.term, record.term)

    def cut_back(self, seq: int) -> Repair:
        """Go back to record `seq`: what lies behind it is kept beside the file. For the log of a coordinator that was
        replaced, whose last records nobody else had seen. Raises DiskFull, StateError."""
        self.head = self.record(seq).head if seq else genesis(self.run)
        self.term = self.head.term
        return self._file.cut_back(seq)

    def begin_term(self, term: int) -> None:
        """Sign under a higher term from now on. Raises TermPassed if the log has seen a later one."""
        if term < self.term:
            raise TermPassed(self.term, term)
        self.term = term

    def sync(self) -> None:
        """Return when the disk has all that was appended. After a failure the log takes nothing more: open it again."""
        self._file.sync()

    def record(self, seq: int) -> Record:
        """The record in place `seq`, 1 to `head.seq`, read anew from the disk. Raises LogCorrupt, IndexError."""
        if not 1 <= seq <= self.head.seq:
            raise IndexError(f"The log holds records 1 to {self.head.seq}, not {seq}.")
        frame = self._file.frame(seq - 1)
        if isinstance(frame, Fault):
            raise LogCorrupt(damage(self.path, seq, frame))
        return frame.record

    def records(self, from_seq: int = 1) -> Iterator[Record]:
        """Records from place `from_seq` to the head, including those appended meanwhile."""
        for seq in count(max(1, from_seq)):
            if seq > self.head.seq:
                return
            yield self.record(seq)

    def events(self, from_seq: int = 1) -> Iterator[E]:
        """The same, as events. Raises LogCorrupt at an event of a version that this one cannot read."""
        return (decoded(self.path, record, self._decode) for record in self.records(from_seq))

    def close(self) -> None:
        """Let others write. Twice is once."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _packed(self, event: E) -> bytes:
        packed = self._encode(event)
        if len(packed) > MAX_EVENT:
            raise StateError(f"An event of {len(packed)} bytes does not fit the run log ({MAX_EVENT} at most).")
        return packed

    def _read_through(self, issuer: Issuer, *, repair: bool, every_signature: bool) -> None:
        file = self._file
        if not check_magic(file.path, file.fd):
            file.begin()
            return
        walk = Walk(file.path, file.fd, self.run, issuer, self.head, every_signature=every_signature)
        file.starts.extend(start for start, _ in walk)
        file.end, self.head, self.term = walk.offset, walk.head, walk.head.term
        if walk.fault and not repair:
            raise LogCorrupt(f"{file.path} ends at byte {file.end} in a half-written record. Open it with repair.")
        if walk.fault:
            self.repair = file.cut()

    def _write(self, records: Sequence[Record]) -> None:
        held = self.head.seq
        try:
            self._file.grow([pack_frame(record) for record in records])
        finally:
            if written := len(self._file.starts) - held:
                self.head = records[written - 1].head
