"""Where a run is shown: a live view on a terminal, plain lines anywhere else. Both are fed the same and show one board.

Knows nothing of leagues or signals.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.live import Live

from koinon.cli.board import Board
from koinon.cli.sentences import Tone
from koinon.cli.view import Preparation, absorptions, clock, render
from koinon.nodes.messages import Telemetry
from koinon.run import events as ev
from koinon.run.events import Member
from koinon.run.spec import RunSpec
from koinon.run.state import RunState
from koinon.units import Seconds

Clock = Callable[[], float]
LINE_EVERY = Seconds(2.0)
"""Plain lines of steps come no closer than that."""


class Screen(Protocol):
    """What shows a run. Enter it before the run starts; what it shows is brought up to date by `tick`."""

    board: Board

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def prepare(self, what: str, done: int, total: int) -> None:
        """The data is being made ready. May be called from another thread."""

    def hear(self, event: ev.Event, state: RunState) -> None:
        """One more event, with the state after it."""

    def tell(self, text: str, tone: Tone = Tone.NOTED) -> None:
        """Something that is not in the log."""

    def tick(self, telemetry: Mapping[Member, Telemetry]) -> None:
        """Some time has passed."""

    def leave(self) -> None:
        """Give the terminal back as it was: the process is about to end."""


class LiveScreen:
    """The whole terminal, redrawn at every tick; the last picture stays when it is over."""

    def __init__(self, spec: RunSpec, console: Console, now: Clock = time.time) -> None:
        self.board = Board(spec)
        self._console, self._now = console, now
        self._preparing: Preparation | None = None
        self._live = Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False)

    def __enter__(self) -> Self:
        self._live.start(refresh=False)
        self.tick({})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        width, height = self._console.size
        self._console.print(render(self.board, self._now(), width, min(height - 1, 32)))

    def prepare(self, what: str, done: int, total: int) -> None:
        self._preparing = Preparation(what, done, total)

    def hear(self, event: ev.Event, state: RunState) -> None:
        self._preparing = None
        self.board = self.board.heard(event, state)

    def tell(self, text: str, tone: Tone = Tone.NOTED) -> None:
        self.board = self.board.told(text, self._now(), tone)

    def tick(self, telemetry: Mapping[Member, Telemetry]) -> None:
        self.board = self.board.measured(telemetry)
        width, height = self._console.size
        self._live.update(render(self.board, self._now(), width, height, self._preparing), refresh=True)

    def leave(self) -> None:
        self._live.stop()


class PlainScreen:
    """Lines without control codes: steps from time to time, and every event of note."""

    def __init__(self, spec: RunSpec, console: Console, now: Clock = time.time) -> None:
        self.board = Board(spec)
        self._console, self._now = console, now
        self._told = 0
        self._preparing = ""
        self._line_at = 0.0
        self._since = now()  # what a resumed run did before is history, and was told then

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def prepare(self, what: str, done: int, total: int) -> None:
        if what != self._preparing:
            self._preparing = what
            self._say(f"Preparing the data: {what}.")

    def hear(self, event: ev.Event, state: RunState) -> None:
        self.board = self.board.heard(event, state)
        self._print_notes()
        if isinstance(event, ev.StepMeasured) and self._is_due(event):
            self._line_at = event.at
            self._print(event.at, step_line(self.board, event))

    def tell(self, text: str, tone: Tone = Tone.NOTED) -> None:
        self.board = self.board.told(text, self._now(), tone)
        self._print_notes()

    def tick(self, telemetry: Mapping[Member, Telemetry]) -> None:
        self.board = self.board.measured(telemetry)

    def leave(self) -> None:
        """Nothing was done to it."""

    def _is_due(self, event: ev.StepMeasured) -> bool:
        if event.at < self._since:
            return False
        is_last = event.step + 1 == self.board.spec.train.steps
        return is_last or event.at - self._line_at >= LINE_EVERY.value

    def _print_notes(self) -> None:
        for note in self.board.news(self._told):
            if note.at >= self._since:
                self._print(note.at, note.text)
        self._told = self.board.noted

    def _print(self, at: float, text: str) -> None:
        self._say(f"{clock(at - self.board.began):>7}  {text}")

    def _say(self, line: str) -> None:
        with suppress(BrokenPipeError):  # a run does not end because nobody listens any more
            self._console.print(line)


def step_line(board: Board, event: ev.StepMeasured) -> str:
    """A step in one line."""
    parts = [f"step {event.step + 1} of {board.spec.train.steps}", f"loss {event.loss:.4f}"]
    if per_second := board.tokens_per_second(event.at):
        parts.append(f"{per_second:,.0f} tokens/s")
    if board.bytes_per_token is not None:
        parts.append(f"{board.bytes_per_token:.1f} bytes per token on the wire ({board.compression:.0f} x less)")
    parts += absorptions(board.state)
    if left := board.seconds_left(event.at):
        parts.append(f"about {Seconds(left)} left")
    return ", ".join(parts)


def screen_for(spec: RunSpec, console: Console) -> Screen:
    """A live view where there is a terminal that can show one."""
    able = console.is_terminal and not console.is_dumb_terminal
    return LiveScreen(spec, console) if able else PlainScreen(spec, console)
