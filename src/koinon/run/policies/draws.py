"""Draws that anyone can repeat: a seed in, a choice out, the same on every machine and in every version of Python.

The numbers are sha-256 of the seed and a counter, which is what a contract or another language can compute too.
Knows nothing of where seeds come from; a draw is as unforeseeable as its seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
NEEDIEST = 3
"""Stages among which a joiner is drawn. With one, whoever joins at the right moment chooses where to sit."""
_RANGE = 2**64


@dataclass(frozen=True, slots=True)
class StageLoad:
    """A stage as a joiner's draw sees it. `capacity`: work it can do in a second, in any unit that all stages share."""

    index: int
    capacity: float


def draw(seed: bytes, n: int, counter: int = 0) -> int:
    """A number from 0 to n - 1, all equally likely; another `counter` is another draw. Raises ValueError if n < 1."""
    if n < 1:
        raise ValueError(f"nothing can be drawn from {n} choices")
    fair = _RANGE - _RANGE % n  # beyond it the low numbers would come up once too often
    attempt = 0
    while (number := _number(seed, counter, attempt)) >= fair:
        attempt += 1
    return number % n


def shuffled(seed: bytes, items: Sequence[T]) -> tuple[T, ...]:
    """The items in an order drawn by the seed, all orders equally likely (Fisher and Yates)."""
    order = list(items)
    for last in range(len(order) - 1, 0, -1):
        other = draw(seed, last + 1, last)
        order[last], order[other] = order[other], order[last]
    return tuple(order)


def stage_for_joiner(stages: Sequence[StageLoad], seed: bytes) -> int:
    """The stage where a joiner will sit: an empty one if there is one, else one of the three with least capacity.

    Seeded by what nobody could foresee when the joiner committed itself, so nobody chooses where to sit. Equal
    capacities are ordered by the seed too, not by index. Raises ValueError if there are no stages.
    """
    empty = [stage for stage in stages if stage.capacity <= 0]
    by_need = sorted(shuffled(seed + b"order", stages), key=lambda stage: stage.capacity)
    among = sorted(stage.index for stage in empty or by_need[:NEEDIEST])
    return among[draw(seed, len(among))]


def _number(seed: bytes, counter: int, attempt: int) -> int:
    block = hashlib.sha256(
        len(seed).to_bytes(4, "big") + seed + counter.to_bytes(8, "big") + attempt.to_bytes(8, "big")
    )
    return int.from_bytes(block.digest()[:8], "big")
