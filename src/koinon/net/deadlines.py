"""Deadlines that nobody sets: the median plus k median absolute deviations of what an edge has shown.

An edge is whatever the caller tells apart (a peer and a kind of request). Sizes fall in classes of a factor four, and
each class learns by itself. Before there is data: a fixed time plus the bytes at a measured or pessimistic rate.
MAD rather than a standard deviation: one stall of a minute must not make the next deadline a minute (Hampel, 1974).
Pure: no clock, no network.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from koinon.units import BitsPerSecond, Seconds

CONNECT: Final = Seconds(5.0)
"""For dialling and the hello. A silent address otherwise costs the network library's 31 s."""
FLOOR: Final = Seconds(2.0)
"""Nothing is given up sooner: a garbage collection or a busy core stalls a healthy peer for a second."""
CEILING: Final = Seconds(120.0)
PESSIMISTIC: Final = BitsPerSecond.mbit(0.5)
"""Used until a rate was measured: a quarter of what one connection carries at 1% loss and 50 ms, for it is shared."""
DEVIATIONS: Final = 8.0
"""k. A round trip's tail is heavier than normal: 8 MAD is about 5.4 standard deviations of a normal one."""
_WINDOW: Final = 64
_ENOUGH: Final = 8
_REFRESH: Final = 8
_MAX_SERIES: Final = 8192
"""Edges of peers long gone are forgotten, oldest first."""
_RATE_FROM: Final = 64 * 1024
"""Below this size a duration says more about latency than about a rate."""
_SLACK: Final = 8.0
_PATIENCE: Final = 8.0


def size_class(nbytes: int) -> int:
    """0 up to 4 KiB, then one class per factor of four."""
    return max(0, (max(1, nbytes) - 1).bit_length() - 11) // 2


@dataclass(slots=True)
class _Series:
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    patience: float = 1.0
    fresh: int = 0
    cached: float | None = None


class Deadlines:
    """Durations observed per edge and size class, and the deadlines they justify."""

    def __init__(self) -> None:
        self._series: dict[tuple[Hashable, int], _Series] = {}
        self._rates: dict[Hashable, float] = {}

    def observe(self, edge: Hashable, nbytes: int, seconds: float) -> None:
        """An exchange of that many bytes took so long.

        After an answer that came later than the usual deadline the next has twice its time: the median follows slowly.
        """
        series = self._of(edge, nbytes)
        series.seconds.append(seconds)
        usual = self._usual(edge, nbytes, series)
        series.patience = 1.0 if seconds <= usual else min(_PATIENCE, 2 * seconds / usual)
        series.fresh += 1
        if series.fresh >= _REFRESH:
            series.fresh, series.cached = 0, None
        if nbytes >= _RATE_FROM and seconds > 0:
            rate = 8 * nbytes / seconds
            self._rates[edge] = (self._rates.get(edge, rate) + rate) / 2

    def missed(self, edge: Hashable, nbytes: int) -> None:
        """A deadline passed: the next one is twice as long, up to eight times, until an answer comes.

        A link that became slow would otherwise miss every deadline for ever, and never be observed again.
        """
        series = self._of(edge, nbytes)
        series.patience = min(_PATIENCE, 2 * series.patience)

    def of(self, edge: Hashable, nbytes: int) -> Seconds:
        """How long to wait for an exchange of that many bytes."""
        series = self._of(edge, nbytes)
        return Seconds(min(CEILING.value, self._usual(edge, nbytes, series) * series.patience))

    def rate(self, edge: Hashable) -> BitsPerSecond | None:
        """The measured rate of an edge, if anything large went over it."""
        rate = self._rates.get(edge)
        return BitsPerSecond(rate) if rate is not None else None

    def _usual(self, edge: Hashable, nbytes: int, series: _Series) -> float:
        if series.cached is None:
            series.cached = self._base(edge, nbytes, series)
        return max(series.cached, self._floor(edge, nbytes))

    def _floor(self, edge: Hashable, nbytes: int) -> float:
        """A burst of losses divides a link's rate by several: what is slow for once is not dead."""
        rate = self._rates.get(edge)
        return FLOOR.value + (_SLACK * 8 * nbytes / rate if rate is not None and nbytes >= _RATE_FROM else 0.0)

    def _base(self, edge: Hashable, nbytes: int, series: _Series) -> float:
        if len(series.seconds) >= _ENOUGH:
            middle = median(series.seconds)
            return middle + DEVIATIONS * median(abs(s - middle) for s in series.seconds)
        rate = self._rates.get(edge, PESSIMISTIC.value)
        return FLOOR.value + 8 * nbytes / rate

    def _of(self, edge: Hashable, nbytes: int) -> _Series:
        key = (edge, size_class(nbytes))
        if (series := self._series.get(key)) is None:
            while len(self._series) >= _MAX_SERIES:
                oldest = next(iter(self._series))
                del self._series[oldest]
                self._rates.pop(oldest[0], None)
            series = self._series[key] = _Series()
        return series
