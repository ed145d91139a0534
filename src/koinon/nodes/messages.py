"""What nodes say to each other: one frozen struct per message, grouped by the ALPN that may carry it.

Headers are arrays on the wire, not maps: a work item's header is about a hundred bytes. Bodies are raw bytes whose
length the header states and the receiver checks against what the run spec allows. Signed messages are signed over
their own encoding with an empty signature. Knows nothing of sockets, and nothing of what a body means.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import msgspec

CTL, JOIN, WORK, BULK = "koinon/ctl/1", "koinon/join/1", "koinon/work/1", "koinon/bulk/1"


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True, forbid_unknown_fields=True):
    """Base of all headers: the class name is the tag."""


class Kind(IntEnum):
    TRAIN = 0
    EVAL = 1
    SAMPLE = 2


class Lease(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A microbatch's route through the stages, offered by a trainer. It travels with the tensors, so that every
    worker on the route can check the trainer's signature and needs no message of its own."""

    kind: Kind
    step: int
    microbatch: int
    revision: int
    """Grows with every change of the route; a worker heeds only the highest it has seen."""
    route: tuple[int, ...]
    """Member per stage."""
    folds: int
    """Bit s: stage s folds this item into its gradient. Otherwise it only re-executes it for its neighbours."""
    step_tokens: int
    """m of J: tokens of the whole step."""
    sampling: tuple[float, int] | None = None
    """SAMPLE only: temperature and the draw's seed."""
    signature: bytes = b""
    term: int = 0
    """In which the trainer holds its office: the leases of a trainer that was replaced are void."""

    @property
    def key(self) -> tuple[int, int, int]:
        return (int(self.kind), self.step, self.microbatch)

    def unsigned(self) -> bytes:
        return msgspec.msgpack.encode(msgspec.structs.replace(self, signature=b""))

    def folds_at(self, stage: int) -> bool:
        return bool(self.folds >> stage & 1)


class Ids(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Token ids in a body: `sequences` rows of `length` unsigned integers of `width` bytes, little-endian."""

    sequences: int
    length: int
    width: int

    @property
    def nbytes(self) -> int:
        return self.sequences * self.length * self.width


# --- WORK: pushes. Answered by a verdict of the transport.


OFFERED_AT_ONCE = 64
"""Items in one offer: some 150 bytes of header each, and a header is at most 64 KB."""


class Offered(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One item of an offer. `ids`: None where they come with the coefficients of the stage before."""

    lease: Lease
    ids: Ids | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self.ids is None else self.ids.nbytes


class Offer(Message, frozen=True):
    """Trainer to worker: work, or new revisions of work it has. Body: the ids, item by item."""

    items: tuple[Offered, ...]
    more: bool
    """The trainer holds further items back until some of these are finished, so it wants to know soon."""
    crossing: float
    """Seconds of one crossing per second of one item's compute at a stage, as members have measured them: the farther
    the links, the more items are begun at once."""
    nbytes: int


class Forward(Message, frozen=True):
    """Stage s to s+1. Body: encoded coefficients, then ids."""

    lease: Lease
    ids: Ids
    nbytes: int


class Backward(Message, frozen=True):
    """Stage s+1 to s. Body: encoded gradient of the coefficients."""

    step: int
    microbatch: int
    revision: int
    nbytes: int


class Slice(Message, frozen=True):
    """Member to owner or second: its gradient of every tensor that the receiver sums, in name order."""

    stage: int
    step: int
    attempt: int
    nbytes: int


class Norms(Message, frozen=True):
    """Owner to members: sum of squares of each summed tensor it owns, in name order."""

    stage: int
    step: int
    attempt: int
    squares: tuple[float, ...]
    nbytes: int = 0


class Updated(Message, frozen=True):
    """Owner to members: the new bytes of every tensor it owns, in name order."""

    stage: int
    step: int
    attempt: int
    nbytes: int


# --- CTL: requests (Norms above goes there too: it is small and is waited for)


class Claim(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    step: int
    microbatch: int
    revision: int


class Finished(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An item is folded (TRAIN) or answered (EVAL, SAMPLE). `value`: the last stage's summed cost, or a token id."""

    kind: Kind
    step: int
    microbatch: int
    revision: int
    value: float | None = None


class Claims(Message, frozen=True):
    """Worker to trainer: items it is about to fold, and items it has finished.

    `voids`: its seat's, as far as it has read the log. Where the trainer has read of another number, one of the two
    does not know yet that the gradient was thrown out: nothing is granted, and nothing folded is noted.
    """

    claims: tuple[Claim, ...]
    finished: tuple[Finished, ...]
    voids: int
    term: int = 0
    """As in the leases that they are about."""
    nbytes: int = 0


class Granted(Message, frozen=True):
    """Indices into `Claims.claims` that may be folded. The others belong to somebody else now."""

    granted: tuple[int, ...]
    nbytes: int = 0


class Telemetry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a worker tells about itself. For people and for routing; never for credit."""

    state: str = "idle"
    tokens: int = 0
    """Tokens folded since it started."""
    busy: float = 0.0
    """Compute seconds since it started."""
    seconds_per_item: float = 0.0
    queued: int = 0
    boundary_bytes: int = 0
    """Bytes it sent across boundaries, headers included."""
    boundary_tokens: int = 0
    """Tokens (times directions) that those bytes carried."""
    flops: int = 0
    recomputed_flops: int = 0
    memory_mib: int = 0
    seconds_per_crossing: float = 0.0
    """What it takes to hand a neighbour an item's coefficients or gradient, the verdict's way back included."""
    fetched_bytes: int = 0
    """Of its stage's state, while it fetches that: how much is here,"""
    fetching_bytes: int = 0
    """in all,"""
    fetch_rate: float = 0.0
    """and how many bytes per second."""


class Heartbeat(Message, frozen=True):
    member: int
    telemetry: Telemetry
    nbytes: int = 0


class Join(Message, frozen=True):
    """A node asks for a seat. `have`: (step, root) of every snapshot of `stage` on its disk, newest first.

    `wish`: drawn anew whenever a seat is asked for, so that a repeated message is not taken for a new process.
    """

    account: str
    addresses: tuple[str, ...]
    wish: str
    stage: int | None = None
    have: tuple[tuple[int, str], ...] = ()
    nbytes: int = 0


class Welcome(Message, frozen=True):
    """A seat. `begin`: "found" the stage, "load" the snapshot of `step`, or "fetch" it from another member."""

    member: int
    stage: int
    seat: int
    begin: str
    step: int
    spec: str
    signed_pass: bytes
    nbytes: int = 0


class Waiting(Message, frozen=True):
    """No seat is free: the asker's queue number, and its place, which never goes back. Ask again in `after` s."""

    ticket: int
    position: int
    after: float
    why: str
    nbytes: int = 0


class Later(Message, frozen=True):
    """Nothing is decided yet, because too many ask: ask again in `after` s."""

    after: float
    why: str
    nbytes: int = 0


class Withdraw(Message, frozen=True):
    """The asker does not wait for a seat any more."""

    nbytes: int = 0


class Ready(Message, frozen=True):
    member: int
    step: int
    root: str
    nbytes: int = 0


class Renew(Message, frozen=True):
    """A member asks for a new pass, long before its own expires."""

    member: int
    nbytes: int = 0


class Renewed(Message, frozen=True):
    signed_pass: bytes
    nbytes: int = 0


class Attend(Message, frozen=True):
    """A member whose weights are older than its stage's asks to be sent what the next reduces update."""

    member: int
    nbytes: int = 0


class Held(Message, frozen=True):
    """A member holds every tensor's new bytes of this attempt, durably."""

    member: int
    stage: int
    step: int
    attempt: int
    root: str
    gradient_norm: float
    penalised: float
    momentum_lost: tuple[str, ...] = ()
    nbytes: int = 0


class Complain(Message, frozen=True):
    """A member cannot go on with a reduce: `about` sent nothing usable, or (owner and second) they differ."""

    member: int
    stage: int
    step: int
    attempt: int
    about: int
    reason: str
    tensor: str = ""
    error: float = 0.0
    nbytes: int = 0


class Broken(Message, frozen=True):
    """A worker or trainer met something that no retry can mend (a full disk, a loss that is not a number)."""

    member: int
    reason: str
    nbytes: int = 0


class Leave(Message, frozen=True):
    """`finishes`: it goes once what it has claimed is committed, and says so again then. Else it goes now."""

    member: int
    reason: str
    finishes: bool = False
    nbytes: int = 0


class InventoryWanted(Message, frozen=True):
    """Coordinator to a member: which of these versions (step, root) of its stage are on its disk, whole and right?"""

    stage: int
    versions: tuple[tuple[int, str], ...]
    nbytes: int = 0


class Inventory(Message, frozen=True):
    """Reply."""

    steps: tuple[int, ...]
    nbytes: int = 0


class StageDone(Message, frozen=True):
    """Trainer to coordinator: every item of the stage's step is folded or dropped."""

    stage: int
    step: int
    attempt: int
    seen: int
    """Log position up to which the trainer had read."""
    members: tuple[int, ...]
    sets: tuple[bytes, ...]
    nbytes: int = 0


class Happened(Message, frozen=True):
    """Trainer to coordinator: an event for the log, of the kinds that a trainer may ask for. Encoded."""

    event: bytes
    nbytes: int = 0


class Records(Message, frozen=True):
    """Coordinator to everyone: consecutive records of the run log, as they lie on its disk."""

    first: int
    records: tuple[bytes, ...]
    nbytes: int = 0


class Follow(Message, frozen=True):
    """A node asks to be sent the log from `first` on.

    Without a seat: `stands_by`, it keeps a copy and may succeed; `looks_on`, it only shows what happens, and is sent
    nothing that a standby does not have yet.
    """

    first: int
    addresses: tuple[str, ...]
    stands_by: bool = False
    looks_on: bool = False
    nbytes: int = 0


class Pulse(Message, frozen=True):
    """A standby asks the holder of a term whether it lives. Answered by Ack."""

    term: int
    nbytes: int = 0


class TailWanted(Message, frozen=True):
    """The holder of a new term asks what its receiver has of the log from `first` on. Whoever answers heeds no lower
    term from then on."""

    term: int
    first: int
    nbytes: int = 0


class Tail(Message, frozen=True):
    """Reply: consecutive records from `first` on, as many as fit, and the place of the newest one held."""

    records: tuple[bytes, ...]
    newest: int
    nbytes: int = 0


class Shown(Message, frozen=True):
    """Followers compare heads: the newest record of one. Answered by Seen."""

    record: bytes
    nbytes: int = 0


class Seen(Message, frozen=True):
    """Reply: another record that was signed for the same place, if the receiver holds one; else nothing."""

    record: bytes = b""
    nbytes: int = 0


class Ack(Message, frozen=True):
    """Received. `next`: the first sequence number that the sender of this still lacks (Records only)."""

    next: int = 0
    nbytes: int = 0


# --- BULK


class ContentWanted(Message, frozen=True):
    """A joiner asks a member of its stage what it can give: frozen tensors and weights, as content in chunks.

    `step`: the weights wanted; None asks for the newest that is worth naming, and newer than `newer_than`.
    """

    stage: int
    step: int | None = None
    newer_than: int = -1
    nbytes: int = 0


class ContentOffered(Message, frozen=True):
    """Reply. `root`: of the weights; `manifest`: root of the manifest. Body: the manifest. Empty: not here."""

    step: int
    root: str
    manifest: str
    nbytes: int = 0


class MomentumWanted(Message, frozen=True):
    """Optimizer state of these tensors as it stands before `step`."""

    stage: int
    step: int
    tensors: tuple[str, ...]
    nbytes: int = 0


class MomentumGiven(Message, frozen=True):
    """A member that leaves hands over optimizer state that nobody else has, as it stands before `step`. Body: one
    safetensors file."""

    stage: int
    step: int
    nbytes: int = 0


class Tensors(Message, frozen=True):
    """Reply. Body: one safetensors file. An empty body: not here."""

    step: int
    nbytes: int = 0


def signed(message: Any, signature: bytes) -> Any:
    return msgspec.structs.replace(message, signature=signature)


def fetching(telemetry: Telemetry, done: int, total: int, rate: float) -> Telemetry:
    """The same, of a worker that is fetching its stage's state."""
    return msgspec.structs.replace(telemetry, fetched_bytes=done, fetching_bytes=total, fetch_rate=rate)
