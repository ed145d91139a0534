"""Files that are either whole or not there: written beside their place, synced, then renamed. Knows no format."""

from __future__ import annotations

import os
from pathlib import Path

from koinon.errors import room


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
