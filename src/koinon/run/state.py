"""The state of a run as a fold over its log.

`apply(state, event) -> state` is pure and total: nodes, status, dashboard, tests and post-mortem all call this one
function, so they cannot disagree. An event that no longer fits (a late twin, an unknown member) changes nothing.
Knows nothing of clocks, transport or files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import assert_never

from koinon.run import events as ev
from koinon.run.events import Event, Member
from koinon.run.evidence import convicts
from koinon.run.items import unpack
from koinon.run.policies.admission import Line

ROOTS_KEPT = 8
"""Versions of a stage whose roots stay in the state: enough for every snapshot that a worker keeps."""


class Phase(StrEnum):
    PROPOSED = "proposed"
    FUNDED = "funded"
    TRAINING = "training"
    STOPPED = "stopped"
    COMPLETE = "complete"
    SERVING = "serving"
    FAILED = "failed"


class SeatStatus(StrEnum):
    SYNCING = "syncing"
    ATTENDING = "attending"
    """It has the stage's frozen tensors, and is given the updated weights of the next reduces."""
    READY = "ready"
    DRAINING = "draining"
    """It is about to leave: it finishes what it has claimed, and is leased nothing more."""
    UNREACHABLE = "unreachable"
    LEFT = "left"


_LIVING = tuple(status for status in SeatStatus if status is not SeatStatus.LEFT)
_HOLDING = (SeatStatus.READY, SeatStatus.DRAINING, SeatStatus.UNREACHABLE)
"""Whoever is silent may come back with the weights that it had."""


@dataclass(frozen=True, slots=True)
class Seat:
    member: Member
    worker: str
    account: str
    stage: int
    seat: int
    addresses: tuple[str, ...]
    status: SeatStatus
    step: int = 0
    voids: int = 0
    """How often what it had folded and not committed was voided: what it claims or tells of an earlier life of its
    gradient counts for nothing."""


@dataclass(frozen=True, slots=True)
class OpenReduce:
    step: int
    attempt: int
    members: tuple[Member, ...]
    sets: tuple[bytes, ...]
    attendees: tuple[Member, ...] = ()

    def items_of(self, member: Member) -> tuple[int, ...]:
        return unpack(self.sets[self.members.index(member)])


@dataclass(frozen=True, slots=True)
class Version:
    """Weights of a stage at one step: their root, and the members that held optimizer state for them."""

    step: int
    root: str
    members: tuple[Member, ...]
    penalised: float = 0.0
    """Sum of squares of the penalised weights before the step that made these."""


@dataclass(frozen=True, slots=True)
class StageState:
    index: int
    step: int = 0
    """The next step to be taken = the step whose weights the stage has."""
    reduce: OpenReduce | None = None
    attempt: int = 0
    """Number of the next reduce attempt of this step."""
    versions: tuple[Version, ...] = ()
    """Newest last."""
    dropped: frozenset[int] = frozenset()
    """Microbatches of the current step that this stage goes without."""
    disputes: int = 0
    emptied: float | None = None
    """Since when no member holds the weights of a stage that was founded (Unix time, for people); None: some do."""

    def root_at(self, step: int) -> str | None:
        return next((v.root for v in reversed(self.versions) if v.step == step), None)


@dataclass(frozen=True, slots=True)
class Credit:
    items: int = 0
    tokens: int = 0
    flops: int = 0

    def __add__(self, other: Credit) -> Credit:
        return Credit(self.items + other.items, self.tokens + other.tokens, self.flops + other.flops)

    def __sub__(self, other: Credit) -> Credit:
        return Credit(self.items - other.items, self.tokens - other.tokens, self.flops - other.flops)


@dataclass(frozen=True, slots=True)
class Tally:
    """What the league absorbed, for people."""

    vanished: int = 0
    unreachable: int = 0
    excluded: int = 0
    items_released: int = 0
    items_dropped: int = 0
    reduces_aborted: int = 0
    joins: int = 0
    resumes: int = 0
    successions: int = 0


@dataclass(frozen=True, slots=True)
class Pause:
    """A run waits for a stage that nobody holds any more: for its weights at `step`, since a Unix time."""

    stage: int
    step: int
    since: float


@dataclass(frozen=True, slots=True)
class RunState:
    run: str = ""
    spec: str = ""
    phase: Phase = Phase.PROPOSED
    reason: str = ""
    coordinator: str = ""
    trainer: str = ""
    term: int = 0
    holders: Mapping[int, str] = field(default_factory=dict)
    """Who signs the log, by the first term in which it does so."""
    convicted: frozenset[str] = frozenset()
    """Keys that signed two histories: they hold no term again."""
    microbatches: int = 0
    stages: tuple[StageState, ...] = ()
    seats: Mapping[Member, Seat] = field(default_factory=dict)
    next_member: int = 0
    line: Line = field(default_factory=Line)
    """Who waits for a seat. Whoever is called keeps its place until it is ready."""
    revoked: Mapping[str, str] = field(default_factory=dict)
    """Node keys that take no part any more, and why."""
    excluded: frozenset[tuple[Member, int]] = frozenset()
    contributed: Mapping[tuple[Member, int], Credit] = field(default_factory=dict)
    """Credit given per (member, step), for as long as a late twin could name it or a resume could void it."""
    credit: Mapping[str, Credit] = field(default_factory=dict)
    loss: tuple[int, float] | None = None
    heldout: tuple[int, float] | None = None
    tally: Tally = Tally()

    @property
    def step(self) -> int:
        """The first step that some stage has not taken yet."""
        return min((s.step for s in self.stages), default=0)

    @property
    def pauses(self) -> tuple[Pause, ...]:
        """What the run waits for, if it does: everything is kept, and goes on once these stages have a member."""
        if self.phase is not Phase.TRAINING:
            return ()
        return tuple(Pause(s.index, s.step, s.emptied) for s in self.stages if s.emptied is not None)

    def seats_of(self, stage: int, *statuses: SeatStatus) -> list[Seat]:
        """Seats of a stage in member order, without those that left; only those of the given statuses, if any are."""
        wanted = statuses or _LIVING
        return [s for _, s in sorted(self.seats.items()) if s.stage == stage and s.status in wanted]

    def ready(self, stage: int) -> list[Seat]:
        return self.seats_of(stage, SeatStatus.READY)

    def member_of(self, worker: str) -> Seat | None:
        """The living seat of a node key, if it has one."""
        living = (s for s in self.seats.values() if s.worker == worker and s.status is not SeatStatus.LEFT)
        return next(living, None)

    def holder_of(self, term: int) -> str:
        """Who signs in that term, as far as the log says so; its first coordinator for terms before the first."""
        began = max((t for t in self.holders if t <= term), default=min(self.holders, default=0))
        return self.holders.get(began, "")

    def may_contribute(self, member: Member, step: int) -> bool:
        seat = self.seats.get(member)
        works = seat is not None and seat.status in (SeatStatus.READY, SeatStatus.DRAINING)
        return works and (member, step) not in self.excluded


def apply(state: RunState, event: Event) -> RunState:
    """The state after `event`. Total: never raises on any sequence of well-typed events."""
    after = _applied(state, event)
    return after if after.seats is state.seats else _with_emptied(after, event.at)


def _applied(state: RunState, event: Event) -> RunState:
    match event:
        case ev.RunOpened():
            return _opened(state, event)
        case ev.Queued(tickets=tickets):
            return replace(state, line=state.line.with_tickets(tickets))
        case ev.Dequeued(workers=workers):
            return replace(state, line=state.line.without(workers))
        case ev.Revoked():
            return _revoked(state, event)
        case ev.Seated():
            return _seated(state, event)
        case ev.SeatReady():
            return _ready(state, event)
        case ev.Attending(member=member):
            is_syncing = member in state.seats and state.seats[member].status is SeatStatus.SYNCING
            return _set_seat(state, member, status=SeatStatus.ATTENDING) if is_syncing else state
        case ev.SeatMoved(member=member, addresses=addresses):
            return _set_seat(state, member, addresses=addresses)
        case ev.Unreachable(member=member):
            return _gone(state, member, SeatStatus.UNREACHABLE, counts=True)
        case ev.Returned(member=member):
            return _voided(_set_seat(state, member, status=SeatStatus.SYNCING), member)
        case ev.Draining(member=member):
            is_ready = member in state.seats and state.seats[member].status is SeatStatus.READY
            return _set_seat(state, member, status=SeatStatus.DRAINING) if is_ready else state
        case ev.SeatLeft(member=member, drained=drained):
            return _left(state, member, drained=drained)
        case ev.Excluded(member=member, step=step):
            return _excluded(state, member, step)
        case ev.ItemsReleased(items=items):
            return _count(state, items_released=len(unpack(items)))
        case ev.ItemDropped():
            return _dropped(state, event)
        case ev.ReduceOpened():
            return _reduce_opened(state, event)
        case ev.ReduceAborted(stage=stage, step=step, attempt=attempt):
            return _reduce_aborted(state, stage, step, attempt)
        case ev.Disputed():
            return _disputed(state, event)
        case ev.MomentumLost():
            return state
        case ev.Contributed():
            return _contributed(state, event)
        case ev.StageStepped():
            return _stepped(state, event)
        case ev.StepMeasured(step=step, loss=loss):
            return replace(state, loss=(step, loss))
        case ev.Evaluated(step=step, loss=loss):
            return replace(state, heldout=(step, loss))
        case ev.RunStopped(reason=reason):
            return replace(state, phase=Phase.STOPPED, reason=reason)
        case ev.RunResumed(step=step, term=term):
            return _resumed(state, step, term)
        case ev.TermBegan():
            return _term_began(state, event)
        case ev.Equivocated():
            return _equivocated(state, event)
        case ev.RunCompleted():
            return replace(state, phase=Phase.COMPLETE)
        case ev.RunFailed(reason=reason):
            return replace(state, phase=Phase.FAILED, reason=reason)
        case _:
            assert_never(event)


def fold(events: Iterable[Event], state: RunState | None = None) -> RunState:
    """`apply` from left to right."""
    state = state or RunState()
    for event in events:
        state = apply(state, event)
    return state


def _opened(state: RunState, event: ev.RunOpened) -> RunState:
    if state.run:
        return state  # a log describes one run
    return replace(
        state,
        run=event.run,
        spec=event.spec,
        phase=Phase.TRAINING,
        coordinator=event.coordinator,
        trainer=event.trainer,
        term=1,
        holders={1: event.coordinator},
        microbatches=event.microbatches,
        stages=tuple(StageState(index=i) for i in range(event.stages)),
    )


def _seated(state: RunState, event: ev.Seated) -> RunState:
    if event.member in state.seats or not 0 <= event.stage < len(state.stages):
        return state
    seat = Seat(event.member, event.worker, event.account, event.stage, event.seat, event.addresses, SeatStatus.SYNCING)
    state = replace(
        state, seats={**state.seats, event.member: seat}, next_member=max(state.next_member, event.member + 1)
    )
    return _count(state, joins=1)


def _ready(state: RunState, event: ev.SeatReady) -> RunState:
    seat = state.seats.get(event.member)
    stage = None if seat is None else _stage_at(state, seat.stage, event.step)
    if seat is None or stage is None:
        return state  # it fetched a version that the stage has left meanwhile
    if seat.worker in state.line.tickets:
        state = replace(state, line=state.line.without({seat.worker}))
    state = _set_seat(state, event.member, status=SeatStatus.READY, step=event.step)
    if stage.root_at(event.step) is None:  # the founding replica's root is everyone's
        stage = replace(stage, versions=(*stage.versions, Version(event.step, event.root, (event.member,))))
        state = _set_stage(state, stage)
    return state


def _set_seat(
    state: RunState,
    member: Member,
    *,
    status: SeatStatus | None = None,
    step: int | None = None,
    addresses: tuple[str, ...] | None = None,
) -> RunState:
    seat = state.seats.get(member)
    if seat is None or seat.status is SeatStatus.LEFT:
        return state
    changed = replace(
        seat,
        status=seat.status if status is None else status,
        step=seat.step if step is None else step,
        addresses=seat.addresses if addresses is None else addresses,
    )
    return replace(state, seats={**state.seats, member: changed})


def _gone(state: RunState, member: Member, status: SeatStatus, *, counts: bool) -> RunState:
    seat = state.seats.get(member)
    if seat is None or seat.status in (SeatStatus.LEFT, status):
        return state
    state = _abort_reduce_with(state, seat.stage, member)
    state = _set_seat(state, member, status=status)
    if status is SeatStatus.LEFT:
        return _count(state, vanished=int(counts))
    return _count(_voided(state, member), unreachable=int(counts))


def _voided(state: RunState, member: Member) -> RunState:
    seat = state.seats.get(member)
    if seat is None or seat.status is SeatStatus.LEFT:
        return state
    return replace(state, seats={**state.seats, member: replace(seat, voids=seat.voids + 1)})


def _left(state: RunState, member: Member, *, drained: bool) -> RunState:
    """Whoever loses a seat before it was ready in it has its ticket still, unless it left on purpose."""
    seat = state.seats.get(member)
    after = _gone(state, member, SeatStatus.LEFT, counts=not drained)
    if seat is None or after is state or seat.worker not in state.line.tickets:
        return after
    line = state.line.without({seat.worker}) if drained else state.line.seat_lost(seat.worker)
    return replace(after, line=line)


def _revoked(state: RunState, event: ev.Revoked) -> RunState:
    seat = state.member_of(event.worker)
    if seat is not None:
        state = _gone(state, seat.member, SeatStatus.LEFT, counts=True)
    return replace(
        state,
        line=state.line.without({event.worker}),
        revoked={**state.revoked, event.worker: event.reason},
    )


def _excluded(state: RunState, member: Member, step: int) -> RunState:
    seat = state.seats.get(member)
    if seat is None or (member, step) in state.excluded or step < state.stages[seat.stage].step:
        return state  # a committed contribution cannot be taken out any more
    state = replace(state, excluded=state.excluded | {(member, step)})
    state = _voided(_abort_reduce_with(state, seat.stage, member), member)
    return _count(state, excluded=1)


def _with_emptied(state: RunState, at: float) -> RunState:
    """Note which founded stages have lost their last holder, and which have one again."""
    held = {seat.stage for seat in state.seats.values() if seat.status in _HOLDING}
    for stage in state.stages:
        is_empty = bool(stage.versions) and stage.index not in held
        if is_empty != (stage.emptied is not None):
            state = _set_stage(state, replace(stage, emptied=at if is_empty else None))
    return state


def _dropped(state: RunState, event: ev.ItemDropped) -> RunState:
    stages = list(state.stages)
    changed = 0
    for index in event.stages:
        if 0 <= index < len(stages) and stages[index].step == event.step:
            changed += event.microbatch not in stages[index].dropped
            stages[index] = replace(stages[index], dropped=stages[index].dropped | {event.microbatch})
    return _count(replace(state, stages=tuple(stages)), items_dropped=changed)


def _reduce_opened(state: RunState, event: ev.ReduceOpened) -> RunState:
    stage = _stage_at(state, event.stage, event.step)
    if stage is None or event.attempt != stage.attempt or stage.reduce is not None:
        return state
    if len(event.members) != len(event.sets):
        return state
    reduce = OpenReduce(event.step, event.attempt, event.members, event.sets, event.attendees)
    return _set_stage(state, replace(stage, reduce=reduce))


def _reduce_aborted(state: RunState, index: int, step: int, attempt: int) -> RunState:
    stage = _stage_at(state, index, step)
    if stage is None or stage.reduce is None or stage.reduce.attempt != attempt:
        return state
    state = _set_stage(state, replace(stage, reduce=None, attempt=attempt + 1))
    return _count(state, reduces_aborted=1)


def _abort_reduce_with(state: RunState, index: int, member: Member) -> RunState:
    """A member that left, or is excluded, takes the open attempt with it."""
    reduce = state.stages[index].reduce
    if reduce is None or member not in reduce.members:
        return state
    return _reduce_aborted(state, index, reduce.step, reduce.attempt)


def _disputed(state: RunState, event: ev.Disputed) -> RunState:
    stage = _stage_at(state, event.stage, event.step)
    if stage is None or stage.reduce is None or stage.reduce.attempt != event.attempt:
        return state
    state = _set_stage(state, replace(stage, disputes=stage.disputes + 1))
    return _reduce_aborted(state, event.stage, event.step, event.attempt)


def _contributed(state: RunState, event: ev.Contributed) -> RunState:
    seat = state.seats.get(event.member)
    key = (event.member, event.step)
    if seat is None or key in state.contributed or _stage_at(state, event.stage, event.step) is None:
        return state  # late twins are normal; exactly-once is decided here
    credit = Credit(len(unpack(event.items)), event.tokens, event.flops)
    total = state.credit.get(seat.account, Credit()) + credit
    return replace(
        state,
        contributed={**state.contributed, key: credit},
        credit={**state.credit, seat.account: total},
    )


def _stepped(state: RunState, event: ev.StageStepped) -> RunState:
    stage = _stage_at(state, event.stage, event.step)
    if stage is None or stage.reduce is None or stage.reduce.attempt != event.attempt:
        return state
    stage_reduce, members = stage.reduce, stage.reduce.members
    version = Version(event.step + 1, event.root, members, event.penalised)
    stage = StageState(event.stage, event.step + 1, versions=(*stage.versions, version)[-ROOTS_KEPT:])
    seats = dict(state.seats)
    for member, seat in seats.items():
        if seat.stage != event.stage or seat.status not in (SeatStatus.READY, SeatStatus.DRAINING):
            continue
        if seat.status is SeatStatus.DRAINING:
            seats[member] = replace(seat, step=event.step + 1 if member in members else seat.step)
            continue
        # Whoever was not in the reduce did not get the updated bytes: it has to fetch them, unless it attended.
        missed = SeatStatus.ATTENDING if member in stage_reduce.attendees else SeatStatus.SYNCING
        status = SeatStatus.READY if member in members else missed
        seats[member] = replace(seat, status=status, step=event.step + 1 if member in members else seat.step)
    state = _set_stage(replace(state, seats=seats), stage)
    oldest = state.step
    return replace(
        state,
        excluded=frozenset(e for e in state.excluded if e[1] >= oldest),
        contributed={k: c for k, c in state.contributed.items() if k[1] >= oldest - ROOTS_KEPT},
    )


def _term_began(state: RunState, event: ev.TermBegan) -> RunState:
    """Another hand writes. Nobody leaves a seat; reduces that were open, exclusions and credit of steps that did not
    come to their end are void, because every item of them is done anew."""
    if not state.run or event.term <= state.term or event.coordinator in state.convicted:
        return state
    stages = tuple(replace(s, reduce=None, attempt=s.attempt + (s.reduce is not None)) for s in state.stages)
    credit, kept = dict(state.credit), {}
    for (member, step), earned in state.contributed.items():
        seat = state.seats[member]
        if step < stages[seat.stage].step:
            kept[member, step] = earned
        else:  # its step was about to be written when the coordinator vanished
            credit[seat.account] = credit[seat.account] - earned
    state = replace(
        state,
        term=event.term,
        holders={**state.holders, event.term: event.coordinator},
        coordinator=event.coordinator,
        trainer=event.trainer,
        stages=stages,
        excluded=frozenset(),
        contributed=kept,
        credit=credit,
    )
    return _count(state, successions=1)


def _equivocated(state: RunState, event: ev.Equivocated) -> RunState:
    """Bar a key, if the event holds the proof. The holder of the newest term can be barred, too: it is replaced."""
    if state.holder_of(event.term) != event.coordinator or not convicts(event, state.run):
        return state
    return replace(state, convicted=state.convicted | {event.coordinator})


def _resumed(state: RunState, step: int, term: int) -> RunState:
    """Void what lies beyond `step`; every node starts afresh."""
    stages = tuple(
        StageState(s.index, min(step, s.step), versions=tuple(v for v in s.versions if v.step <= step))
        for s in state.stages
    )
    seats = {m: replace(s, status=SeatStatus.LEFT) for m, s in state.seats.items()}
    credit = dict(state.credit)
    for (member, at), void in state.contributed.items():
        if at >= step:
            account = state.seats[member].account
            credit[account] = credit[account] - void
    state = replace(
        state,
        phase=Phase.TRAINING,
        reason="",
        term=max(term, state.term),
        stages=stages,
        seats=seats,
        excluded=frozenset(),
        contributed={k: c for k, c in state.contributed.items() if k[1] < step},
        credit=credit,
        loss=None if state.loss is None or state.loss[0] >= step else state.loss,
    )
    return _count(state, resumes=1)


def _stage_at(state: RunState, index: int, step: int) -> StageState | None:
    """The stage if it exists and stands at `step`."""
    if not 0 <= index < len(state.stages) or state.stages[index].step != step:
        return None
    return state.stages[index]


def _set_stage(state: RunState, stage: StageState) -> RunState:
    return replace(state, stages=(*state.stages[: stage.index], stage, *state.stages[stage.index + 1 :]))


def _count(state: RunState, **more: int) -> RunState:
    tally = replace(state.tally, **{name: getattr(state.tally, name) + n for name, n in more.items()})
    return replace(state, tally=tally)
