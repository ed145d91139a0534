"""Curves as a picture: a few lines of SVG, so that the page needs no plotting library. Knows nothing of losses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 300, 52, 14, 34, 44
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")  # told apart by all eyes


@dataclass(frozen=True, slots=True)
class Curve:
    """points: (x, y); low and high: y's spread at each x, or nothing."""

    name: str
    points: Sequence[tuple[float, float]]
    spread: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True, slots=True)
class Panel:
    """Axes with a logarithmic x. target: a dashed line at that y. rises: the names stand on the left."""

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    target: float | None = None
    rises: bool = False


def drawn(panels: Sequence[Panel]) -> str:
    """The panels side by side."""
    parts = [f'<g transform="translate({index * WIDTH} 0)">{_panel(panel)}</g>' for index, panel in enumerate(panels)]
    size = f'viewBox="0 0 {WIDTH * len(panels)} {HEIGHT}" width="{WIDTH * len(panels)}" height="{HEIGHT}"'
    style = 'font-family="sans-serif" font-size="11" fill="#333"'
    ground = '<rect width="100%" height="100%" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{ground}{"".join(parts)}</svg>\n'


@dataclass(frozen=True, slots=True)
class Axes:
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    @classmethod
    def around(cls, panel: Panel) -> Axes:
        xs = [x for curve in panel.curves for x, _ in curve.points]
        ys = [y for curve in panel.curves for _, y in curve.points]
        ys += [y for curve in panel.curves for pair in curve.spread for y in pair]
        ys += [0.0, panel.target] if panel.target is not None else []
        room = 0.06 * (max(ys) - min(ys)) or 1.0
        return cls(min(xs) / 1.15, max(xs) * 1.15, min(ys) - room, max(ys) + room)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies in the panel."""
        across = math.log(x / self.x_low) / math.log(self.x_high / self.x_low)
        up = (y - self.y_low) / (self.y_high - self.y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers within [low, high]."""
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * times for times in (1, 2, 5, 10) if unit * times >= rough)
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _panel(panel: Panel) -> str:
    axes = Axes.around(panel)
    shapes = [_text(LEFT, 18, panel.title, size=13), _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, panel.x, "middle")]
    shapes += [_text(LEFT, 30, panel.y)]
    shapes += _grid(axes, sorted({x for curve in panel.curves for x, _ in curve.points}))
    if panel.target is not None:
        shapes.append(_line([axes.at(axes.x_low, panel.target), axes.at(axes.x_high, panel.target)], "#999", "5 4"))
    for curve, colour in zip(panel.curves, COLOURS, strict=False):
        shapes += _curve(axes, curve, colour)
    return "".join([*shapes, *_legend(panel)])


def _grid(axes: Axes, xs: Iterable[float]) -> Iterable[str]:
    for y in ticks(axes.y_low, axes.y_high):
        (left, height), (right, _) = axes.at(axes.x_low, y), axes.at(axes.x_high, y)
        yield _line([(left, height), (right, height)], "#e5e5e5")
        yield _text(left - 5, height + 4, f"{y:.4g}", "end")
    for x in xs:
        yield _text(axes.at(x, axes.y_low)[0], HEIGHT - BOTTOM + 15, f"{x:.3g}", "middle")


def _curve(axes: Axes, curve: Curve, colour: str) -> list[str]:
    places = [axes.at(*point) for point in curve.points]
    shapes = [_line(places, colour, width=2)]
    shapes += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
    for (x, _), (low, high) in zip(curve.points, curve.spread, strict=False):
        shapes.append(_line([axes.at(x, low), axes.at(x, high)], colour))
    return shapes


def _legend(panel: Panel) -> Iterable[str]:
    for index, (curve, colour) in enumerate(zip(panel.curves, COLOURS, strict=False)):
        height = TOP + 12 + 14 * index
        start = LEFT + 6 if panel.rises else WIDTH - RIGHT - 16
        yield _line([(start, height - 4), (start + 16, height - 4)], colour, width=2)
        beside, anchor = (start + 21, "start") if panel.rises else (start - 5, "end")
        yield _text(beside, height, curve.name, anchor)


def _line(places: Sequence[tuple[float, float]], colour: str, dashes: str = "", width: float = 1) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}"{dashed}/>'


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 11) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
