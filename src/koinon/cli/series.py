"""Numbers as they come, kept in little memory: a curve of a million steps is as long as a curve of a thousand.

Knows nothing of losses or of terminals.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from math import fsum

LIMIT = 1024
"""Points kept. More than any terminal has columns of dots."""
REMEMBERED = 8
"""Events that a pace is judged by."""


@dataclass(frozen=True, slots=True)
class Point:
    """The mean `y` of `count` consecutive values, the first of them at `x`."""

    x: int
    y: float
    count: int = 1


@dataclass(frozen=True, slots=True)
class Series:
    """Values at rising x. Beyond LIMIT points, neighbours are averaged."""

    points: tuple[Point, ...] = ()
    stride: int = 1
    """Values per full point."""

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return ((point.x, point.y) for point in self.points)

    def add(self, x: int, y: float) -> Series:
        last = self.points[-1] if self.points else None
        if last is not None and last.count < self.stride:
            return replace(self, points=(*self.points[:-1], merged((last, Point(x, y)))))
        points = (*self.points, Point(x, y))
        if len(points) <= LIMIT:
            return replace(self, points=points)
        pairs = (points[i : i + 2] for i in range(0, len(points), 2))
        return Series(tuple(map(merged, pairs)), 2 * self.stride)

    def before(self, x: int) -> Series:
        """Without what began at `x` or later: a resumed run voids it."""
        return replace(self, points=tuple(point for point in self.points if point.x < x))


def merged(points: Iterable[Point]) -> Point:
    """One point for all, weighted by how many values each stands for."""
    points = tuple(points)
    count = sum(point.count for point in points)
    return Point(points[0].x, fsum(point.y * point.count for point in points) / count, count)


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast amounts come, by the last few. Times in seconds of one clock."""

    seen: tuple[tuple[float, float], ...] = ()
    """(time, amount), newest last."""

    def add(self, at: float, amount: float) -> Pace:
        return Pace((*self.seen, (at, amount))[-REMEMBERED:])

    def per_second(self, now: float) -> float:
        """Amount per second; 0 until two have come. It falls while the next one is overdue, so a stall is seen."""
        if len(self.seen) < 2:
            return 0.0
        (first, _), *_, (last, _) = self.seen
        usual = max(later - sooner for (sooner, _), (later, _) in pairwise(self.seen))
        span = max(last, now - usual) - first
        return fsum(amount for _, amount in self.seen[1:]) / span if span > 0 else 0.0
