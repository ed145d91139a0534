"""The coordinator: single writer of the run log. It admits, seats, opens and commits reduces, and judges liveness.

It decides by the pure rules of `koinon.run` and writes what it decided; it holds no weights and sees no tensor. What
it can do wrong is stall or refuse: it cannot forge work, because credit follows from sets that trainer and members
agree on.
Knows nothing of models beyond what an item costs.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import msgspec

from koinon.errors import Fenced, Refused, StateError
from koinon.model.flops import item_flops
from koinon.net.identity import NodeKey
from koinon.net.transport import Answer, NodeAddr, Transport
from koinon.nodes import messages as m
from koinon.nodes.clock import loop_time
from koinon.nodes.pass_office import PassOffice
from koinon.nodes.publisher import Publisher
from koinon.nodes.refill import Refill
from koinon.nodes.switchboard import Switchboard
from koinon.nodes.waiting_room import WaitingRoom
from koinon.run import events as ev
from koinon.run.events import Member
from koinon.run.items import unpack
from koinon.run.log import RunLog
from koinon.run.policies.deadlines import History, deadline, missed, observe
from koinon.run.policies.draws import StageLoad, stage_for_joiner
from koinon.run.spec import RunSpec
from koinon.run.state import Phase, RunState, Seat, SeatStatus, StageState, apply
from koinon.units import PeerId, Seconds

HEARTBEAT = Seconds(1.0)
"""How often a member tells that it lives."""
SILENCE_FLOOR = Seconds(3.0)
"""No member is called unreachable before that: three missed heartbeats."""
REDUCE_FLOOR = Seconds(5.0)
FAREWELL = Seconds(3.0)
"""How long the last records are offered to followers when the run has ended."""
DISPUTES_ALLOWED = 3
GUESTS_ALLOWED = 16
"""Nodes without a seat that may follow the log."""
_WORTH_A_SYNC = (ev.StepMeasured, ev.RunStopped, ev.RunCompleted, ev.RunFailed, ev.RunResumed, ev.TermBegan)
_TRAINER_MAY = (ev.Excluded, ev.ItemsReleased, ev.ItemDropped, ev.StepMeasured, ev.Evaluated, ev.RunCompleted)


@dataclass(slots=True)
class OpenAttempt:
    """Who has reported what in the reduce attempt that is open. Never outlives the attempt."""

    attempt: int
    until: float
    began: float
    held: dict[Member, m.Held] = field(default_factory=dict)
    blamed: set[Member] = field(default_factory=set)


class Coordinator:
    """One run's coordinator. `write` is the only way into the log."""

    def __init__(
        self,
        spec: RunSpec,
        log: RunLog[ev.Event],
        state: RunState,
        transport: Transport,
        board: Switchboard,
        key: NodeKey,
        *,
        clock: Callable[[], float] = loop_time,
    ) -> None:
        self.spec, self.log, self.state, self._transport, self._clock = spec, log, state, transport, clock
        self.telemetry: dict[Member, m.Telemetry] = {}
        self.finished = asyncio.Event()
        self.failure: StateError | None = None
        """Why the log takes nothing more, if it does not."""
        self._publisher = Publisher(log, transport)
        self._passes = PassOffice(key, lambda: self.state, board)
        self.room = WaitingRoom(spec.league.max_workers, lambda: self.state, self.write, board, clock)
        self._heard: dict[Member, float] = {}
        self._wishes: dict[Member, str] = {}
        self._founders: dict[int, Member] = {}  # stage -> whom it was left to found it
        self._refill = Refill(spec, transport, lambda: self.state, self.write, lambda: log.term, clock)
        self._silences = History()
        self._reduces = [History() for _ in range(spec.model.stages)]
        self._attempts: dict[int, OpenAttempt] = {}
        self._changed = [0] * spec.model.stages  # log position of each stage's latest change of members
        self._guests: dict[PeerId, float] = {}  # followers without a seat; when a standby was heard last
        for stage in state.stages:  # whom a coordinator before us had told to found it
            if not stage.versions and (waiting := state.seats_of(stage.index)):
                self._founders[stage.index] = waiting[0].member
        board.on(m.Join, self._on_join)
        for message, handler in (
            (m.Heartbeat, self._on_heartbeat),
            (m.Ready, self._on_ready),
            (m.Attend, self._on_attend),
            (m.Held, self._on_held),
            (m.Complain, self._on_complaint),
            (m.Broken, self._on_broken),
            (m.Leave, self._on_leave),
            (m.StageDone, self._on_stage_done),
            (m.Happened, self._on_happened),
            (m.Follow, self._on_follow),
            (m.Pulse, self._on_pulse),
        ):
            board.on(message, handler)

    async def run(self) -> None:
        """Watch members and reduces until the run has ended or the task is cancelled."""
        try:
            while self.state.phase not in (Phase.STOPPED, Phase.FAILED):
                await asyncio.sleep(HEARTBEAT.value / 4)
                self._watch_members()
                self._watch_guests()
                self.room.tick()
                self._refill.watch()
                self._watch_reduces()
            await self._publisher.drain(FAREWELL)
        finally:
            self.room.close()
            self._refill.close()
            self._publisher.close()

    def write(self, *events: ev.Event) -> None:
        """Append to the log, fold, publish. What every stage has stepped outlives a power cut.

        Raises DiskFull (or another StateError): what was not written has not happened, and the run ends, resumable.
        """
        if isinstance(self.failure, Fenced):
            raise self.failure
        now, held = time.time(), self.log.head.seq
        stamped = [msgspec.structs.replace(event, at=now) for event in events]
        try:
            records = self.log.append_many(stamped, sync=any(isinstance(e, _WORTH_A_SYNC) for e in events))
        except StateError as error:
            self.fail(error)
            raise
        assert len(records) == self.log.head.seq - held
        for event in stamped:
            self.state = apply(self.state, event)
            self._note(event)
        self._publisher.publish(records, lambda peer: any(self._concerns(event, peer) for event in events))
        if self.state.phase not in (Phase.TRAINING, Phase.PROPOSED):
            self.finished.set()

    def fail(self, error: StateError) -> None:
        """Write nothing more; whoever waits for the end is given the error."""
        self.failure = error
        self.finished.set()

    def follow_up(self, positions: Mapping[PeerId, int]) -> None:
        """Send the log to those who did not ask for it yet, each from the place that it told."""
        for peer, first in positions.items():
            self._publisher.add(peer, first)

    def _concerns(self, event: ev.Event, peer: PeerId) -> bool:
        """Whether a follower has to act on the event at once."""
        if peer in self._guests:
            return True
        if isinstance(event, ev.Queued | ev.Dequeued):
            return False
        if peer == self.state.trainer:
            return True
        match event:
            case ev.ReduceOpened() | ev.ReduceAborted() | ev.StageStepped() | ev.Disputed():
                seat = self.state.member_of(peer)
                return seat is not None and seat.stage == event.stage
            case ev.Contributed() | ev.StepMeasured() | ev.Evaluated() | ev.MomentumLost() | ev.ItemsReleased():
                return False
            case _:
                return True

    def vanished(self, worker: PeerId, reason: str) -> None:
        """Whoever started the process says that it has ended: no need to wait for silence."""
        seat = self.state.member_of(worker)
        if seat is not None and self.state.phase not in (Phase.STOPPED, Phase.FAILED):
            self.write(ev.SeatLeft(seat.member, reason))

    def revoke(self, worker: PeerId, reason: str) -> None:
        """This key takes no part any more: its seat and its pass are void, and it is given no other."""
        seat = self.state.member_of(worker)
        left = [] if seat is None else [ev.SeatLeft(seat.member, reason)]
        self.write(*left, ev.Revoked(worker, reason))

    def stop(self, reason: str) -> None:
        """Drain: the directory can be resumed from the last committed step."""
        if self.state.phase is Phase.TRAINING:
            self.write(ev.RunStopped(reason))

    # --- membership

    async def _on_join(self, peer: PeerId, message: m.Join, _body: bytearray) -> Answer:
        if self.state.phase in (Phase.FAILED, Phase.STOPPED):
            raise Refused(f"The run is {self.state.phase}: {self.state.reason}")
        old = self.state.member_of(peer)
        if old and self._wishes.get(old.member) == message.wish:
            return self._welcome(old, message)  # our answer got lost
        if old is None and not self.room.has_seat_for(peer, message):
            return await self.room.line_up(peer, message)
        if old:
            self.write(ev.SeatLeft(old.member, "its process started anew"))
        stage = self._stage_for(peer, message)
        member = Member(self.state.next_member)
        self._transport.learn(NodeAddr(peer, message.addresses))
        self.write(ev.Seated(member, peer, message.account, stage, self._free_seat(stage), message.addresses))
        self._heard[member] = self._clock()
        self._wishes[member] = message.wish
        return self._welcome(self.state.seats[member], message)

    def _welcome(self, seat: Seat, message: m.Join) -> m.Welcome:
        stage = self.state.stages[seat.stage]
        begin, shown = self._begin(stage, seat, message), self._passes.issued(seat)
        return m.Welcome(seat.member, seat.stage, seat.seat, begin, stage.step, self.state.spec, shown)

    def _stage_for(self, peer: PeerId, message: m.Join) -> int:
        """An account serves one stage for the life of the run; a newcomer is drawn to where capacity is least."""
        served = {s.stage for s in self.state.seats.values() if s.account == message.account}
        if served:
            stage = served.pop()
        elif message.stage is not None and 0 <= message.stage < len(self.state.stages):
            stage = message.stage
        else:
            loads = [StageLoad(s.index, len(self.state.seats_of(s.index))) for s in self.state.stages]
            stage = stage_for_joiner(loads, self.log.head.hash + peer.encode())
        living = sum(s.status is not SeatStatus.LEFT for s in self.state.seats.values())
        if living >= self.spec.league.max_workers:
            raise Refused(f"The league is full: it has {living} of {self.spec.league.max_workers} workers.")
        return stage

    def _free_seat(self, stage: int) -> int:
        taken = {s.seat for s in self.state.seats_of(stage)}
        return next(i for i in range(len(taken) + 1) if i not in taken)

    def _begin(self, stage: StageState, newcomer: Seat, message: m.Join) -> str:
        """How a newcomer gets the stage's state: from its own disk, from a living member, or by founding the stage.

        The disk comes first: it is quick, and may hold optimizer state that no living member has.
        """
        root = stage.root_at(stage.step)
        if root is not None and (stage.step, root) in message.have:
            return "load"
        if self.state.ready(stage.index) or root is not None:
            return "fetch"  # where nobody is ready it waits: the stage is emptied, and refills or all go back
        founder = self.state.seats.get(self._founders.get(stage.index, newcomer.member))
        if founder is None or founder.status is SeatStatus.LEFT:
            founder = newcomer
        self._founders[stage.index] = founder.member
        return "found" if founder.member == newcomer.member else "fetch"

    async def _on_follow(self, peer: PeerId, message: m.Follow, _body: bytearray) -> Answer:
        if message.stands_by or message.looks_on:
            self._admit_guest(peer, stands_by=message.stands_by)
        elif peer != self.state.trainer and self.state.member_of(peer) is None:
            raise Refused("Only members and the trainer of the run follow its log: ask for a seat first.")
        if message.addresses:
            self._transport.learn(NodeAddr(peer, message.addresses))
        self._publisher.add(
            peer, message.first, stands_by=message.stands_by, looks_on=message.looks_on and not message.stands_by
        )  # fmt: skip
        return m.Ack(self.log.head.seq + 1)

    def _admit_guest(self, peer: PeerId, *, stands_by: bool) -> None:
        """Whoever stands by or looks on may read what members read. Who may write is for the term store to say."""
        if peer not in self._guests and len(self._guests) >= GUESTS_ALLOWED:
            raise Refused(f"The run has {GUESTS_ALLOWED} standbys and onlookers, which are enough: end one first.")
        self._guests[peer] = self._clock() if stands_by else math.inf

    def _watch_guests(self) -> None:
        """A standby that has gone must not keep onlookers waiting. If it comes back it asks for the log again."""
        now, allowed = self._clock(), deadline(self._silences, floor=SILENCE_FLOOR).value
        for peer, heard in list(self._guests.items()):
            if now - heard > allowed:
                del self._guests[peer]
                self._publisher.remove(peer)

    async def _on_pulse(self, peer: PeerId, message: m.Pulse, _body: bytearray) -> Answer:
        if message.term != self.log.term or self.failure is not None:
            raise Refused(f"This node coordinates in term {self.log.term}, or not any more.")
        if peer in self._guests:
            self._guests[peer] = self._clock()
        return m.Ack(self.log.head.seq + 1)

    async def _on_ready(self, peer: PeerId, message: m.Ready, _body: bytearray) -> Answer:
        seat = self._seat(peer, message.member)
        stage = self.state.stages[seat.stage]
        if seat.status not in (SeatStatus.SYNCING, SeatStatus.ATTENDING):
            return m.Ack()  # a late twin; or unreachable, and its next heartbeat begins this anew
        if message.step != stage.step:
            raise Refused(f"Stage {seat.stage} is at step {stage.step} by now; you have {message.step}: fetch again.")
        root = stage.root_at(stage.step)
        if root is not None and root != message.root:
            raise Refused(
                f"Your weights of stage {seat.stage} at step {stage.step} are not those of the log: fetch them."
            )
        self.write(ev.SeatReady(seat.member, message.step, message.root))
        return m.Ack()

    async def _on_attend(self, peer: PeerId, message: m.Attend, _body: bytearray) -> Answer:
        seat = self._seat(peer, message.member)
        if seat.status is SeatStatus.SYNCING:
            self.write(ev.Attending(seat.member))
        return m.Ack()

    async def _on_heartbeat(self, peer: PeerId, message: m.Heartbeat, _body: bytearray) -> Answer:
        seat = self._seat(peer, message.member)
        now = self._clock()
        if seat.member in self._heard:
            self._silences = observe(self._silences, Seconds(now - self._heard[seat.member]))
        self._heard[seat.member] = now
        self.telemetry[seat.member] = message.telemetry
        if seat.status is SeatStatus.UNREACHABLE:
            self.write(ev.Returned(seat.member))
        return m.Ack(self.log.head.seq + 1)

    async def _on_leave(self, peer: PeerId, message: m.Leave, _body: bytearray) -> Answer:
        seat = self._seat(peer, message.member)
        finishes = message.finishes and seat.status is SeatStatus.READY and self.state.phase is Phase.TRAINING
        if finishes:
            self.write(ev.Draining(seat.member, message.reason[:200]))
        elif self.state.phase not in (Phase.STOPPED, Phase.FAILED) and not message.finishes:
            self.write(ev.SeatLeft(seat.member, message.reason[:200], drained=True))
        return m.Ack()

    async def _on_broken(self, peer: PeerId, message: m.Broken, _body: bytearray) -> Answer:
        """Something that no retry mends: the run ends here, whole, rather than going on wrongly."""
        if peer != self.state.trainer:
            self._seat(peer, message.member)
        if self.state.phase is Phase.TRAINING:
            self.write(ev.RunFailed(message.reason[:1000]))
        return m.Ack()

    def _seat(self, peer: PeerId, member: int) -> Seat:
        seat = self.state.seats.get(Member(member))
        if seat is None or seat.worker != peer or seat.status is SeatStatus.LEFT:
            raise Refused("You have no seat in this run (any more): ask for one.")
        return seat

    def _watch_members(self) -> None:
        now, allowed = self._clock(), deadline(self._silences, floor=SILENCE_FLOOR).value
        for member, seat in list(self.state.seats.items()):
            if seat.status is SeatStatus.LEFT:
                self._heard.pop(member, None)
                self._wishes.pop(member, None)
                self.telemetry.pop(member, None)
                continue
            silent = now - self._heard.setdefault(member, now)
            if seat.status is SeatStatus.UNREACHABLE:
                if silent > self.spec.league.grace_s:
                    self.write(ev.SeatLeft(member, f"unreachable for {Seconds(silent)}"))
            elif silent > allowed:
                self.write(ev.Unreachable(member, f"silent for {Seconds(silent)}"))

    # --- reduces

    async def _on_stage_done(self, peer: PeerId, message: m.StageDone, _body: bytearray) -> Answer:
        if peer != self.state.trainer:
            raise Refused("Only the trainer of the run says that a stage is done.")
        stage = self.state.stages[message.stage]
        if (stage.step, stage.attempt) != (message.step, message.attempt) or stage.reduce is not None:
            return m.Ack(self.log.head.seq + 1)  # a late twin
        if message.seen < self._changed[message.stage]:
            raise Refused("The stage's members have changed since: look at the log, and say again.")
        able = self.state.seats_of(stage.index, SeatStatus.READY, SeatStatus.DRAINING)
        able = [s for s in able if s.status is SeatStatus.READY or s.member in message.members]
        members = [s.member for s in able if self.state.may_contribute(s.member, stage.step)]
        sets = self._checked_sets(stage, members, dict(zip(message.members, message.sets, strict=True)))
        now = self._clock()
        until = now + deadline(self._reduces[stage.index], floor=REDUCE_FLOOR).value
        self._attempts[stage.index] = OpenAttempt(stage.attempt, until, now)
        attendees = tuple(s.member for s in self.state.seats_of(stage.index, SeatStatus.ATTENDING))
        self.write(ev.ReduceOpened(stage.index, stage.step, stage.attempt, tuple(members), sets, attendees))
        return m.Ack(self.log.head.seq + 1)

    def _checked_sets(self, stage: StageState, members: list[Member], claimed: dict[int, bytes]) -> tuple[bytes, ...]:
        """Each item in exactly one set, dropped ones in none, and nobody's set without its member."""
        if not set(claimed) <= set(members):
            raise Refused("A contribution of a member that is not there (any more) cannot be reduced.")
        items = [i for bitmap in claimed.values() for i in unpack(bitmap)]
        expected = set(range(self.state.microbatches)) - stage.dropped
        if len(items) != len(set(items)) or set(items) != expected:
            raise Refused(f"The sets of stage {stage.index} do not cover its items exactly once.")
        return tuple(claimed.get(member, b"") for member in members)

    async def _on_held(self, peer: PeerId, message: m.Held, _body: bytearray) -> Answer:
        seat = self._seat(peer, message.member)
        attempt = self._attempt(message.stage, message.step, message.attempt)
        if attempt is None or seat.stage != message.stage:
            return m.Ack()
        attempt.held[seat.member] = message
        self._commit_if_held(self.state.stages[message.stage], attempt)
        return m.Ack()

    def _commit_if_held(self, stage: StageState, attempt: OpenAttempt) -> None:
        assert stage.reduce is not None
        if set(stage.reduce.members) != set(attempt.held):
            return
        first = attempt.held[stage.reduce.members[0]]
        if len({held.root for held in attempt.held.values()}) > 1:
            self.write(ev.ReduceAborted(stage.index, stage.step, attempt.attempt, "members hold different bytes"))
            return
        self._reduces[stage.index] = observe(self._reduces[stage.index], Seconds(self._clock() - attempt.began))
        lost = tuple(sorted({name for held in attempt.held.values() for name in held.momentum_lost}))
        self.write(
            *([ev.MomentumLost(stage.index, stage.step, lost)] if lost else []),
            *self._contributions(stage),
            ev.StageStepped(
                stage.index, stage.step, attempt.attempt, first.root, first.gradient_norm, first.penalised
            ),
        )  # fmt: skip

    def _contributions(self, stage: StageState) -> Iterable[ev.Contributed]:
        assert stage.reduce is not None
        model, train = self.spec.model, self.spec.train
        flops = item_flops(model, stage.index, train.microbatch, model.context).total.count
        for member, bitmap in zip(stage.reduce.members, stage.reduce.sets, strict=True):
            if items := len(unpack(bitmap)):
                tokens = items * train.microbatch * model.context
                yield ev.Contributed(member, stage.index, stage.step, bitmap, tokens, items * flops)

    async def _on_complaint(self, peer: PeerId, message: m.Complain, _body: bytearray) -> Answer:
        seat = self._seat(peer, message.member)
        attempt = self._attempt(message.stage, message.step, message.attempt)
        if attempt is None or seat.stage != message.stage:
            return m.Ack()
        stage = self.state.stages[message.stage]
        assert stage.reduce is not None
        about = Member(message.about)
        if about not in stage.reduce.members:
            return m.Ack()
        if about == seat.member:  # its gradient is not what the log lists: out of the step with it, whole
            self.write(ev.Unreachable(about, message.reason[:200]))
        elif message.tensor:
            self._dispute(stage, about, seat.member, message)
        else:
            attempt.blamed.add(about)
        return m.Ack()

    def _dispute(self, stage: StageState, owner: Member, second: Member, message: m.Complain) -> None:
        """Two members got different updates from the same slices. Two cannot judge each other: try again, then stop."""
        self.write(ev.Disputed(stage.index, stage.step, message.attempt, owner, second, message.tensor, message.error))
        if self.state.stages[stage.index].disputes >= DISPUTES_ALLOWED:
            self.write(
                ev.RunFailed(
                    f"Members {owner} and {second} of stage {stage.index} keep computing different updates of "
                    f"{message.tensor} (by {message.error:.1e}): one of the machines is wrong. Test both, then resume."
                )
            )

    def _attempt(self, stage: int, step: int, attempt: int) -> OpenAttempt | None:
        """The open attempt that a message speaks of, or None if that is over."""
        if not 0 <= stage < len(self.state.stages):
            return None
        reduce, known = self.state.stages[stage].reduce, self._attempts.get(stage)
        if reduce is None or known is None or (reduce.step, reduce.attempt) != (step, attempt):
            return None
        return known if known.attempt == attempt else None

    def _watch_reduces(self) -> None:
        """A reduce past its deadline goes on without those who were waited for in vain."""
        now = self._clock()
        for stage in self.state.stages:
            attempt = self._attempts.get(stage.index)
            if stage.reduce is None or attempt is None or now < attempt.until:
                continue
            self._reduces[stage.index] = missed(self._reduces[stage.index])  # it may be the links that are slow
            late = set(stage.reduce.members) - set(attempt.held)
            blamed = (attempt.blamed & late) or late
            if blamed >= set(stage.reduce.members):
                self.write(ev.ReduceAborted(stage.index, stage.step, attempt.attempt, "nobody finished in time"))
                continue
            for member in sorted(blamed):
                self.write(ev.Excluded(member, stage.step, "did not finish the reduce in time"))

    # --- what a trainer reports

    async def _on_happened(self, peer: PeerId, message: m.Happened, _body: bytearray) -> Answer:
        if peer != self.state.trainer:
            raise Refused("Only the trainer of the run reports its events.")
        event = ev.decode(message.event)
        if not isinstance(event, _TRAINER_MAY):
            raise Refused(f"A trainer does not decide {type(event).__name__}.")
        if isinstance(event, ev.RunCompleted) and self.state.step < self.spec.train.steps:
            raise Refused("The run is not complete: a stage has steps to take.")
        if self.state.phase is Phase.TRAINING:
            self.write(event)
        return m.Ack(self.log.head.seq + 1)

    def _note(self, event: ev.Event) -> None:
        """Bookkeeping that follows from what was just written."""
        position = self.log.head.seq
        match event:
            case (
                ev.SeatReady(member=member)
                | ev.Unreachable(member=member)
                | ev.SeatLeft(member=member)
                | ev.Excluded(member=member)
            ):
                self._changed[self.state.seats[member].stage] = position
            case ev.RunResumed():
                self._changed = [position] * len(self._changed)
                self._founders.clear()
            case ev.TermBegan():
                self._changed = [position] * len(self._changed)
            case _:
                pass
        for index in list(self._attempts):
            if self.state.stages[index].reduce is None:
                del self._attempts[index]
        if isinstance(event, ev.SeatLeft):
            self._publisher.remove(PeerId(self.state.seats[event.member].worker))
