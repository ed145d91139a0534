"""Files that are either whole or not there: written beside their place, synced, then renamed. Knows no format."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from koinon.errors import DiskFull

_NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


@contextmanager
def room(path: Path) -> Iterator[None]:
    """Turn "no space" from the system into DiskFull, which says where and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise DiskFull(
                f"No room to write {path}: free some space and start again; what is whole is kept."
            ) from error
        raise


def beside(path: Path) -> Path:
    """A name in the same folder, private to this process, to write to before the rename."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write `data` so that a reader sees the old file or the new one, never a part. Raises DiskFull."""
    temporary = beside(path)
    try:
        with room(path), temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
