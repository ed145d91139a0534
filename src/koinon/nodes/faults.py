"""Where a worker can be made to fail on purpose, so that a crash in a test is the same crash every time.

A plan names a point and the step from which on it strikes; in production it is empty. Knows nothing of what happens at
a point.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from enum import StrEnum

Reach = Callable[["Point", int], None]
"""Called with each point that a worker reaches, and the step it is about."""


class Point(StrEnum):
    """In the order in which a step meets them."""

    FORWARD = "before a forward"
    FORWARDED = "after a forward"
    CLAIM = "before a claim"
    CLAIMED = "after a claim"
    BACKWARD = "before a backward"
    FOLDED = "after a backward"
    REDUCE = "before a reduce"
    SLICED = "in a reduce, slices sent"
    UPDATED = "in a reduce, updates sent"
    HELD = "before a commit, everything held"
    COMMIT = "in a commit"
    COMMITTED = "after a commit"


def nothing(_point: Point, _step: int) -> None:
    """Production: no faults."""


def killed_at(plan: Sequence[tuple[str, int]]) -> Reach:
    """kill -9 this process at the first point of the plan that it reaches."""
    planned = {Point(point): since for point, since in plan}

    def reach(point: Point, step: int) -> None:
        if point in planned and step >= planned[point]:
            os.kill(os.getpid(), signal.SIGKILL)

    return reach if planned else nothing
