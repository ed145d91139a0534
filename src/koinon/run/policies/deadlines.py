"""Deadlines that nobody sets: the median plus k median absolute deviations of what was seen last.

The same rule as the network's own (`koinon.net.deadlines`), as a value: for waits that are not requests, such as the
silence of a member or the length of a reduce. Pure: no clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from koinon.net.deadlines import DEVIATIONS, FLOOR
from koinon.units import Seconds

KEPT = 64
"""Observations that are remembered."""
_ENOUGH = 8
_FEW = 4.0
"""Until there are enough observations for a deviation: this many times the longest."""
_MOST_PATIENT = 64.0


@dataclass(frozen=True, slots=True)
class History:
    """How long the last waits took, newest last. `patience` multiplies the deadline after it was missed."""

    seconds: tuple[float, ...] = ()
    patience: float = 1.0


def observe(history: History, took: Seconds) -> History:
    """A wait ended after so long.

    It ends a patience that misses had built up, unless it proves it right: while waits take longer than the history
    explains, the deadline stays grown until the median has followed.
    """
    still_slow = took.value > _explained(history.seconds)
    kept = (*history.seconds, took.value)[-KEPT:]
    return History(kept, history.patience if still_slow else 1.0)


def missed(history: History) -> History:
    """The deadline passed: the next is twice as long, or what became slow would be given up for ever."""
    return History(history.seconds, min(_MOST_PATIENT, 2 * history.patience))


def deadline(history: History, *, floor: Seconds = FLOOR) -> Seconds:
    """How long to wait. Never less than `floor`, which is also the answer before anything was seen."""
    return Seconds(max(floor.value, _explained(history.seconds)) * history.patience)


def _explained(seconds: tuple[float, ...]) -> float:
    if len(seconds) < _ENOUGH:
        return _FEW * max(seconds, default=0.0)
    middle = median(seconds)
    return middle + DEVIATIONS * median(abs(s - middle) for s in seconds)
