"""What a worker computes next, and which items it takes in: one forward, one backward, and no way to get stuck.

Admitting an item's forward reserves the slot that its backward will need, until that backward is done. So a backward is
never refused, and who holds a slot waits for nothing but slots of later stages; the last stage waits for none.
Knows nothing of tensors, transport or money.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, TypeVar


class Item(NamedTuple):
    """One microbatch of one step, at whatever stage the holder serves."""

    step: int
    microbatch: int


class Job(Protocol):
    """Something that could be computed now."""

    @property
    def step(self) -> int: ...
    @property
    def microbatch(self) -> int: ...
    @property
    def is_backward(self) -> bool: ...


J = TypeVar("J", bound=Job)


@dataclass(frozen=True, slots=True)
class Slots:
    """The items that a worker has taken in and not finished. `capacity`: how many it can hold, at least 1."""

    capacity: int
    held: frozenset[Item] = frozenset()

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ValueError(f"a worker that can hold {self.capacity} items can do no work")

    @property
    def free(self) -> int:
        return max(0, self.capacity - len(self.held))


def urgency(job: Job) -> tuple[bool, int, int]:
    """Least first: a backward before a forward, for it frees a slot; then the older step; then the lower microbatch."""
    return (not job.is_backward, job.step, job.microbatch)


def pick_job(queue: Iterable[J]) -> J | None:
    """The job to compute next: 1F1B (arXiv:2104.04473). None if there is none."""
    return min(queue, key=urgency, default=None)


def admit_forward(slots: Slots, item: Item) -> Slots | None:
    """Take an item in, with the slot of its backward; None if there is no room. A twin takes no second slot."""
    if item in slots.held:
        return slots
    return replace(slots, held=slots.held | {item}) if slots.free else None


def admit_backward(slots: Slots, item: Item) -> Slots:
    """Take a gradient in: always. It has its forward's slot; without one it is held beyond the capacity."""
    return replace(slots, held=slots.held | {item})


def finish(slots: Slots, item: Item) -> Slots:
    """The item's backward is done, or the item was taken away. Twice is once."""
    return replace(slots, held=slots.held - {item})
