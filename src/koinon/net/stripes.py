"""How many connections carry a large body to one peer: as many as make it faster, and no more.

Loss makes one Cubic connection slow (2 of 80 Mbit/s at 1% and 50 ms), and several together fast (24: about 40). Without
loss, more connections only cost work. So the width begins where loss and size suggest, climbs a ladder while goodput
rises, settles, and looks again later. Pure: it is told what transfers took.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Final

from koinon.units import BitsPerSecond

WIDTHS: Final = (1, 2, 4, 8, 16, 24)
"""24 because a peer's share of a bottleneck grows with its connections; beyond, others would starve."""
UNCONDITIONAL: Final = 4
"""Up to here it climbs before asking whether it helps: two lossy samples say little."""
FAST: Final = BitsPerSecond.mbit(300)
"""A connection this fast is limited by processors, which more connections would load further."""
RISE: Final = 1.15
"""A wider set must be this much faster to be worth it."""
_SAMPLES: Final = 3
_WINDOW: Final = 8
_LOOK_AGAIN: Final = 64
"""Transfers until a settled width is doubted: links change."""


_BEGIN: Final = 2
"""Before anything is known of the path. Not 1: only a striped body can be given more lanes while it is under way."""
_BEGIN_LARGE: Final = 4
_LARGE: Final = 2 * 1024 * 1024
_BEGIN_LOSSY: Final = 8
_WIDEN_AFTER: Final = 0.5
"""Seconds that a body may be under way on a lossy path before more lanes join it."""


def widened(width: int, seconds: float) -> int:
    """The width for a body that began with `width` and has been under way so long on a lossy path."""
    return WIDTHS[min(len(WIDTHS) - 1, WIDTHS.index(width) + int(seconds / _WIDEN_AFTER))]


class Stripes:
    """The width for one peer, learned from transfers."""

    def __init__(self) -> None:
        self._rung = 0
        self._goodput: dict[int, deque[float]] = {}
        self._settled_for: int | None = None

    @property
    def width(self) -> int:
        """Connections to use for the next large body."""
        return WIDTHS[self._rung]

    def begin(self, nbytes: int, *, lossy: bool) -> int:
        """The width for a body of that size. A path that nothing is known of is guessed at."""
        if self._settled_for is None and lossy:
            self._rung = max(self._rung, WIDTHS.index(_BEGIN_LOSSY))
        elif not self._goodput:
            self._rung = max(self._rung, WIDTHS.index(_BEGIN_LARGE if nbytes > _LARGE else _BEGIN))
        return self.width

    @property
    def is_settled(self) -> bool:
        """Whether the width is what was found best, and not a step of the search."""
        return self._settled_for is not None

    @property
    def goodput(self) -> BitsPerSecond | None:
        """What recent transfers at this width reached."""
        return BitsPerSecond(self._median(self.width)) if self._goodput.get(self.width) else None

    def observe(self, width: int, nbytes: int, seconds: float) -> None:
        """A body of that size took so long over that many connections. Widths off the ladder teach nothing."""
        if width not in WIDTHS or seconds <= 0:
            return
        if width > self.width:  # it was widened under way
            self._rung, self._settled_for = WIDTHS.index(width), None
        samples = self._goodput.setdefault(width, deque(maxlen=_WINDOW))
        samples.append(8 * nbytes / seconds)
        if width != self.width:
            return
        if self._settled_for is not None:
            self._doubt()
        elif len(samples) >= _SAMPLES:
            self._climb()

    def _climb(self) -> None:
        helped = self._rung == 0 or self._median(self.width) >= RISE * self._median(WIDTHS[self._rung - 1])
        fast = self._median(self.width) >= FAST.value
        top = self._rung == len(WIDTHS) - 1
        if fast:
            self._rung = 0
        if not top and not fast and (helped or self.width < UNCONDITIONAL):
            self._rung += 1
        else:
            self._settle()

    def _settle(self) -> None:
        """At the narrowest width that is nearly as good as the best."""
        tried = [w for w in WIDTHS[: self._rung + 1] if self._goodput.get(w)]
        best = max((self._median(w) for w in tried), default=0.0)
        self._rung = next((WIDTHS.index(w) for w in tried if RISE * self._median(w) >= best), 0)
        self._settled_for = 0

    def _doubt(self) -> None:
        assert self._settled_for is not None
        self._settled_for += 1
        if self._settled_for >= _LOOK_AGAIN:
            self._settled_for = None
            self._goodput.clear()
            self._rung = max(0, self._rung - 1)

    def _median(self, width: int) -> float:
        samples = self._goodput.get(width)
        return median(samples) if samples else 0.0
