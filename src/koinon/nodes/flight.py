"""A microbatch on its way through the stages, as its trainer keeps it: route, claims, what is folded.

Exactly-once is decided here: an item belongs to one member at a time, a claim is granted to that member alone, and a
new assignment raises the revision, so that an older claim can never be granted. Knows nothing of transport or tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from koinon.errors import FrameMalformed, TokenOutOfRange
from koinon.nodes.messages import Ids, Kind, Lease
from koinon.run.events import Member

NOBODY = Member(-1)


@dataclass(slots=True)
class Flight:
    """One microbatch of one step. All lists are by stage."""

    kind: Kind
    step: int
    microbatch: int
    tokens: NDArray[np.int32]
    """(sequences, context + 1): ids and targets in one."""
    route: list[Member]
    began: float
    revision: int = 0
    assigned: list[int] = field(default_factory=list)
    """Revision at which the stage's item was last given to somebody."""
    claimed: list[bool] = field(default_factory=list)
    done: list[bool] = field(default_factory=list)
    accounts: list[set[str]] = field(default_factory=list)
    """Accounts that failed at the stage's item."""
    committed: list[bool] = field(default_factory=list)
    """The stage has taken the step with this item in it: from now on it is only re-executed, never folded."""
    value: float | None = None
    is_inherited: bool = False
    """Its last stage had taken the step before this trainer came: the cost is told by whoever folded it then."""
    nudged: float = 0.0
    sampling: tuple[float, int] | None = None

    def __post_init__(self) -> None:
        stages = len(self.route)
        self.assigned = [0] * stages
        self.claimed, self.done, self.committed = [False] * stages, [False] * stages, [False] * stages
        self.accounts = [set() for _ in range(stages)]
        self.nudged = self.began

    @property
    def key(self) -> tuple[int, int, int]:
        return (int(self.kind), self.step, self.microbatch)

    @property
    def is_over(self) -> bool:
        """Nothing of it is left to do."""
        return all(self.done) if self.kind is Kind.TRAIN else self.done[-1]

    @property
    def is_routed(self) -> bool:
        return NOBODY not in self.route

    def claim(self, stage: int, member: Member, revision: int) -> bool:
        """Whether `member` may fold the stage's item now. Asking twice is harmless."""
        if self.route[stage] != member or revision < self.assigned[stage] or self.committed[stage]:
            return False
        self.claimed[stage] = True
        return True

    def finish(self, stage: int, member: Member, revision: int, value: float | None) -> bool:
        """Note that the item is folded, or answered. False if it is no longer that member's."""
        if self.route[stage] != member or revision < self.assigned[stage]:
            return False
        if self.kind is Kind.TRAIN and not (self.claimed[stage] or self.committed[stage]):
            return False
        self.done[stage] = True
        if value is not None and (self.value is None or not self.committed[stage]):
            self.value = value
        return True

    def unassign(self, members: Iterable[Member], accounts: dict[Member, str]) -> list[int]:
        """Take the items of members that are gone; returns the stages. A committed item stays done, but is nobody's."""
        gone, stages = set(members), []
        for stage, member in enumerate(self.route):
            if member in gone:
                self.accounts[stage].add(accounts.get(member, ""))
                self.route[stage] = NOBODY
                if not self.committed[stage]:
                    self.claimed[stage] = self.done[stage] = False
                stages.append(stage)
        return stages

    def assign(self, stage: int, member: Member) -> None:
        """Give the stage's item to `member`, under a new revision."""
        self.revision += 1
        self.route[stage] = member
        self.assigned[stage] = self.revision

    def lease(self, step_tokens: int, term: int) -> Lease:
        """The unsigned lease of the route as it stands."""
        folds = sum(1 << s for s, committed in enumerate(self.committed) if not committed)
        return Lease(
            self.kind,
            self.step,
            self.microbatch,
            self.revision,
            tuple(self.route),
            folds if self.kind is Kind.TRAIN else 0,
            step_tokens,
            self.sampling,
            term=term,
        )


def ids_of(tokens: NDArray[np.int32], vocab: int) -> Ids:
    """The narrowest unsigned integers that hold the vocabulary: ids ride along with every microbatch."""
    width = 1 if vocab <= 1 << 8 else 2 if vocab <= 1 << 16 else 4
    sequences, length = tokens.shape
    return Ids(sequences, length, width)


def packed_ids(tokens: NDArray[np.int32], ids: Ids) -> bytes:
    """The tokens in the form that `ids` says."""
    return tokens.astype(f"<u{ids.width}").tobytes()


def unpacked_ids(ids: Ids, body: bytes | bytearray | memoryview, vocab: int, lengths: range) -> NDArray[np.int64]:
    """Inverse of `packed_ids`; shape (sequences, length). `lengths`: those that the model can take.

    Raises FrameMalformed, and TokenOutOfRange for an id that is not below `vocab`: a peer wrote them.
    """
    if ids.width not in (1, 2, 4) or ids.sequences < 1 or ids.length not in lengths or ids.nbytes != len(body):
        raise FrameMalformed(
            f"{ids.sequences} rows of {ids.length} ids of {ids.width} bytes, {len(body)} in all, are no item here."
        )
    unpacked = np.frombuffer(body, dtype=f"<u{ids.width}").reshape(ids.sequences, ids.length).astype(np.int64)
    if (largest := int(unpacked.max())) >= vocab:
        raise TokenOutOfRange(f"Token {largest} is not in the vocabulary of {vocab}: the sender uses other data.")
    return unpacked
