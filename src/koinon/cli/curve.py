"""A chart of lines in a terminal, drawn with braille: two dots across and four down in every character.

Written here rather than taken from a plotting package: it is one pure function, takes under a millisecond (the process
that draws it also runs the league) and adds nothing to what a user must install. Knows nothing of losses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.text import Text

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bit of each dot of a braille character, by row and column (Unicode block 2800)."""
AXIS = "grey50"
LEAST_SPAN = 0.5
"""Of the y axis, so that noise is not blown up to mountains."""


@dataclass(frozen=True, slots=True)
class Line:
    """`points` (x, y) at rising x, joined; or, with a `sign`, a character at each. The later line lies on top."""

    points: tuple[tuple[float, float], ...]
    style: str
    sign: str = ""


@dataclass(frozen=True, slots=True)
class Mark:
    """A sign on the x axis."""

    x: float
    sign: str
    style: str


@dataclass(frozen=True, slots=True)
class Frame:
    """The part of the plane that is shown. Both sides of each interval differ."""

    x0: float
    x1: float
    y0: float
    y1: float

    @classmethod
    def around(cls, lines: Sequence[Line], x_end: float) -> Frame:
        """From x = 0 to `x_end`, or as far as the points go, and from the least y to the greatest."""
        xs = [x for line in lines for x, _ in line.points]
        ys = [y for line in lines for _, y in line.points]
        low, high = min(ys, default=0.0), max(ys, default=1.0)
        if (missing := LEAST_SPAN - (high - low)) > 0:
            low, high = low - missing / 2, high + missing / 2
        return cls(0.0, max(1.0, x_end, *xs), low, high)


class Canvas:
    """`width` x `height` characters of dots."""

    def __init__(self, width: int, height: int, frame: Frame) -> None:
        self.width, self.height, self.frame = width, height, frame
        self._bits = [[0] * width for _ in range(height)]
        self._signs = [[""] * width for _ in range(height)]
        self._styles = [[""] * width for _ in range(height)]

    def draw(self, line: Line) -> None:
        dots = [self._dot(x, y) for x, y in line.points]
        if line.sign:
            for across, down in dots:
                self._signs[down // 4][across // 2] = line.sign
                self._styles[down // 4][across // 2] = line.style
            return
        if len(dots) == 1:
            self._set(*dots[0], line.style)
        for start, end in pairwise(dots):
            for across, down in _between(start, end):
                self._set(across, down, line.style)

    def rows(self) -> Iterator[Text]:
        for bits, signs, styles in zip(self._bits, self._signs, self._styles, strict=True):
            row = Text()
            for bit, sign, style in zip(bits, signs, styles, strict=True):
                row.append(sign or (chr(0x2800 + bit) if bit else " "), style)
            yield row

    def column(self, x: float) -> int:
        """The character column that shows `x`."""
        return self._dot(x, self.frame.y0)[0] // 2

    def _dot(self, x: float, y: float) -> tuple[int, int]:
        frame = self.frame
        across = (x - frame.x0) / (frame.x1 - frame.x0) * (2 * self.width - 1)
        down = (frame.y1 - y) / (frame.y1 - frame.y0) * (4 * self.height - 1)
        return round(across), round(down)

    def _set(self, across: int, down: int, style: str) -> None:
        row, column = down // 4, across // 2
        self._bits[row][column] |= _DOTS[down % 4][across % 2]
        self._styles[row][column] = style


def chart(
    lines: Sequence[Line], *, width: int, height: int, x_end: float = 0.0, x_label: str = "", marks: Iterable[Mark] = ()
) -> list[Text]:
    """`height` rows of `width` characters: the lines, a y axis on the left, an x axis with `marks` below.

    x_end: how far the x axis goes at least. Empty if there is no room for a chart (8 x 4 characters).
    """
    frame = Frame.around(lines, x_end)
    labels = _y_labels(frame, height - 2) if any(line.points for line in lines) else [""] * (height - 2)
    gutter = max(map(len, labels), default=0)
    if width - gutter - 1 < 8 or height < 4:
        return []
    canvas = Canvas(width - gutter - 1, height - 2, frame)
    for line in lines:
        canvas.draw(line)
    rows = [
        Text.assemble((label.rjust(gutter), AXIS), ("┤" if label else "│", AXIS), row)
        for label, row in zip(labels, canvas.rows(), strict=True)
    ]
    indent = " " * gutter
    rows.append(Text.assemble(indent, ("└", AXIS), _axis(canvas, marks)))
    rows.append(Text(f"{indent} {_x_labels(frame.x1, canvas.width, x_label)}", AXIS))
    return rows


def _axis(canvas: Canvas, marks: Iterable[Mark]) -> Text:
    axis = ["─"] * canvas.width
    styles = [AXIS] * canvas.width
    for mark in marks:
        column = canvas.column(min(max(mark.x, canvas.frame.x0), canvas.frame.x1))
        axis[column], styles[column] = mark.sign, mark.style
    return Text.assemble(*zip(axis, styles, strict=True))


def _y_labels(frame: Frame, rows: int) -> list[str]:
    """A figure at every fourth row, from the top; the bottom row has one too."""
    step = (frame.y1 - frame.y0) / max(1, rows - 1)
    shown = {row for row in range(0, rows, 4) if rows - 1 - row >= 2} | {rows - 1}
    return [f"{frame.y1 - row * step:.2f}" if row in shown else "" for row in range(rows)]


def _x_labels(end: float, width: int, label: str) -> str:
    last = f"{label} {end:g}".strip()
    return "0" + last.rjust(width - 1) if len(last) < width - 2 else ""


def _between(start: tuple[int, int], end: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """The dots of a straight line, both ends included."""
    (x0, y0), (x1, y1) = start, end
    count = max(abs(x1 - x0), abs(y1 - y0), 1)
    for i in range(count + 1):
        yield round(x0 + (x1 - x0) * i / count), round(y0 + (y1 - y0) * i / count)
