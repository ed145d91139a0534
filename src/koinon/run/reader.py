"""Reading a run log that another process may be writing, read-only.

A half-written last record is left for the next look. What is handed out has been checked: the hash chain at every
record, and the issuer's signature at the last record of each term within one look, which vouches for all before it.
Knows nothing of what events mean: their codec is handed in.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Generic, Self, TypeVar

import msgspec

from koinon.errors import LogCorrupt, RecordRefused
from koinon.run.logfile import no_log_at
from koinon.run.record import Head, Issuer, Record, check_follows, check_signed, genesis
from koinon.run.storage import MAGIC, Fault, Frame, frame_at, something_whole_after
from koinon.units import RunId, Seconds

E = TypeVar("E")
_LOOK = Seconds.ms(200)


@dataclass(slots=True)
class Walk:
    """One way through a log file from `offset`, where `head` stands. Exhaust it before trusting what it gave.

    Afterwards `offset` and `head` stand behind the last whole record; `fault` says why the walk did not end at the
    end of the file. Raises LogCorrupt at damage with whole records behind it, a broken chain or a bad signature.
    `issuer` None leaves signatures unchecked; `every_signature` checks each one (about 0.1 ms of CPU each).
    """

    path: Path
    fd: int
    run: RunId
    issuer: Issuer | None
    head: Head
    offset: int = len(MAGIC)
    every_signature: bool = False
    fault: Fault | None = None

    def __iter__(self) -> Iterator[tuple[int, Record]]:
        """Offsets and records, in order."""
        size = os.fstat(self.fd).st_size
        self.fault, last = None, None
        while isinstance(frame := frame_at(self.fd, self.offset, size), Frame):
            record = frame.record
            if last and (self.every_signature or last.term != record.term):
                self._check(last, signed=True)
            self._check(record, signed=False)
            start, self.offset, self.head, last = self.offset, frame.end, record.head, record
            yield start, record
        if last:
            self._check(last, signed=True)
        if isinstance(frame, Fault):
            if something_whole_after(self.fd, frame, size):
                raise LogCorrupt(damage(self.path, self.head.seq + 1, frame))
            self.fault = frame

    def _check(self, record: Record, *, signed: bool) -> None:
        try:
            if not signed:
                check_follows(self.head, record)
            elif self.issuer is not None:
                check_signed(record, run=self.run, issuer=self.issuer)
        except RecordRefused as refusal:
            raise LogCorrupt(forgery(self.path, self.offset, refusal)) from refusal


class LogReader(Generic[E]):
    """A reader's place in a log, starting behind record `after`: each `poll` gives what was written since the last."""

    def __init__(
        self, path: Path, *, run: RunId, decode: Callable[[bytes], E], issuer: Issuer | None = None, after: int = 0
    ) -> None:
        """Raises NotARun if there is no such file. `issuer` None: the chain is checked, signatures are not."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise no_log_at(path) from None
        self._walk = Walk(path, fd, run, issuer, genesis(run))
        self._decode, self._after = decode, after

    @property
    def head(self) -> Head:
        """The last whole record that a poll has seen."""
        return self._walk.head

    def poll(self) -> list[E]:
        """Events of the records that are whole by now. Raises LogCorrupt."""
        walk = self._walk
        if not check_magic(walk.path, walk.fd):
            return []
        if os.fstat(walk.fd).st_size < walk.offset:
            raise LogCorrupt(
                f"{walk.path} was cut back below record {self.head.seq}, which had been read. Read it anew."
            )
        seen = [record for _, record in walk]
        return [decoded(walk.path, record, self._decode) for record in seen if record.seq > self._after]

    def close(self) -> None:
        os.close(self._walk.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


async def follow(
    path: Path,
    *,
    run: RunId,
    decode: Callable[[bytes], E],
    issuer: Issuer | None = None,
    after: int = 0,
    every: Seconds = _LOOK,
) -> AsyncIterator[E]:
    """The events of a log as they are written, without end: looks every `every`. Errors as in `LogReader`."""
    with LogReader(path, run=run, decode=decode, issuer=issuer, after=after) as reader:
        while True:
            for event in reader.poll():
                yield event
            await asyncio.sleep(every.value)


def decoded(path: Path, record: Record, decode: Callable[[bytes], E]) -> E:
    try:
        return decode(record.event)
    except msgspec.DecodeError as error:
        raise LogCorrupt(
            f"{path}: record {record.seq} is signed and whole, but this version cannot read its event ({error}). "
            f"Use the version of koinon that wrote it."
        ) from error


def check_magic(path: Path, fd: int) -> bool:
    """Whether the file begins as a run log; False while it is too short to tell. Raises LogCorrupt if it is no log."""
    start = os.pread(fd, len(MAGIC), 0)
    if not MAGIC.startswith(start):
        raise LogCorrupt(f"{path}: byte 0 does not begin a run log of this version. It is left as it is.")
    return start == MAGIC


def damage(path: Path, seq: int, fault: Fault) -> str:
    return (
        f"{path}: record {seq} at byte {fault.offset} is damaged ({fault.reason}), and whole records follow it. "
        f"The file is left as it is. Restore it from the copy of a standby or a backup; or, to go on from record "
        f"{seq - 1} and give up all that came later, cut it there: truncate -s {fault.offset} {path}"
    )


def forgery(path: Path, offset: int, refusal: RecordRefused) -> str:
    return (
        f"{path}: {refusal} (byte {offset}.) The bytes are undamaged, so somebody wrote this on purpose, or the log "
        f"belongs to another run or key. It is left as it is: restore it from the copy of a standby or a backup."
    )
