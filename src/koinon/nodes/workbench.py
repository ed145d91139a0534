"""The items on a worker's bench: what it was leased, what it holds of each, and which job is next.

Pure bookkeeping: no transport, no tensors, no clock. Bytes that crossed a boundary are kept until every stage has taken
the step, so that any neighbour's replacement can be served from them; the first accepted bytes of an item and direction
win, so a re-execution never replaces what somebody has computed with already.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from koinon.nodes.messages import Kind, Lease
from koinon.run.policies.schedule import pick_job

Key = tuple[int, int, int]


class ClaimState(Enum):
    NONE = auto()
    ASKED = auto()
    GRANTED = auto()
    REFUSED = auto()


@dataclass(slots=True)
class Item:
    """One item of this worker's stage."""

    lease: Lease
    ids: Any = None
    """(b, T + 1) int64, or (1, n) for sampling."""
    entered: bytes | None = None
    """Encoded coefficients from the stage before."""
    left: bytes | None = None
    """Encoded coefficients for the stage after. Kept."""
    gradient: bytes | None = None
    """Encoded gradient from the stage after."""
    returned: bytes | None = None
    """Encoded gradient for the stage before. Kept."""
    claim: ClaimState = ClaimState.NONE
    is_done: bool = False
    """Folded, or answered, or (where it does not fold) re-executed."""
    value: float | None = None
    forward_to: int | None = None
    """Member that was given `left`."""
    backward_to: int | None = None

    @property
    def key(self) -> Key:
        return self.lease.key


class JobKind(Enum):
    FORWARD = auto()
    BACKWARD = auto()
    FINISH = auto()


@dataclass(frozen=True, slots=True)
class Job:
    """As `policies.schedule` sees it."""

    kind: JobKind
    item: Item

    @property
    def step(self) -> int:
        return self.item.lease.step

    @property
    def microbatch(self) -> int:
        return self.item.lease.microbatch

    @property
    def is_backward(self) -> bool:
        return self.kind is not JobKind.FORWARD


@dataclass(slots=True)
class Workbench:
    """`member` and `stage` of the worker; `step`: the step its weights are for."""

    member: int
    stage: int
    stages: int
    step: int = 0
    capacity: int = 16
    """Items that may be here unfinished. A forward beyond it is asked to wait; a backward never is."""
    begun_at_once: int = 1
    """Training items of a step that the first stage may have begun and not folded: what is leased ahead of them waits
    there, where nothing is kept for it yet. Later stages begin what comes."""
    items: dict[Key, Item] = field(default_factory=dict)
    folded: set[tuple[int, int]] = field(default_factory=set)
    """(step, microbatch) of what lies in the accumulators."""
    emptying: int = 0
    voids: int = 0
    """How often everything was voided; a job that began before the last time has done nothing."""

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1

    def lease(self, lease: Lease) -> Item:
        """Note a lease: new work, or a new revision of work that is here. An older revision changes nothing."""
        item = self.items.get(lease.key)
        if item is None:
            item = self.items[lease.key] = Item(lease)
        elif lease.revision > item.lease.revision:
            item.lease = lease
            # A neighbour that lost its state asks by a new revision: hand it over again, whoever it is.
            item.forward_to = item.backward_to = None
            if item.claim in (ClaimState.REFUSED, ClaimState.ASKED):
                item.claim = ClaimState.NONE
        return item

    def is_mine(self, item: Item) -> bool:
        return item.lease.route[self.stage] == self.member

    def folds(self, item: Item) -> bool:
        return item.lease.kind is Kind.TRAIN and item.lease.folds_at(self.stage) and item.lease.step >= self.step

    def admits(self, key: Key) -> bool:
        """Whether a forward may come in: its backward's slot is reserved with it. A twin takes no second slot.

        Later steps take no room from earlier ones: they cannot run before them, and would keep them out for ever.
        """
        item = self.items.get(key)
        if item is not None and item.entered is not None:
            return True
        open_ = (i for i in self.items.values() if i.entered is not None and not i.is_done and self.is_mine(i))
        return sum(i.lease.step <= key[1] for i in open_) < self.capacity

    def has_open_items(self) -> bool:
        """Whether a training item of this step is here that is not folded yet."""
        return any(
            not item.is_done and item.lease.kind is Kind.TRAIN and item.lease.step == self.step and self.is_mine(item)
            for item in self.items.values()
        )

    def claimable(self) -> Iterator[Item]:
        """Items of this step that are leased to this worker to fold, and not asked for yet."""
        for item in self.items.values():
            if item.claim is not ClaimState.NONE or item.lease.step != self.step or item.is_done:
                continue
            if self.is_mine(item) and self.folds(item):
                yield item

    def jobs(self) -> Iterator[Job]:
        """Everything that could be computed now."""
        may_begin = not self.is_first or self._begun() < self.begun_at_once
        for item in self.items.values():
            if not self._is_ready(item):
                continue
            if self.is_last:
                if not item.is_done and self._may_run(item):
                    yield Job(JobKind.FINISH, item)
            elif item.left is None:
                if may_begin or item.lease.kind is not Kind.TRAIN or not self.folds(item):
                    yield Job(JobKind.FORWARD, item)
            elif item.gradient is not None and not item.is_done and self._may_run(item):
                yield Job(JobKind.BACKWARD, item)

    def next_job(self) -> Job | None:
        """Backward before forward, the older step and the lower microbatch first: 1F1B."""
        return None if self.emptying else pick_job(self.jobs())

    def void(self, step: int) -> None:
        """What was folded at this step is lost, and has to be folded again by whoever holds it then.

        No job starts until `emptied` says that the accumulators are empty: a fold under an old claim must not follow.
        """
        self.emptying += 1
        self.voids += 1
        self.folded = {entry for entry in self.folded if entry[0] != step}
        for item in self.items.values():
            if item.lease.kind is Kind.TRAIN and item.lease.step == step:
                item.claim, item.is_done = ClaimState.NONE, False

    def drop(self, step: int, microbatch: int) -> None:
        """The stage goes without this item: it is not folded here any more, and nothing waits for it."""
        item = self.items.get((int(Kind.TRAIN), step, microbatch))
        if item is not None:
            item.is_done = True

    def begin_term(self) -> None:
        """Another trainer leases everything anew, under its own revisions: what was leased before is void, and with it
        all that was folded of a step that was not taken."""
        self.emptying += 1
        self.voids += 1
        self.items.clear()

    def emptied(self) -> None:
        """The accumulators are empty, once for each `void` and each term."""
        self.emptying -= 1

    def retire(self, step: int) -> list[Key]:
        """Drop everything of training steps before `step`, which every stage has taken; returns the keys."""
        old = [
            key
            for key, item in self.items.items()
            if item.lease.step < step or (item.lease.kind is not Kind.TRAIN and item.is_done)
        ]
        for key in old:
            del self.items[key]
        self.folded = {entry for entry in self.folded if entry[0] >= step}
        return old

    def _begun(self) -> int:
        """Items of this step that are on their way through the later stages, or came back and wait to be folded."""
        return sum(
            item.left is not None and not item.is_done and item.lease.step == self.step
            for item in self.items.values()
            if item.lease.kind is Kind.TRAIN and self.is_mine(item) and self.folds(item)
        )

    def _may_run(self, item: Item) -> bool:
        """What is folded needs a claim; what is only re-executed does not."""
        return item.claim is ClaimState.GRANTED or not self.folds(item)

    def _has_input(self, item: Item) -> bool:
        return item.ids is not None and (self.is_first or item.entered is not None)

    def _is_ready(self, item: Item) -> bool:
        """Mine, whole, and of a step that the weights are for (or were, for a re-execution)."""
        if not self.is_mine(item) or not self._has_input(item):
            return False
        if item.lease.kind is not Kind.TRAIN:
            return not item.is_done and item.lease.step == self.step
        return item.lease.step == self.step or (
            item.lease.step == self.step - 1 and not item.lease.folds_at(self.stage)
        )
