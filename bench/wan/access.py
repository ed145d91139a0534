"""A host's access to the network: what its link is like, and the line that packets queue for.

Pure: time is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Self

from bench.wan.quantities import quantity


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Rates in bit/s, times in seconds. Raises ValueError if a value makes no sense."""

    up: float = 80e6
    down: float = 80e6
    delay: float = 0.0125
    """One way between the host and the switch: a round trip of two hosts crosses it four times."""
    jitter: float = 0.0
    """Added to a packet's delay, drawn uniformly; it never reorders."""
    loss: float = 0.0
    """Share of packets lost, each way. Between two hosts the larger of theirs counts."""
    queue: float = 0.1
    """Longest wait for a line; a packet that would wait longer is refused."""

    def __post_init__(self) -> None:
        if not (self.up > 0 and self.down > 0):
            raise ValueError("A rate must be above 0; `block` or `partition` cut a host off.")
        if not 0 <= self.loss <= 1:
            raise ValueError(f"A loss of {self.loss:g} is no share between 0 and 1 (or 0% and 100%).")
        if not all(0 <= t < math.inf for t in (self.delay, self.jitter, self.queue)):
            raise ValueError("Delay, jitter and queue are times of at least 0.")

    def changed(self, settings: Mapping[str, str | float]) -> Self:
        """With these values instead; `rate` is both directions, `rtt` the round trip of two hosts that are alike."""
        values: dict[str, float] = {}
        for name, given in settings.items():
            value = quantity(given)
            match name:
                case "rate":
                    values |= {"up": value, "down": value}
                case "rtt":
                    values["delay"] = value / 4
                case _ if name in NAMES:
                    values[name] = value
                case _:
                    raise ValueError(f"A host has no {name!r}: there are {', '.join(('rate', 'rtt', *NAMES))}.")
        return replace(self, **values)


NAMES = tuple(field.name for field in fields(Access))


@dataclass(slots=True)
class Line:
    """One direction of an access link: it sends one packet after the other."""

    free_at: float = 0.0

    def carry(self, now: float, nbytes: int, rate: float, longest_wait: float) -> float | None:
        """When the packet's last bit has left; None if it would have to wait too long."""
        if self.free_at - now > longest_wait:
            return None
        self.free_at = max(now, self.free_at) + 8 * nbytes / rate
        return self.free_at
