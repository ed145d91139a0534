"""The trainer: draws microbatches, owns their leases and claims, picks routes, collects losses.

It holds no weights and sees no boundary tensor. Everything it does follows from the log, from claims and from time, in
one function, `_advance`, that is run whenever one of them has moved. Knows nothing of transport details and of torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from koinon.data import Dataset
from koinon.errors import PeerError, Refused
from koinon.net.identity import NodeKey
from koinon.net.transport import Answer, Transport
from koinon.nodes import messages as m
from koinon.nodes.clock import loop_time
from koinon.nodes.flight import NOBODY, Flight, ids_of, packed_ids
from koinon.nodes.follower import RunFollower, insist
from koinon.nodes.messages import Kind
from koinon.nodes.switchboard import Switchboard
from koinon.run import events as ev
from koinon.run.events import Member
from koinon.run.items import pack
from koinon.run.policies.deadlines import History, deadline, observe
from koinon.run.policies.routes import WorkerLoad, pick_route, replacement, started
from koinon.run.spec import RunSpec
from koinon.run.state import Phase, RunState, Seat
from koinon.units import PeerId, Seconds

T = TypeVar("T")
LEASE_DOMAIN = "koinon/lease/1"
FLIGHT_FLOOR = Seconds(10.0)
"""No microbatch is called late before that."""
TERM_PATIENCE = Seconds(1.0)
"""How long a worker that is ahead of us in the log is kept waiting."""
FAILURES_ALLOWED = 3
"""Distinct accounts that may fail at one item before it is dropped."""


class Trainer:
    """One run's trainer. `sample` may be called while it runs."""

    def __init__(
        self,
        spec: RunSpec,
        dataset: Dataset,
        seed: bytes,
        transport: Transport,
        board: Switchboard,
        key: NodeKey,
        coordinator: PeerId,
        follower: RunFollower,
        *,
        loads: Callable[[Member], m.Telemetry] = lambda _member: m.Telemetry(),
        clock: Callable[[], float] = loop_time,
        trains: bool = True,
    ) -> None:
        """trains: False serves samples of the weights as they are, and opens no step."""
        self._trains = trains
        self._has_heldout = dataset.tokens_heldout > spec.model.context
        self.spec, self._dataset, self._seed, self._transport, self._key = spec, dataset, seed, transport, key
        self._coordinator, self._follower, self._loads, self._clock = coordinator, follower, loads, clock
        self._flights: dict[tuple[int, int, int], Flight] = {}
        self._waiting: deque[Flight] = deque()
        self._opened = -1  # the newest step whose microbatches have been drawn
        self._evaluated = -1
        self._measured: int | None = None
        self._asked: dict[int, tuple[int, int, int]] = {}  # stage -> (step, attempt, log position) of our StageDone
        self._durations = History()
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._samples: dict[tuple[int, int, int], asyncio.Future[int]] = {}
        self._draws = 0
        board.on(m.Claims, self._on_claims)
        follower.listen(self._on_event)

    @property
    def state(self) -> RunState:
        return self._follower.state

    async def run(self) -> None:
        """Train until the run has ended or the task is cancelled."""
        try:
            while self.state.phase not in (Phase.STOPPED, Phase.FAILED):
                self._wake.clear()
                self._advance()
                try:
                    async with asyncio.timeout(0.5):
                        await self._wake.wait()
                except TimeoutError:
                    self._nudge_late()
        finally:
            for task in self._tasks:
                task.cancel()

    # --- what moves it

    def _on_event(self, event: ev.Event, state: RunState) -> None:
        match event:
            case ev.SeatLeft(member=member, drained=drained):
                self._take_back(member, state.step, "SeatLeft", may_be_the_item=not drained)
            case ev.Unreachable(member=member):
                self._take_back(member, state.step, "Unreachable")
            case ev.Draining(member=member):
                self._hand_back(member)
            case ev.Excluded(member=member, step=step):
                self._take_back(member, step, "excluded", only=step)
            case ev.RunResumed(step=step):
                self._start_over(step)
            case ev.StageStepped(stage=stage, step=step):
                for flight in self._flights.values():
                    if flight.kind is Kind.TRAIN and flight.step == step:
                        flight.committed[stage] = True
            case _:
                pass
        self._wake.set()

    async def _on_claims(self, peer: PeerId, message: m.Claims, _body: bytearray) -> Answer:
        await self._reach_term(message.term)
        seat = self.state.member_of(peer)
        if seat is None:
            raise Refused("You have no seat in this run: ask for one.")
        if message.term != self.state.term:
            raise Refused(
                f"These claims are of term {message.term}, and this is term {self.state.term}: they are void."
            )
        for finished in message.finished:
            self._note_inherited(seat, finished)
            if finished.kind is not Kind.TRAIN or seat.voids == message.voids:
                self._note_finished(seat, finished)
        granted = tuple(i for i, claim in enumerate(message.claims) if self._grants(seat, claim, message.voids))
        if message.finished:
            self._wake.set()
        return m.Granted(granted)

    async def _reach_term(self, term: int) -> None:
        """A worker may have heard of our term before we have; then its flights are drawn, for it has things to tell."""
        if self.state.term < term:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TERM_PATIENCE.value):
                    while self.state.term < term:
                        await asyncio.sleep(0.01)
        if self._opened < 0 and self._trains and self.state.phase is Phase.TRAINING and self.state.term == term:
            self._open_steps()

    def _grants(self, seat: Seat, claim: m.Claim, voids: int) -> bool:
        """A lease may overtake the log: whoever has yet to read that its gradient was thrown out would throw away what
        it folds now, and say before that it is folded. When it has read that far it asks again."""
        if seat.voids != voids:
            return False
        flight = self._flights.get((int(Kind.TRAIN), claim.step, claim.microbatch))
        stage = self.state.stages[seat.stage]
        if flight is None or claim.step != stage.step or claim.microbatch in stage.dropped:
            return False
        if not self.state.may_contribute(seat.member, claim.step):
            return False
        return flight.claim(seat.stage, seat.member, claim.revision)

    def _note_inherited(self, seat: Seat, finished: m.Finished) -> None:
        """The cost of an item of a step that was taken under a trainer before us. Nothing voids it."""
        flight = self._flights.get((int(finished.kind), finished.step, finished.microbatch))
        if flight is not None and flight.is_inherited and flight.value is None and seat.stage == len(flight.route) - 1:
            flight.value = finished.value

    def _note_finished(self, seat: Seat, finished: m.Finished) -> None:
        flight = self._flights.get((int(finished.kind), finished.step, finished.microbatch))
        if flight is None or not flight.finish(seat.stage, seat.member, finished.revision, finished.value):
            return
        flight.nudged = self._clock()
        if flight.is_over:
            self._durations = observe(self._durations, Seconds(self._clock() - flight.began))
        if flight.kind is Kind.SAMPLE and finished.value is not None:
            future = self._samples.pop(flight.key, None)
            del self._flights[flight.key]
            if future is not None and not future.done():
                future.set_result(int(finished.value))

    def _take_back(
        self, member: Member, first: int, reason: str, *, only: int | None = None, may_be_the_item: bool = False
    ) -> None:
        """Everything that a lost member still had to do, or had folded and not committed, is to be leased again.

        Only a process that ended may have ended because of an item: links that fail say nothing against one.
        """
        accounts = {member: self.state.seats[member].account} if may_be_the_item else {}
        taken: dict[tuple[int, int], list[int]] = {}
        for flight in self._flights.values():
            if flight.kind is Kind.TRAIN and (flight.step < first or (only is not None and flight.step != only)):
                continue
            for stage in flight.unassign([member], accounts):
                if flight.kind is Kind.TRAIN and not flight.committed[stage]:
                    taken.setdefault((flight.step, stage), []).append(flight.microbatch)
        for (step, stage), items in taken.items():
            self._report(ev.ItemsReleased(step, stage, member, pack(items), reason))

    def _hand_back(self, member: Member) -> None:
        """A member that is about to leave finishes what it has claimed; the rest goes to others, if there are any."""
        stage = self.state.seats[member].stage
        for flight in self._flights.values() if self.state.ready(stage) else ():
            if flight.route[stage] == member and not (flight.claimed[stage] or flight.done[stage]):
                flight.unassign([member], {})

    def _start_over(self, step: int) -> None:
        """What lies beyond `step` is void, and every worker takes its seat anew."""
        flights = list(self._flights.values())
        self._flights.clear()
        self._waiting.clear()
        for flight in flights:
            flight.revision += 1  # whoever still offers it stops
            if flight.kind is Kind.SAMPLE:
                again = self._enqueue(Kind.SAMPLE, step, flight.microbatch, flight.tokens)
                again.sampling = flight.sampling
                self._samples[again.key] = self._samples.pop(flight.key)
        self._opened = self._evaluated = step - 1
        self._measured = None
        self._asked.clear()

    # --- one round of decisions

    def _advance(self) -> None:
        if not self.state.stages:
            return
        if self._trains and self.state.phase is Phase.TRAINING:
            self._open_steps()
        self._reroute()
        self._lease_waiting()
        if self.state.phase is not Phase.TRAINING:
            return
        self._close_stages()
        self._measure()
        self._forget()
        self._complete()

    def _open_steps(self) -> None:
        """Draw the microbatches of the step that stage 0 stands at, and the evaluation that is due there."""
        step = self.state.stages[0].step
        train = self.spec.train
        if self._evaluated < step and self._evaluation_due(step):
            self._evaluated = step
            context, size = self.spec.model.context, train.microbatch
            for batch in self._dataset.heldout_batches(train.eval_sequences, size, context):
                self._enqueue(Kind.EVAL, step, batch.index, _joined(batch.ids, batch.targets))
        if self._opened < 0:
            # A trainer before us may have left stages one step apart, and the costs of the last step untold.
            untold = self._told() + 1
            self._opened = min(self.state.step, max(untold, self.state.step - 1)) - 1
        while self._opened < min(step, train.steps - 1):
            self._opened += 1
            at, size = self._opened, train.microbatch
            for batch in self._dataset.batch(self._seed, at, train.batch, size, self.spec.model.context):
                self._enqueue(Kind.TRAIN, at, batch.index, _joined(batch.ids, batch.targets))

    def _evaluation_due(self, step: int) -> bool:
        train = self.spec.train
        if not self._has_heldout:
            return False
        if self.state.heldout is not None and self.state.heldout[0] >= step:
            return False
        return step == train.steps or (train.eval_every > 0 and step % train.eval_every == 0)

    def _enqueue(self, kind: Kind, step: int, index: int, tokens: Any) -> Flight:
        nowhere = [NOBODY] * len(self.state.stages)
        flight = Flight(kind, step, index, tokens, nowhere, self._clock())
        if kind is Kind.TRAIN:
            flight.committed = [s.step > step for s in self.state.stages]
            flight.done = [
                s.step > step or (s.step == step and index in s.dropped) for s in self.state.stages
            ]  # fmt: skip
            flight.is_inherited = flight.committed[-1]
        self._flights[flight.key] = flight
        if not all(flight.done):
            self._waiting.append(flight)
        return flight

    def _lease_waiting(self) -> None:
        leased = list[Flight]()
        while self._waiting and self._has_room(self._waiting[0]):
            flight = self._waiting[0]
            route = self._route(flight)
            if route is None:
                break  # a stage is empty: it refills, and then we are woken
            self._waiting.popleft()
            for stage, member in enumerate(route):
                flight.assign(stage, member)
            flight.began = flight.nudged = self._clock()
            leased.append(flight)
        self._offer(leased)

    def _has_room(self, flight: Flight) -> bool:
        """Whether one more item may be leased.

        Training items are leased ahead, so that offers, claims and news travel many in one message; how many of them
        are begun is the first stage's to decide. Items that nobody folds are begun as soon as they are leased: no more
        of them than compute, and no training items far ahead of them, whose step would leave them behind.
        """
        open_ = [f for f in self._flights.values() if f.revision and not f.is_over]
        unfolded = sum(f.kind is not Kind.TRAIN for f in open_)
        replicas, in_flight = [max(1, len(self.state.ready(s.index))) for s in self.state.stages], self._in_flight
        begun = started(replicas, in_flight, crossing=self._crossing())
        if flight.kind is not Kind.TRAIN:
            return unfolded < begun
        return len(open_) < (begun if unfolded else in_flight * min(replicas))

    def _crossing(self) -> float:
        """Seconds of one crossing per second of one item's compute at a stage, as members have measured them."""
        told = [self._loads(seat.member) for stage in self.state.stages for seat in self.state.ready(stage.index)]
        measured = [t for t in told if t.seconds_per_crossing and t.seconds_per_item]
        if not measured:
            return 0.0
        return sum(t.seconds_per_crossing for t in measured) / sum(t.seconds_per_item for t in measured)

    @property
    def _in_flight(self) -> int:
        return self.spec.league.in_flight

    def _route(self, flight: Flight) -> tuple[Member, ...] | None:
        stages = [self._stage_loads(s.index, flight) for s in self.state.stages]
        if not all(stages):
            return None
        by_worker = {load.worker: member for stage in stages for member, load in stage}
        picked = pick_route(flight.step, flight.microbatch, [[load for _, load in stage] for stage in stages])
        return tuple(by_worker[worker] for worker in picked)

    def _stage_loads(self, stage: int, flight: Flight) -> list[tuple[Member, WorkerLoad]]:
        """The members that may take an item of the stage, with what they have to do already."""
        able = [s for s in self.state.ready(stage) if self.state.may_contribute(s.member, flight.step)]
        queued = dict.fromkeys((s.member for s in able), 0)
        for other in self._flights.values():
            member = other.route[stage]
            if member in queued and not other.done[stage] and not other.is_over:
                queued[member] += 1
        return [(s.member, self._load(s, queued[s.member])) for s in able]

    def _load(self, seat: Seat, queued: int) -> WorkerLoad:
        measured = self._loads(seat.member).seconds_per_item
        return WorkerLoad(worker=PeerId(seat.worker), queued=queued, seconds_per_item=measured or 0.1)

    def _reroute(self) -> None:
        """Give the items of lost members to others, or to those who came instead."""
        moved = []
        for flight in list(self._flights.values()):
            if flight.revision == 0 or flight.is_routed or (flight.is_over and flight.kind is not Kind.TRAIN):
                continue
            if all(flight.done):
                continue  # nothing hangs on it any more
            if not all(self._reassign(flight, s) for s, mem in enumerate(flight.route) if mem == NOBODY):
                continue
            moved.append(flight)
        self._offer(moved, whole=True)

    def _reassign(self, flight: Flight, stage: int) -> bool:
        if len(flight.accounts[stage] - {""}) >= FAILURES_ALLOWED and not flight.committed[stage]:
            self._drop(flight)
            return False
        loads = self._stage_loads(stage, flight)
        chosen = replacement([load for _, load in loads], excluding=frozenset())
        if chosen is None:
            return False
        flight.assign(stage, next(member for member, load in loads if load.worker == chosen))
        return True

    def _drop(self, flight: Flight) -> None:
        """An item that failed on three accounts: the stages that have not folded it go on without it."""
        stages = tuple(s for s, done in enumerate(flight.done) if not done)
        self._report(ev.ItemDropped(flight.step, flight.microbatch, stages, "failed on three accounts"))
        for stage in stages:
            flight.done[stage] = True

    def _offer(self, flights: Sequence[Flight], *, whole: bool = False) -> None:
        """Tell everyone on the routes. New items reach later stages' members as leases, to be claimed all at once;
        their ids come from the stage before. `whole`: with ids for all, who may have lost their neighbours."""
        offers: dict[Member, list[tuple[Flight, m.Offered]]] = {}
        for flight in flights:
            lease = flight.lease(self.spec.train.batch * self.spec.model.context, self.state.term)
            lease = m.signed(lease, self._key.sign(LEASE_DOMAIN, lease.unsigned()))
            ids = ids_of(flight.tokens, self.spec.model.vocab)
            claimed = flight.kind is Kind.TRAIN
            for member in dict.fromkeys(flight.route if whole or claimed else flight.route[:1]):
                carried = ids if whole or member == flight.route[0] else None
                offers.setdefault(member, []).append((flight, m.Offered(lease, carried)))
        for member, items in offers.items():
            for some in batched(items, m.OFFERED_AT_ONCE):
                self._spawn(self._deliver(member, some))

    async def _deliver(self, member: Member, items: Sequence[tuple[Flight, m.Offered]]) -> None:
        """Until the worker has them, or no offer is up to date."""
        pause = 0.05
        while items := [(f, o) for f, o in items if f.revision == o.lease.revision and member in f.route]:
            body = b"".join(packed_ids(f.tokens, o.ids) for f, o in items if o.ids is not None)
            offer = m.Offer(tuple(o for _, o in items), bool(self._waiting), self._crossing(), len(body))
            try:
                await self._transport.push(PeerId(self.state.seats[member].worker), m.WORK, offer, body)
            except PeerError:
                await asyncio.sleep(pause)
                pause = min(2 * pause, 2.0)
            else:
                return

    def _close_stages(self) -> None:
        """Say so when every item of a stage's step is folded."""
        for stage in self.state.stages:
            flights = [f for f in self._flights.values() if f.kind is Kind.TRAIN and f.step == stage.step]
            if stage.reduce is not None or not flights or self._opened < stage.step:
                continue
            if any(not f.done[stage.index] for f in flights):
                continue
            seen = self._follower.next_seq - 1
            if self._asked.get(stage.index) == (stage.step, stage.attempt, seen):
                continue
            self._asked[stage.index] = (stage.step, stage.attempt, seen)
            self._spawn(self._say_done(stage.index, stage.step, stage.attempt, seen, flights))

    async def _say_done(self, stage: int, step: int, attempt: int, seen: int, flights: list[Flight]) -> None:
        sets: dict[Member, list[int]] = {}
        dropped = self.state.stages[stage].dropped
        for flight in flights:
            if flight.microbatch not in dropped:
                sets.setdefault(flight.route[stage], []).append(flight.microbatch)
        members = tuple(sorted(sets))
        message = m.StageDone(stage, step, attempt, seen, members, tuple(pack(sets[mem]) for mem in members))
        try:
            await insist(self._transport, self._coordinator, m.CTL, message)
        except Refused:
            self._wake.set()  # the log has moved: what it says now decides

    def _told(self) -> int:
        """The newest step whose loss the log has."""
        return -1 if self.state.loss is None else self.state.loss[0]

    def _measure(self) -> None:
        """J of a step, once every stage has taken it; and evaluations, once they are whole."""
        if self._measured is None:
            self._measured = min(self.state.step - 1, max(self._told(), self.state.step - 2))
        while self._measured + 1 < self.state.step:
            flights = [f for f in self._flights.values() if f.kind is Kind.TRAIN and f.step == self._measured + 1]
            untold = [f for f in flights if f.is_inherited and f.value is None]
            if untold and self._clock() - untold[0].began < FLIGHT_FLOOR.value:
                return
            step = self._measured = self._measured + 1
            if untold:
                continue  # nobody is left who folded it: its loss is not known
            values = [f.value for f in flights if f.value is not None]
            if not values:
                continue  # taken before this trainer came
            tokens = len(values) * self.spec.train.microbatch * self.spec.model.context
            loss = math.fsum(values) / tokens
            made = [v.penalised for s in self.state.stages for v in s.versions if v.step == step + 1]
            squares = math.fsum(made)
            penalty = self.spec.optim.l2 / (2 * tokens) * squares
            self._report(ev.StepMeasured(step, loss, penalty, tokens))
        evals: dict[int, list[Flight]] = {}
        for flight in self._flights.values():
            if flight.kind is Kind.EVAL:
                evals.setdefault(flight.step, []).append(flight)
        for step, flights in evals.items():
            if all(f.is_over for f in flights):
                tokens = sum(f.tokens.shape[0] * (f.tokens.shape[1] - 1) for f in flights)
                self._report(ev.Evaluated(step, math.fsum(f.value or 0.0 for f in flights) / tokens, tokens))
                for flight in flights:
                    del self._flights[flight.key]

    def _forget(self) -> None:
        """Steps that every stage has taken need nothing more."""
        step = self.state.step
        for key, flight in list(self._flights.items()):
            if flight.kind is Kind.TRAIN and flight.step < step and flight.step <= (self._measured or 0):
                del self._flights[key]

    def _complete(self) -> None:
        steps = self.spec.train.steps
        if self.state.step < steps or self._asked.get(-1) is not None:
            return
        if not self._evaluation_due(steps) and (self._measured or 0) >= steps - 1:
            self._asked[-1] = (steps, 0, 0)
            self._report(ev.RunCompleted(steps))

    def _nudge_late(self) -> None:
        """A microbatch that has not moved for long: offer it to all on its route again. Repeats are harmless."""
        now, allowed, late = self._clock(), deadline(self._durations, floor=FLIGHT_FLOOR).value, []
        for flight in self._flights.values():
            if flight.revision and flight.is_routed and not flight.is_over and now - flight.nudged > allowed:
                flight.nudged = now
                flight.revision += 1
                late.append(flight)
        self._offer(late, whole=True)

    # --- sampling

    async def sample(self, prompt: list[int], *, temperature: float, seed: int) -> int:
        """One token after `prompt`, drawn by the last stage. Raises PeerError if the league cannot answer."""
        while not self.state.stages:  # the log is on its way
            await asyncio.sleep(0.05)
        self._draws += 1
        step = self.state.stages[0].step
        window_ = np.asarray([prompt[-self.spec.model.context :]], dtype=np.int32)
        flight = self._enqueue(Kind.SAMPLE, step, self._draws, window_)
        flight.sampling = (temperature, seed)
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._samples[flight.key] = future
        self._waiting.remove(flight)
        self._waiting.appendleft(flight)
        self._lease_waiting()
        return await future

    # --- plumbing

    def _report(self, event: ev.Event) -> None:
        self._spawn(self._tell(event))

    async def _tell(self, event: ev.Event) -> None:
        await insist(self._transport, self._coordinator, m.CTL, m.Happened(ev.encode(event)))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) and not isinstance(error, Refused):
            raise error


def batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Slices of at most that many."""
    return (items[start : start + size] for start in range(0, len(items), size))


def _joined(ids: Any, targets: Any) -> Any:
    """(b, T) ids and their targets as one (b, T + 1) array."""
    return np.concatenate([ids, targets[:, -1:]], axis=1)
