"""What the switch has done so far, as a value: counts can be subtracted to learn what happened in between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

LATE = 0.002
"""Seconds after its time from which a delivery counts as late: the machine was too busy to be that network."""


@dataclass(frozen=True, slots=True)
class Stats:
    """Packets, and the bytes delivered (IP headers included) by (sender, receiver)."""

    delivered: int = 0
    lost: int = 0
    """By the dice, not for want of room."""
    blocked: int = 0
    queue_full: int = 0
    unroutable: int = 0
    """For nobody here, such as IPv6 router solicitations."""
    late: int = 0
    nbytes: Mapping[tuple[int, int], int] = field(default_factory=dict)

    def __sub__(self, earlier: Self) -> Stats:
        pairs = {pair: count - earlier.nbytes.get(pair, 0) for pair, count in self.nbytes.items()}
        counts = {name: getattr(self, name) - getattr(earlier, name) for name in COUNTS}
        return Stats(**counts, nbytes=pairs)

    @property
    def late_share(self) -> float:
        """Of the packets delivered. Where it is not small, measure again."""
        return self.late / self.delivered if self.delivered else 0.0

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"nbytes": [[*pair, count] for pair, count in self.nbytes.items()]}

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> Self:
        pairs = {(sender, receiver): count for sender, receiver, count in value["nbytes"]}
        return cls(**{name: value[name] for name in COUNTS}, nbytes=pairs)


COUNTS = tuple(f.name for f in fields(Stats) if f.name != "nbytes")
