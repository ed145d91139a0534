"""The file of a run log in the hands of its one writer: locked, grown record by record, never left half-written.

Knows where each record begins; knows nothing of hashes, keys or events.
"""

from __future__ import annotations

import fcntl
import os
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Self

from koinon.errors import NO_ROOM, DiskFull, LogInUse, NotARun, RunExists, StateError
from koinon.run.storage import MAGIC, Fault, Frame, frame_at


@dataclass(frozen=True, slots=True)
class Repair:
    """A half-written end was cut off when the log was opened; the cut bytes lie in `kept_in`."""

    bytes_dropped: int
    records_kept: int
    kept_in: Path

    def __str__(self) -> str:
        return (
            f"The run log ended in a half-written record: {self.bytes_dropped} bytes were cut and kept in "
            f"{self.kept_in.name}; {self.records_kept} whole records remain."
        )


class LogFile:
    """Holds the lock from construction to `close`. `starts`: offset of each whole record; `end`: of what comes next."""

    def __init__(self, path: Path, fd: int, lock: int) -> None:
        """For `create` and `open`."""
        self.path, self.fd = path, fd
        self.starts, self.end = array("Q"), len(MAGIC)
        self._lock = lock
        self._broken = ""

    @classmethod
    def create(cls, path: Path) -> Self:
        """A new file without records. Raises RunExists, LogInUse, NotARun (no such directory), DiskFull."""
        file = cls._opened(path, os.O_CREAT | os.O_EXCL)
        try:
            file.begin()
        except StateError:
            file.close()
            raise
        return file

    @classmethod
    def open(cls, path: Path) -> Self:
        """An existing file, not yet read. Raises NotARun, LogInUse."""
        return cls._opened(path, 0)

    @classmethod
    def _opened(cls, path: Path, flags: int) -> Self:
        lock = _lock(path)
        try:
            fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | flags, 0o644)
        except FileExistsError:
            os.close(lock)
            raise RunExists(f"{path} is there already: resume that run, or choose another directory.") from None
        except FileNotFoundError:
            os.close(lock)
            raise no_log_at(path) from None
        return cls(path, fd, lock)

    def begin(self) -> None:
        """Make the file an empty log that outlives a power cut."""
        try:
            os.truncate(self.fd, 0)
            os.write(self.fd, MAGIC)
            os.fsync(self.fd)
            _sync_directory(self.path.parent)
        except OSError as error:
            raise self._error(error) from error

    def frame(self, index: int) -> Frame | Fault:
        """The record with that index, from 0, as it lies on the disk now."""
        frame = frame_at(self.fd, self.starts[index], self.end)
        assert frame is not None, "every start lies before the end"
        return frame

    def grow(self, frames: Sequence[bytes]) -> None:
        """Write at the end. Raises DiskFull or StateError; then whole frames stay, for a reader may have seen them."""
        if self._broken:
            raise StateError(self._broken)
        data, written = memoryview(b"".join(frames)), 0
        try:
            while written < len(data):
                written += os.write(self.fd, data[written:])
        except OSError as error:
            self._count(frames, written)
            self._drop_partial()
            raise self._error(error) from error
        self._count(frames, written)

    def cut_back(self, records: int) -> Repair:
        """Keep that many records; set those behind aside, then take them off. Raises DiskFull, StateError."""
        self.end = self.starts[records] if records < len(self.starts) else self.end
        del self.starts[records:]
        return self.cut()

    def cut(self) -> Repair:
        """Set what lies behind the last whole record aside, and only then take it off. Raises DiskFull, StateError."""
        torn = os.pread(self.fd, os.fstat(self.fd).st_size - self.end, self.end)
        names = (self.path.with_name(f"{self.path.name}.torn-{n}") for n in count(1))
        kept_in = next(name for name in names if not name.exists())
        try:
            with kept_in.open("xb") as aside:
                aside.write(torn)
                aside.flush()
                os.fsync(aside.fileno())
            os.truncate(self.fd, self.end)
            os.fsync(self.fd)
        except OSError as error:
            raise self._error(error) from error
        return Repair(len(torn), len(self.starts), kept_in)

    def sync(self) -> None:
        """Return when the disk has everything. After a failure the file takes nothing more: open it again."""
        try:
            os.fsync(self.fd)
        except OSError as error:
            # The kernel may have dropped the dirty pages and report success next time (Rebello et al., ATC 2020).
            self._broken = f"{self.path}: a sync failed ({error.strerror}). Close the log and open it again."
            raise self._error(error) from error

    def close(self) -> None:
        """Let others write. Twice is once."""
        if self.fd >= 0:
            os.close(self.fd)
            os.close(self._lock)
            self.fd = self._lock = -1

    def _count(self, frames: Sequence[bytes], written: int) -> None:
        for frame in frames:
            written -= len(frame)
            if written < 0:
                return
            self.starts.append(self.end)
            self.end += len(frame)

    def _drop_partial(self) -> None:
        try:
            os.truncate(self.fd, self.end)
        except OSError as error:
            self._broken = f"{self.path}: a half-written record could not be cut ({error.strerror}). Open it again."

    def _error(self, error: OSError) -> StateError:
        if error.errno in NO_ROOM:
            return DiskFull(
                f"There is no room for the run log {self.path} ({error.strerror}); the {len(self.starts)} records in "
                f"it are intact. Free some space there, then resume the run."
            )
        return StateError(f"Writing the run log {self.path} failed: {error.strerror}. Check the disk, then resume.")


def no_log_at(path: Path) -> NotARun:
    return NotARun(f"There is no run log at {path}: start a run there, or name the directory of one.")


def _lock(path: Path) -> int:
    """Descriptor that holds the writer's lock: the system lets go of it however the process ends. Raises LogInUse."""
    try:
        lock = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except FileNotFoundError:
        raise NotARun(f"There is no directory {path.parent}: create it, or name the directory of a run.") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 32, 0).decode("ascii", "replace").strip()
        os.close(lock)
        raise LogInUse(str(path), int(holder) if holder.isdigit() else None) from None
    with suppress(OSError):  # on a full disk the number is missing and the lock holds all the same
        os.truncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def _sync_directory(directory: Path) -> None:
    """A new file's name outlives a power cut only when its directory has been written."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
