"""How much a stranger may ask for: token buckets per key, one for all keys together, in bounded memory.

A key is a node's, or the name of a network. Node keys are free, so a limit per key only keeps honest nodes from harm by
a loop of their own; the one over all keys is what protects this node. Pure: time is passed in. Knows nothing of what is
asked.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from koinon.units import Seconds


@dataclass(frozen=True, slots=True)
class Rate:
    """Up to `burst` at once, and `per_second` in the long run."""

    burst: float
    per_second: float


@dataclass(slots=True)
class _Bucket:
    left: float
    at: float

    def refill(self, rate: Rate, now: float) -> None:
        self.left = min(rate.burst, self.left + (now - self.at) * rate.per_second)
        self.at = now

    def wait(self, rate: Rate, amount: float) -> float:
        """Seconds until that much is there."""
        return max(0.0, (amount - self.left) / rate.per_second)


class Allowance:
    """One kind of thing that is rationed."""

    def __init__(self, each: Rate, together: Rate, *, remembered: int = 1024) -> None:
        """remembered: keys whose use is known; the one that asked longest ago is forgotten first."""
        self._each, self._together, self._remembered = each, together, remembered
        self._all = _Bucket(together.burst, 0.0)
        self._keys: OrderedDict[str, _Bucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def take(self, key: str, amount: float, now: float) -> Seconds:
        """Take that much, if it is there: 0. Else nothing is taken, and the answer is when to ask again."""
        mine = self._keys.setdefault(key, _Bucket(self._each.burst, now))
        self._keys.move_to_end(key)
        while len(self._keys) > self._remembered:
            self._keys.popitem(last=False)
        mine.refill(self._each, now)
        self._all.refill(self._together, now)
        wait = max(mine.wait(self._each, amount), self._all.wait(self._together, amount))
        if wait == 0.0:
            mine.left -= amount
            self._all.left -= amount
        return Seconds(wait)
