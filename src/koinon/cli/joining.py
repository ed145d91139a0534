"""What a joiner sees of its own worker: one line that lives on a terminal, a line now and then anywhere else.

Knows nothing of processes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from koinon.nodes.needs import needs
from koinon.nodes.report import Report
from koinon.run.spec import RunSpec
from koinon.units import Bytes, Seconds

LINE_EVERY = Seconds(5.0)
WINDOW = Seconds(15.0)
"""Tokens per second are those of the last quarter of a minute."""
STYLES = {
    "joining": "yellow",
    "waiting": "yellow",
    "syncing": "yellow",
    "idle": "green",
    "working": "bold green",
    "ended": "default",
}


class Speed:
    """Tokens per second over the last reports. Pure: time is passed in."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def note(self, at: float, tokens: int) -> float:
        if self._seen and tokens < self._seen[-1][1]:
            self._seen.clear()  # a fresh process counts from nothing
        self._seen.append((at, tokens))
        while len(self._seen) > 2 and at - self._seen[0][0] > WINDOW.value:
            self._seen.popleft()
        (since, first), passed = self._seen[0], at - self._seen[0][0]
        return (tokens - first) / passed if passed > 0 and since < at else 0.0


def sentence(report: Report, spec: RunSpec, tokens_per_second: float) -> str:
    """A worker's state in one line."""
    place = "" if report.stage is None else f"stage {report.stage}, seat {report.seat}: "
    match report.state:
        case "waiting":
            return f"waiting for a seat: number {report.ticket}, place {report.position:,} in line; {report.waits_for}"
        case "syncing":
            whole = needs(spec)[report.stage or 0].state
            return f"{place}syncing, {Bytes(report.received)} of about {whole}"
        case "idle" | "working":
            done = f"step {report.step} of {spec.train.steps}, {report.items:,} items here"
            speed = f", {tokens_per_second:,.0f} tokens/s" if tokens_per_second else ""
            return f"{place}{report.state}, {done}{speed}"
        case _:
            return f"{place}{report.state}"


class JoinScreen(Protocol):
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def hear(self, report: Report) -> None:
        """What the worker does now."""

    def tell(self, text: str) -> None:
        """Something that happened."""


class LiveJoin:
    """The line is redrawn in place; what is told scrolls above it."""

    def __init__(self, spec: RunSpec, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        self._spec, self._console, self._now, self._speed = spec, console, now, Speed()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        self._live = Live(Text("starting"), console=self._console, auto_refresh=False, transient=True)
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def hear(self, report: Report) -> None:
        if self._live is not None:
            text = sentence(report, self._spec, self._speed.note(self._now(), report.tokens))
            self._live.update(Text(f"● {text}", STYLES.get(report.state, "default")), refresh=True)

    def tell(self, text: str) -> None:
        self._console.print(text)


class PlainJoin:
    """A line whenever the state changes, and from time to time while it works."""

    def __init__(self, spec: RunSpec, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        self._spec, self._console, self._now, self._speed = spec, console, now, Speed()
        self._state, self._line_at = "", -LINE_EVERY.value

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._state = ""

    def hear(self, report: Report) -> None:
        now = self._now()
        speed = self._speed.note(now, report.tokens)
        state = "working" if report.state == "idle" and report.items else report.state
        if state == "waiting":
            state = sentence(report, self._spec, 0.0)  # it may wait for hours: a line when something changes
        if state == self._state and (report.state == "waiting" or now - self._line_at < LINE_EVERY.value):
            return
        self._state, self._line_at = state, now
        self._console.print(sentence(report, self._spec, speed))

    def tell(self, text: str) -> None:
        self._console.print(text)


def join_screen(spec: RunSpec, console: Console) -> JoinScreen:
    able = console.is_terminal and not console.is_dumb_terminal
    return LiveJoin(spec, console) if able else PlainJoin(spec, console)
