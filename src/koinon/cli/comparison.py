"""The league's losses beside those of one process that holds the whole model: same seed, same text, same steps.

Knows nothing of how either is computed.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Self

from rich.table import Table

from koinon.units import Seconds

ROWS = 8
EARLY = 20
"""Steps in which rounding has not grown yet: a work item lost or counted twice would show there at once."""
CLOSE = 1e-3
"""Nats. Sums in another order differ by less in the early steps; a wrong or missing work item by more."""


class OneProcess:
    """A process that repeats the run in `directory` beside the league. Use as an async context manager.

    It has the lowest priority: the league takes the processor first. `losses` fills as it goes.
    """

    def __init__(self, directory: Path) -> None:
        self.losses: dict[int, float] = {}
        self._directory = directory
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
        if self._reader is not None:
            await self._reader

    def begin(self) -> None:
        """Start, if it has not started. It must find the run's data in place."""
        if self._reader is None:
            self._reader = asyncio.create_task(self._read())

    async def finished(self, patience: Seconds) -> None:
        """Until it has taken all steps, or `patience` is over, whichever comes first."""
        if self._reader is not None:
            await asyncio.wait([self._reader], timeout=patience.value)

    async def _read(self) -> None:
        command = (sys.executable, "-m", "koinon.cli.single", str(self._directory), "--nice", "19")
        with (self._directory / "single.log").open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            told = json.loads(line)
            self.losses[told["step"]] = told["loss"]
        await self._process.wait()


def table(league: Mapping[int, float], single: Mapping[int, float]) -> Table:
    """Some of the steps that both have taken, the first and the last among them."""
    shown = Table(box=None, padding=(0, 3, 0, 0), header_style="grey62")
    for column in ("step", "league", "one process", "difference"):
        shown.add_column(column, justify="right")
    for step in evenly(sorted(league.keys() & single.keys()), ROWS):
        difference = abs(league[step] - single[step])
        shown.add_row(str(step + 1), f"{league[step]:.5f}", f"{single[step]:.5f}", f"{difference:.5f}")
    return shown


def verdict(league: Mapping[int, float], single: Mapping[int, float], dropped: int) -> str:
    """What the comparison shows, in a sentence or two."""
    both = league.keys() & single.keys()
    if not both:
        return "The one process took no step, so nothing can be compared: single.log in the run's folder says why."
    early, worst = (max(abs(league[step] - single[step]) for step in some) for some in (sorted(both)[:EARLY], both))
    means = abs(fmean(league[step] for step in both) - fmean(single[step] for step in both))
    found = (
        f"Largest difference: {early:.5f} in the first {min(EARLY, len(both))} steps, {worst:.5f} in all {len(both)}. "
        f"The mean losses differ by {means:.5f}."
    )
    if dropped:
        return f"{found} {dropped} work items were dropped, so the two did not compute the same."
    if early > CLOSE:
        return f"{found} That is more than adding in another order explains: please report it."
    return f"{found} The league adds in another order, and rounding grows from step to step; nothing else differs."


def evenly(steps: list[int], count: int) -> list[int]:
    """At most `count` of them, at equal distances, both ends included."""
    if len(steps) <= count:
        return steps
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]
