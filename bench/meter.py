"""CPU and wall time of a whole process tree, read from /proc. Linux only. Knows nothing of what the processes do.

A process counts with the children it has waited for, so work does not vanish with a process that ended meanwhile.
Resolution: one clock tick (10 ms) per process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Stat:
    """What /proc/<pid>/stat tells: the parent, and ticks in user and system mode, waited-for children included."""

    parent: int
    ticks: int

    @classmethod
    def parse(cls, line: str) -> Stat:
        """The second field is a name in brackets that may hold anything, so counting begins behind it."""
        fields = line.rpartition(")")[2].split()
        return cls(int(fields[1]), sum(map(int, fields[11:15])))


@dataclass(frozen=True, slots=True)
class Reading:
    """A moment, and the CPU seconds that the tree had used by then."""

    wall: float
    cpu: float

    def __sub__(self, earlier: Reading) -> Reading:
        return Reading(self.wall - earlier.wall, self.cpu - earlier.cpu)


def read_tree(root: int) -> Reading:
    """The process `root` and everything below it, now."""
    stats = dict(_all())
    ticks = sum(stats[pid].ticks for pid in below(root, {pid: stat.parent for pid, stat in stats.items()}))
    return Reading(time.perf_counter(), ticks / TICKS)


def below(root: int, parents: Mapping[int, int]) -> set[int]:
    """`root` and all its descendants."""
    children: dict[int, list[int]] = {}
    for pid, parent in parents.items():
        children.setdefault(parent, []).append(pid)
    found, open_ = set(), [root]
    while open_:
        pid = open_.pop()
        if pid in parents:
            found.add(pid)
            open_ += children.get(pid, [])
    return found


def _all() -> Iterable[tuple[int, Stat]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                yield int(folder.name), Stat.parse((folder / "stat").read_text())
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended between the listing and the reading
