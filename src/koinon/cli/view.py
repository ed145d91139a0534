"""The live view: a board drawn for a terminal of a given size. Pure. Knows nothing of where it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.align import Align
from rich.box import ROUNDED
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from koinon.cli.board import Board, Cell, Note
from koinon.cli.curve import Line, Mark, chart
from koinon.cli.sentences import Tone
from koinon.run.state import Phase, RunState, SeatStatus
from koinon.units import Bytes, Seconds

TRAINING, HELDOUT, LOST = "cyan", "bold yellow", "bold red"
QUIET = "grey62"
STYLES = {Tone.GOOD: "green", Tone.NOTED: "default", Tone.BAD: "red", Tone.ROUTINE: QUIET}
SEATS: dict[str, tuple[str, str]] = {
    "empty": ("○", "grey42"),
    SeatStatus.SYNCING.value: ("◐", "yellow"),
    SeatStatus.ATTENDING.value: ("◑", "yellow"),
    SeatStatus.READY.value: ("●", "green"),
    SeatStatus.DRAINING.value: ("◕", "cyan"),
    SeatStatus.UNREACHABLE.value: ("◌", "magenta"),
    SeatStatus.LEFT.value: ("✕", "bold red"),
}
"""Sign and style of each word of a cell: told apart without colours too."""
PHASES: dict[Phase, str] = {
    Phase.TRAINING: "bold green",
    Phase.COMPLETE: "bold cyan",
    Phase.STOPPED: "bold yellow",
    Phase.FAILED: "bold red",
}
PHASE_WORDS = {Phase.PROPOSED: "starting"}
"""For people who start a run on their own machine: nobody has to fund it."""
CELL = 23
"""Columns of a cell of the grid."""
MIDDLE = 40
"""Least columns of either, side by side."""
AIRY = 28
"""Rows from which blank ones are affordable."""
WIDE = 96
"""Columns from which the curve and the grid stand side by side."""


@dataclass(frozen=True, slots=True)
class Preparation:
    """How far the data is: `done` of `total` bytes of text; `total` 0 where it is not known."""

    what: str
    done: int
    total: int

    def __str__(self) -> str:
        of = f" of {Bytes(self.total)}" if self.total else ""
        return f"{self.what}: {Bytes(self.done)}{of}"


def render(board: Board, now: float, width: int, height: int, preparing: Preparation | None = None) -> RenderableType:
    """The whole view, `width` columns wide and at most `height` rows high. From 60 x 16 on everything has its place."""
    air = [Text()] if height >= AIRY else []
    top = [header(board, now), progress(board, now, preparing), *air]
    facts = [*air, speed(board, now), wire(board), absorbed(board.state)]
    cells = board.grid(now)
    room = height - len(top) - len(facts)
    notes_rows = max(3, min(10, room // 3 if width >= WIDE else room // 4))
    middle = _middle(board, cells, now, width, room - notes_rows)
    return Group(*top, middle, *facts, notes(board, notes_rows - 2))


def header(board: Board, now: float) -> RenderableType:
    """Name, phase, step, time."""
    row = Table.grid(expand=True)
    row.add_column()
    row.add_column(justify="right")
    phase = board.state.phase
    word = (PHASE_WORDS.get(phase, phase.value), PHASES.get(phase, QUIET))
    row.add_row(
        Text.assemble((" koinon ", "reverse bold"), f"  {board.spec.name}  ", word),
        Text.assemble(
            f"step {board.state.step} of {board.spec.train.steps}", (f"   {clock(board.elapsed(now))} ", QUIET)
        ),
    )
    return row


def progress(board: Board, now: float, preparing: Preparation | None) -> RenderableType:
    """A bar, and what it waits for or how long it will take."""
    row = Table.grid(expand=True, padding=(0, 1))
    row.add_column(ratio=1)
    row.add_column(justify="right")
    share, text = _progress(board, now, preparing)
    bar = ProgressBar(total=1.0, completed=share or 0.0, pulse=share is None, animation_time=now)
    row.add_row(bar, Text(text, QUIET))
    return row


def _progress(board: Board, now: float, preparing: Preparation | None) -> tuple[float | None, str]:
    if preparing is not None:
        return (preparing.done / preparing.total if preparing.total else None), str(preparing)
    if board.state.phase in (Phase.PROPOSED, Phase.TRAINING) and not board.steps.seen:
        return None, f"starting: {board.ready} of {board.workers} workers are ready"
    if pauses := board.state.pauses:
        return board.share_done, f"paused for {clock(now - min(p.since for p in pauses))}: {_missing(board)}"
    left = board.seconds_left(now)
    ends = f"  about {Seconds(left)} left" if left and board.state.phase is Phase.TRAINING else ""
    return board.share_done, f"{board.share_done:.0%}{ends}"


def _missing(board: Board) -> str:
    """What a paused run waits for."""
    return ", ".join(f"nobody has stage {pause.stage} at step {pause.step}" for pause in board.state.pauses)


def speed(board: Board, now: float) -> Text:
    return one_line(" speed     ", (f"{board.tokens_per_second(now):,.0f} tokens/s", "bold"))


def wire(board: Board) -> Text:
    """What crosses boundaries, as measured."""
    on_wire, ratio = board.bytes_per_token, board.compression
    if on_wire is None or ratio is None:
        return one_line(" wire      ", ("nothing so far", QUIET))
    size, less = (f"{on_wire:.1f} bytes", "bold"), (f"{ratio:.0f} x less", "bold")
    return one_line(" wire      ", size, " per token, boundary and direction: ", less, " than fp32")


def absorbed(state: RunState) -> Text:
    """What went wrong and did not matter."""
    return one_line(" absorbed  ", ", ".join(absorptions(state)) or ("nothing so far", QUIET))


def one_line(*parts: str | tuple[str, str]) -> Text:
    """Cut where the terminal ends, so that the rows of a view can be counted."""
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")


def absorptions(state: RunState) -> list[str]:
    """The tally in words; what did not happen is left out."""
    tally = state.tally
    counts = (
        (tally.vanished, "worker lost", "workers lost"),
        (tally.unreachable, "time unreachable", "times unreachable"),
        (tally.items_released, "work item given to others", "work items given to others"),
        (tally.excluded, "contribution left out", "contributions left out"),
        (tally.reduces_aborted, "sum begun again", "sums begun again"),
        (tally.items_dropped, "work item dropped", "work items dropped"),
        (tally.resumes, "resume", "resumes"),
    )
    return [f"{count} {one if count == 1 else many}" for count, one, many in counts if count]


def notes(board: Board, rows: int) -> RenderableType:
    """The last of what happened."""
    shown = board.notes[-rows:] if rows > 0 else ()
    lines = [_note(note, board.began) for note in shown] + [Text()] * (rows - len(shown))
    return Panel(Group(*lines), title="what happened", title_align="left", box=ROUNDED, border_style=QUIET)


def _note(note: Note, began: float) -> Text:
    return one_line((f"{clock(note.at - began)}  ", QUIET), (note.text, STYLES[note.tone]))


def clock(seconds: float) -> str:
    """0:07, 12:34, 1:02:03."""
    minutes, second = divmod(max(0, int(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def grid(cells: Sequence[Sequence[Cell]], now: float, *, narrow: bool = False) -> Table:
    """Stages down, seats across: state and speed of each. `narrow`: a sign each."""
    table = Table.grid(padding=(0, 1))
    table.add_column(min_width=8)
    for _ in cells[0]:
        table.add_column(min_width=1 if narrow else CELL - 1)
    for index, row in enumerate(cells):
        table.add_row(Text(f"stage {index}", QUIET), *(_cell(cell, now, narrow) for cell in row))
    return table


def _cell(cell: Cell, now: float, narrow: bool) -> Text:
    sign, style = SEATS[cell.word]
    text = Text(sign, style, no_wrap=True)
    if narrow:
        return text
    text.append(f" {cell.word}")
    if cell.word == SeatStatus.READY.value:
        text.append(f" {cell.tokens_per_second:,.0f} tok/s", "default" if cell.tokens_per_second else QUIET)
    elif cell.since:
        text.append(f" {clock(now - cell.since)}", QUIET)
    if cell.replaced:
        text.append(f" ↻{cell.replaced}", "yellow")
    return text


def _middle(board: Board, cells: Sequence[Sequence[Cell]], now: float, width: int, rows: int) -> RenderableType:
    """Curve and grid: side by side where there is room, else the grid below. A curve too low to read is left out."""
    needed = 13 + CELL * len(cells[0])
    if width >= WIDE:
        right = needed if width - needed >= MIDDLE else MIDDLE
        row = Table.grid()
        row.add_column(width=width - right)
        row.add_column(width=right)
        row.add_row(curve(board, width - right, rows), _league(cells, now, right, rows, narrow=right < needed))
        return row
    league = _league(cells, now, width, len(cells) + 2, narrow=width < needed)
    left = rows - len(cells) - 2
    return Group(curve(board, width, left), league) if left >= 7 else league


def _league(cells: Sequence[Sequence[Cell]], now: float, width: int, rows: int, *, narrow: bool) -> RenderableType:
    return Panel(
        Align(grid(cells, now, narrow=narrow), vertical="middle"),
        title=f"{len(cells)} stages x {len(cells[0])} workers",
        title_align="left",
        box=ROUNDED,
        border_style=QUIET,
        width=width,
        height=rows,
    )


def curve(board: Board, width: int, height: int) -> RenderableType:
    """Loss over steps; where a worker was lost, the axis says so."""
    lines = [Line(tuple(board.training), TRAINING), Line(tuple(board.heldout), HELDOUT, "◆")]
    marks = [Mark(step, "✕", LOST) for step in board.losses_at]
    drawn = chart(lines, width=width - 4, height=height - 2, x_end=board.spec.train.steps, x_label="step", marks=marks)
    return Panel(
        Group(*drawn), title=_legend(board), title_align="left", box=ROUNDED, border_style=QUIET, height=height
    )


def _legend(board: Board) -> Text:
    def last(pair: tuple[int, float] | None) -> str:
        return f" {pair[1]:.3f}" if pair else ""

    legend = Text.assemble("loss  ", (f"training{last(board.state.loss)}", TRAINING))
    legend.append_text(Text.assemble("  ", (f"◆ held-out{last(board.state.heldout)}", HELDOUT)))
    if board.losses_at:
        legend.append_text(Text.assemble("  ", ("✕ lost", LOST)))
    return legend
