"""Everything that can happen to a run, as typed values. The run log is a sequence of these and of nothing else.

An event states what the coordinator has decided or has been shown; heartbeats, speeds and receipts are not events.
`member` is a small number that stands for one incarnation of a worker in this log: a process that comes back gets a
new one, so a late message of its former life can never be taken for the new one's.
Knows nothing of transport, files or tensors. Its fold is `koinon.run.state`.
"""

from __future__ import annotations

from typing import NewType, TypeAlias

import msgspec

Member = NewType("Member", int)
"""One incarnation of a worker; unique in a run log."""


class _Event(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True, kw_only=True):
    at: float = 0.0
    """Unix time by the coordinator's clock: for people; no rule reads it."""


class RunOpened(_Event, frozen=True):
    """First event of every log: the spec in full, so that the log alone explains the run."""

    run: str
    spec: str
    coordinator: str
    trainer: str
    stages: int
    microbatches: int
    """Microbatches in one step."""
    seed_commitment: str
    """Hex sha-256 of the sampling seed: whoever is shown the seed later can check the data."""


class Ticket(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A place in the waiting line of a full league. `number`: drawn once, in order, and never changed."""

    number: int
    worker: str
    account: str


class Queued(_Event, frozen=True):
    """These wait for a seat. Many at a time, because many come at a time."""

    tickets: tuple[Ticket, ...]


class Dequeued(_Event, frozen=True):
    """These do not wait any more: they left, or were not heard of. Being ready in a seat needs no such event."""

    workers: tuple[str, ...]
    reason: str


class Revoked(_Event, frozen=True):
    """This node key takes no part in the run any more: its seat and ticket are void, and it is given no other."""

    worker: str
    reason: str


class Seated(_Event, frozen=True):
    """A worker has taken a seat and is fetching its stage's state."""

    member: Member
    worker: str
    account: str
    stage: int
    seat: int
    """Number of the seat within its stage; a seat outlives the processes that take it."""
    addresses: tuple[str, ...]


class SeatReady(_Event, frozen=True):
    """The member holds the stage's weights at `step`, and their root is the log's."""

    member: Member
    step: int
    root: str


class Attending(_Event, frozen=True):
    """The member has its stage's frozen tensors, and older weights: it is given what the next reduces update."""

    member: Member


class SeatMoved(_Event, frozen=True):
    """The member can be reached elsewhere from now on."""

    member: Member
    addresses: tuple[str, ...]


class Unreachable(_Event, frozen=True):
    """Nobody reaches the member, or it says that it cannot stand by its gradient. Its leases stop and its contribution
    leaves the step; no penalty."""

    member: Member
    reason: str


class Returned(_Event, frozen=True):
    """An unreachable member answers again; it fetches the state anew before it works."""

    member: Member


class Draining(_Event, frozen=True):
    """The member is about to leave: it is leased nothing more, and goes once its step is taken."""

    member: Member
    reason: str


class SeatLeft(_Event, frozen=True):
    """The member is gone for good: its process ended, or its grace time passed, or it said goodbye (`drained`)."""

    member: Member
    reason: str
    drained: bool = False


class Excluded(_Event, frozen=True):
    """The member's whole contribution leaves this step; its items are leased again."""

    member: Member
    step: int
    reason: str


class ItemsReleased(_Event, frozen=True):
    """Items of a step that one member will not finish are leased to others."""

    step: int
    stage: int
    member: Member
    items: bytes
    reason: str


class ItemDropped(_Event, frozen=True):
    """A microbatch failed on three accounts: the stages that had not folded it go on without it."""

    step: int
    microbatch: int
    stages: tuple[int, ...]
    reason: str


class ReduceOpened(_Event, frozen=True):
    """A stage's items of a step are all folded: its members now sum, update and exchange."""

    stage: int
    step: int
    attempt: int
    members: tuple[Member, ...]
    """In the order in which contributions are summed."""
    sets: tuple[bytes, ...]
    """Per member, the bitmap of the items in its contribution."""
    attendees: tuple[Member, ...] = ()
    """Who is sent the updated bytes, beside the members. They own nothing, and nobody waits for them."""


class ReduceAborted(_Event, frozen=True):
    """This attempt came to nothing; accumulators are kept for the next."""

    stage: int
    step: int
    attempt: int
    reason: str


class Disputed(_Event, frozen=True):
    """The owner and the second of a tensor got different updates from the same slices."""

    stage: int
    step: int
    attempt: int
    owner: Member
    second: Member
    tensor: str
    error: float


class MomentumLost(_Event, frozen=True):
    """No living member held the optimizer state of these tensors: it starts from zero."""

    stage: int
    step: int
    tensors: tuple[str, ...]


class Contributed(_Event, frozen=True):
    """What one member's committed contribution holds: the only source of credit."""

    member: Member
    stage: int
    step: int
    items: bytes
    tokens: int
    flops: int


class StageStepped(_Event, frozen=True):
    """Every member holds the same bytes of the stage's weights after `step`: now they apply."""

    stage: int
    step: int
    attempt: int
    root: str
    gradient_norm: float
    """L2 norm of the stage's summed gradient before clipping."""
    penalised: float
    """Sum of squares of the stage's penalised weights before the step, for J."""


class StepMeasured(_Event, frozen=True):
    """J of a step: data cost averaged over its tokens, and the penalty."""

    step: int
    loss: float
    penalty: float
    tokens: int


class Evaluated(_Event, frozen=True):
    """Cost per token on held-out text, with the weights at `step`."""

    step: int
    loss: float
    tokens: int


class RunStopped(_Event, frozen=True):
    """The run was drained on purpose; the directory can be resumed."""

    reason: str


class RunResumed(_Event, frozen=True):
    """All nodes start afresh from the weights at `step`; what was stepped beyond it is void."""

    step: int
    term: int


class TermBegan(_Event, frozen=True):
    """Another coordinator goes on: first record of its term. Members keep their seats and weights; what was folded of
    a step that is not stepped yet is void and done anew."""

    term: int
    coordinator: str
    trainer: str
    reason: str


class Equivocated(_Event, frozen=True):
    """`coordinator` signed two records for one place of its term: both are here, so anybody can check it."""

    term: int
    coordinator: str
    first: bytes
    second: bytes


class RunCompleted(_Event, frozen=True):
    """Every stage has taken the last step."""

    step: int


class RunFailed(_Event, frozen=True):
    """The run cannot go on; `reason` is the sentence people read."""

    reason: str


Event: TypeAlias = (
    RunOpened
    | Queued
    | Dequeued
    | Revoked
    | Seated
    | SeatReady
    | Attending
    | SeatMoved
    | Unreachable
    | Returned
    | Draining
    | SeatLeft
    | Excluded
    | ItemsReleased
    | ItemDropped
    | ReduceOpened
    | ReduceAborted
    | Disputed
    | MomentumLost
    | Contributed
    | StageStepped
    | StepMeasured
    | Evaluated
    | RunStopped
    | RunResumed
    | TermBegan
    | Equivocated
    | RunCompleted
    | RunFailed
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def encode(event: Event) -> bytes:
    return _encoder.encode(event)


def decode(data: bytes) -> Event:
    """Inverse of `encode`. Raises msgspec.DecodeError (a ValidationError included) on anything else."""
    return _decoder.decode(data)
