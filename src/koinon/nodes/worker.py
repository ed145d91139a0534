"""A worker: one stage, one compute thread, and the wiring between its bench, its engine and its neighbours.

What it computes is the engine's business, what it may compute is the bench's, how a step is summed is the reducer's,
how it gets its state is the syncer's. Here messages meet them. Knows nothing of other stages' weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from koinon.errors import DiskFull, FrameMalformed, KoinonError, NumericsError, PeerError, Refused
from koinon.model.codec import nbytes
from koinon.model.flops import item_flops
from koinon.net.identity import NodeKey, verify
from koinon.net.transport import DONE, Answer, Busy, Drop, Transport, Verdict
from koinon.nodes import messages as m
from koinon.nodes.applicant import Applicant
from koinon.nodes.claims import Claimant
from koinon.nodes.compute import Compute
from koinon.nodes.counters import Counters
from koinon.nodes.courier import Courier
from koinon.nodes.departure import Departure
from koinon.nodes.engine import Engine
from koinon.nodes.faults import Point, Reach, nothing
from koinon.nodes.flight import unpacked_ids
from koinon.nodes.follower import RunFollower
from koinon.nodes.messages import Kind
from koinon.nodes.pass_keeper import PassKeeper
from koinon.nodes.reducer import Reducer
from koinon.nodes.report import Report
from koinon.nodes.seating import Seating
from koinon.nodes.switchboard import Switchboard
from koinon.nodes.syncer import Syncer
from koinon.nodes.trainer import LEASE_DOMAIN
from koinon.nodes.workbench import Item, Job, JobKind, Workbench
from koinon.run import events as ev
from koinon.run.events import Member
from koinon.run.policies.routes import started
from koinon.run.state import Phase, RunState, SeatStatus
from koinon.run.terms import TermStore
from koinon.units import PeerId, RunId, Seconds

log = logging.getLogger(__name__)
FAREWELL = Seconds(1.0)


def _predicts(lease: m.Lease) -> int:
    """1 where the ids of an item are followed by the last one's target."""
    return int(lease.kind is not Kind.SAMPLE)


class Worker:
    """One incarnation of a worker. `run` takes a seat, works, and returns when the run has ended or it was unseated."""

    def __init__(
        self,
        transport: Transport,
        board: Switchboard,
        key: NodeKey,
        compute: Compute,
        *,
        coordinator: PeerId,
        run: RunId,
        directory: Path,
        account: str,
        stage: int | None = None,
        secret: bytes | None = None,
        reach: Reach = nothing,
        terms: TermStore | None = None,
    ) -> None:
        """secret: 32 bytes that a founding replica draws its stage from; fresh entropy if not given. terms: whom to
        ask who coordinates, if `coordinator` does no more."""
        self._transport, self._key, self._compute, self._reach = transport, key, compute, reach
        self._follower = RunFollower(transport, board, coordinator, run, terms=terms)
        self._follower.went_astray = self._go_astray
        self._syncer = Syncer(transport, board, compute, directory, secret)
        self.applicant = Applicant(self._follower)
        self._passes = PassKeeper(transport, self._follower, run)
        self._engine: Engine | None = None
        self._bench: Workbench | None = None
        self._reducer: Reducer | None = None
        self._work = asyncio.Event()
        self._claimant: Claimant | None = None
        self._courier: Courier | None = None
        self._departure: Departure | None = None
        self._ended = asyncio.Event()
        self._goodbye = False
        self._voids = 0  # of our seat, as far as we have acted on them
        self._crossing = 0.0
        self._costs: dict[tuple[int, int], float] = {}
        """(step, microbatch) -> cost that this worker found, as last stage: a trainer's successor asks for it."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._telemetry = Counters()
        self._state = "joining"
        self._seating = Seating(
            transport,
            account,
            stage,
            self._follower,
            self._syncer,
            self._ask_for_seat,
            self._telemetry_now,
        )
        self._register(board)

    @property
    def state(self) -> RunState:
        return self._follower.state

    @property
    def follower(self) -> RunFollower:
        return self._follower

    def report(self) -> Report:
        """What it does now, for whoever watches its process."""
        state, counted = self.state, self._telemetry
        mine, waiting = state.member_of(self._transport.me), self.applicant.waiting
        if waiting is not None:
            return Report("waiting", ticket=waiting.ticket, position=waiting.position, waits_for=waiting.why)
        return Report(
            self._state,
            state.phase,
            state.reason,
            None if mine is None else mine.stage,
            None if mine is None else mine.seat,
            state.step,
            counted.items,
            counted.tokens,
        )

    def _register(self, board: Switchboard) -> None:
        limit = self._body_limit
        board.on(m.Offer, self._on_offer, limit)
        board.on(m.Forward, self._on_forward, limit)
        board.on(m.Backward, self._on_backward, limit)
        board.on(m.Slice, self._on_reduce_message, limit)
        board.on(m.Updated, self._on_reduce_message, limit)
        board.on(m.Norms, self._on_reduce_message)

    # --- life

    async def run(self, addresses: tuple[str, ...]) -> None:
        """Join (reachable at `addresses`), work, leave. Raises KoinonError when it cannot begin.

        When a living league goes back to an older step, every worker takes its seat anew, from its own snapshot.
        """
        self._follower.listen(self._on_event)
        seeking = asyncio.create_task(self._follower.keep_seeking(), name="seeking")
        seeking.add_done_callback(self._observe)
        try:
            while await self._serve(addresses):
                log.info("the league went back to step %s: taking a seat anew", self.state.step)
                self._engine = self._bench = self._reducer = self._claimant = self._courier = self._departure = None
                self._costs.clear()
                self._ended.clear()
        finally:
            seeking.cancel()

    async def _serve(self, addresses: tuple[str, ...]) -> bool:
        """One seat, from joining to its end. True if the league went back and this worker with it."""
        welcome, spec, engine, beats = await self._seating.take(addresses)
        self._adopt(beats)
        beats.add_done_callback(lambda _: self._ended.set())
        resumes = self.state.tally.resumes
        if self.state.seats[Member(welcome.member)].status is SeatStatus.LEFT:  # while it began
            resumes -= 1
            self._ended.set()
        self._engine = engine
        self._bench = bench = Workbench(
            welcome.member, welcome.stage, spec.model.stages, engine.step, spec.league.in_flight
        )
        self._voids = self.state.seats[Member(welcome.member)].voids
        self._claimant = Claimant(
            bench, self._transport, lambda: self.state, lambda: self._voids, self._work, self._reach
        )
        self._courier = Courier(
            bench, self._transport, lambda: self.state, self._telemetry, spec.model.vocab, self._spawn
        )
        self._reducer = Reducer(
            spec,
            engine,
            Member(welcome.member),
            welcome.stage,
            self._transport,
            self._compute,
            self._syncer,
            self._follower,
            lambda: self.state,
            self._give_up,
            self._reach,
        )
        self._departure = Departure(self._follower, bench, engine, self._syncer, lambda: self.state)
        self._telemetry.flops_per_item = item_flops(
            spec.model, welcome.stage, spec.train.microbatch, spec.model.context
        ).total.count
        self._spawn(self._passes.keep(welcome.member))
        self._spawn(self._get_ready())
        self._spawn(self._compute_loop())
        self._spawn(self._claimant.run())
        try:
            await self._ended.wait()
        finally:
            self._reducer.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._goodbye:
            with contextlib.suppress(PeerError):
                message = m.Leave(welcome.member, "its process was told to end")
                await self._follower.ask(message, deadline=FAREWELL)
            return False
        return await self._went_back(resumes)

    async def _went_back(self, resumes: int) -> bool:
        """Whether the seat ended because all go back. Its heartbeat may have been refused before the log said why."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL.value):
                while self.state.phase is Phase.TRAINING and self.state.member_of(self._transport.me) is not None:
                    await asyncio.sleep(0.01)
        return self.state.tally.resumes > resumes and self.state.phase is Phase.TRAINING

    def end(self) -> None:
        """Let `run` return, once what it has claimed is committed; it says goodbye first. Said twice: at once."""
        if self._departure is None or self._goodbye or self.state.phase is not Phase.TRAINING:
            self._ended.set()
        else:
            self._spawn(self._drain(self._departure))
        self._goodbye = True

    async def _drain(self, departure: Departure) -> None:
        self._state = "draining"
        await departure.drain("its process was told to end")
        self._ended.set()

    async def _ask_for_seat(self, message: m.Join) -> m.Welcome:
        welcome = await self.applicant.seat(message)
        self._passes.hold(welcome.signed_pass)
        return welcome

    async def _get_ready(self) -> None:
        assert self._engine and self._bench
        self._state = "syncing"
        await self._seating.get_ready(self._engine, self._bench, self._compute)
        self._state = "idle"
        self._poke()

    # --- the log

    def _on_event(self, event: ev.Event, state: RunState) -> None:
        if self._bench is None or self._reducer is None or self._engine is None:
            return
        if isinstance(event, ev.SeatReady | ev.SeatLeft | ev.Unreachable | ev.Excluded | ev.StageStepped):
            self._members_moved(event, state)
        if (voids := state.seats[Member(self._bench.member)].voids) != self._voids:
            self._voids = voids  # and at once: no message may say the new number and tell of the old gradient
            self._void(self._engine.step)
        match event:
            case ev.Returned(member=member) if member == self._bench.member:
                self._spawn(self._resync())
            case ev.SeatLeft(member=member) if member == self._bench.member:
                self._ended.set()
            case ev.RunResumed():
                self._ended.set()
            case ev.TermBegan():
                self._begin_term()
            case ev.StageStepped(stage=stage) if stage == self._bench.stage:
                self._spawn(self._step_taken(event))
            case ev.ItemDropped(step=step, microbatch=microbatch, stages=stages) if self._bench.stage in stages:
                self._bench.drop(step, microbatch)
            case ev.RunCompleted() | ev.RunStopped() | ev.RunFailed() if not self._serves(state):
                self._ended.set()
            case _:
                pass
        self._reducer.on_event(event, state)
        for key in self._bench.retire(state.step):
            self._engine.forget(key)
        self._work.set()

    def _members_moved(self, event: ev.Event, state: RunState) -> None:
        """Fewer or more members begin fewer or more items; and a loss makes news of what is finished urgent."""
        assert self._claimant
        self._begin_enough(state)
        if isinstance(event, ev.SeatLeft | ev.Unreachable | ev.Excluded):
            self._claimant.hurry()

    def _begin_enough(self, state: RunState) -> None:
        assert self._bench
        replicas = [max(1, len(state.ready(stage.index))) for stage in state.stages]
        begun = started(replicas, self._bench.capacity, crossing=self._crossing)
        self._bench.begun_at_once = -(-begun // replicas[0])

    def _serves(self, state: RunState) -> bool:
        return state.phase in (Phase.COMPLETE, Phase.SERVING)

    def _void(self, step: int) -> None:
        """Everything folded at this step is lost. From this moment no job starts until the accumulators are empty."""
        assert self._bench and self._claimant
        self._bench.void(step)
        self._claimant.void(step)
        self._forget_costs(lambda at: at == step)
        self._spawn(self._empty())

    def _begin_term(self) -> None:
        """Another trainer begins the open step anew. Nothing that was folded, claimed or finished before counts."""
        assert self._bench and self._claimant
        step = self._bench.step
        self._bench.begin_term()
        self._forget_costs(lambda at: at >= step)
        self._claimant.begin_term(self._costs)  # what the former trainer knew is gone with it
        self._spawn(self._empty())
        if Member(self._bench.member) in self.state.seats:
            self._spawn(self._resync_when_settled())  # if nobody but the former coordinator knew that we were ready
        else:
            self._ended.set()

    async def _resync_when_settled(self) -> None:
        while self._state == "syncing":
            await asyncio.sleep(0.01)
        await self._resync()

    def _forget_costs(self, void: Callable[[int], bool]) -> None:
        self._costs = {key: cost for key, cost in self._costs.items() if not void(key[0])}

    def _go_astray(self) -> None:
        """We heeded a coordinator longer than the rest did: whatever followed from that goes with this process."""
        log.warning("unseated: this worker followed a history that has been replaced; it begins anew")
        self._ended.set()

    async def _empty(self) -> None:
        assert self._engine and self._bench
        await self._compute.run(self._engine.zero)
        self._bench.emptied()
        self._poke()

    async def _step_taken(self, event: ev.StageStepped) -> None:
        """The log has committed our stage's step: apply it, or fetch it if we were not in it."""
        assert self._engine and self._bench and self._reducer
        prepared = self._reducer.prepared(event)
        if prepared is None:
            if not await self._attended(event):
                await self._catch_up()
            return
        self._reach(Point.COMMIT, event.step)
        await self._compute.run(lambda: self._engine.commit(prepared))  # type: ignore[union-attr]
        self._reach(Point.COMMITTED, event.step)
        self._bench.step = step = self._engine.step
        self._forget_costs(lambda at: at < step - 2)
        if self._departure is not None:
            self._departure.step_taken()
        self._syncer.prune(self.state.step)  # a resume goes back to a step that every stage has
        self._poke()

    async def _attended(self, event: ev.StageStepped) -> bool:
        """Take the bytes of a step that we attended. Whoever waits to be ready sees it by the engine's step."""
        assert self._engine and self._bench and self._reducer
        prepared, engine = await self._reducer.attended(event), self._engine
        if prepared is None or engine.step > event.step:
            return False
        try:
            await self._compute.run(lambda: self._syncer.save(engine, prepared))
        except DiskFull as error:
            await self._give_up(error)
            return True
        await self._compute.run(lambda: engine.commit(prepared))
        self._bench.step = engine.step
        self._poke()
        if self._state != "syncing":
            await self._catch_up()  # it was ready when the step was taken without it
        return True

    async def _catch_up(self) -> None:
        """The step was taken without what we folded for it."""
        assert self._engine
        if self._lags():
            self._void(self._engine.step)
        await self._resync()

    async def _resync(self) -> None:
        if self._lags():
            await self._get_ready()

    def _lags(self) -> bool:
        """Whether we have to get ready, and nothing sees to it yet."""
        assert self._bench
        status = self.state.seats[Member(self._bench.member)].status
        is_getting_ready = status is SeatStatus.ATTENDING and self._state == "syncing"
        return status in (SeatStatus.SYNCING, SeatStatus.ATTENDING) and not is_getting_ready

    # --- messages

    def _body_limit(self, _peer: PeerId, message: Any) -> int | Verdict:
        """What the run spec allows for this kind of body; nothing before we know the spec."""
        assert self._bench or self._engine is None
        if self._engine is None or self._reducer is None:
            raise Refused("Still joining: ask again in a moment.")
        if isinstance(message, m.Offer):
            return min(len(message.items), m.OFFERED_AT_ONCE) * self._reducer.item_limit
        if isinstance(message, m.Slice | m.Updated):
            return sum(self._engine.sizes.values())
        if isinstance(message, m.Forward) and self._bench and not self._bench.admits(message.lease.key):
            return Busy(after_ms=20)
        return self._reducer.item_limit

    async def _on_offer(self, peer: PeerId, message: m.Offer, body: bytearray) -> Answer:
        if self._claimant is None or self._courier is None:
            raise Refused("Still joining: ask again in a moment.")
        if peer == self.state.trainer:
            self._claimant.wanted_soon, self._crossing = message.more, message.crossing
            self._begin_enough(self.state)
        at = 0
        for offered in message.items:
            ids, at = memoryview(body)[at : at + offered.nbytes], at + offered.nbytes
            if self._is_current(offered.lease):
                self._check_lease(peer, offered.lease)
                self._courier.route(self._take(offered.lease, offered.ids, ids))
        self._poke()
        return None

    async def _on_forward(self, peer: PeerId, message: m.Forward, body: bytearray) -> Answer:
        assert self._bench
        if not self._is_current(message.lease):
            return Drop(reason="an old step")
        self._check_lease(peer, message.lease)
        self._check_neighbour(peer, self._bench.stage - 1)
        cut = message.nbytes - message.ids.nbytes
        self._check_coefficients(message.ids.sequences * (message.ids.length - _predicts(message.lease)), cut)
        item = self._take(message.lease, message.ids, memoryview(body)[cut:])
        if item.entered is not None:
            return DONE
        item.entered = bytes(memoryview(body)[:cut])
        self._poke()
        return None

    async def _on_backward(self, peer: PeerId, message: m.Backward, body: bytearray) -> Answer:
        assert self._bench
        self._check_neighbour(peer, self._bench.stage + 1)
        item = self._bench.items.get((int(Kind.TRAIN), message.step, message.microbatch))
        if item is None or item.ids is None:
            # A neighbour may have read of the new route before us: its gradient is kept until we have the item, too.
            return Busy(after_ms=50) if message.step >= self.state.step else Drop(reason="an old step")
        if item.gradient is not None:
            return DONE
        self._check_coefficients(item.ids[:, 1:].size, len(body))
        item.gradient = bytes(body)
        self._work.set()
        return None

    async def _on_reduce_message(self, peer: PeerId, message: Any, body: bytearray) -> Answer:
        if self._reducer is None:
            raise Refused("Still joining: ask again in a moment.")
        return self._reducer.deposit(peer, message, body)

    def _is_current(self, lease: m.Lease) -> bool:
        if self._bench is None:
            raise Refused("Still joining: ask again in a moment.")
        if len(lease.route) == self._bench.stages and lease.route[self._bench.stage] != self._bench.member:
            return False  # it names a former life of this worker
        return lease.step >= self.state.step or lease.kind is not Kind.TRAIN

    def _check_lease(self, peer: PeerId, lease: m.Lease) -> None:
        """The connection vouches for what the trainer itself says; what came before was checked then."""
        assert self._bench
        if lease.term != self.state.term:
            raise Refused(f"The lease is of term {lease.term}, and this is term {self.state.term}.")
        known = self._bench.items.get(lease.key)
        if peer == self.state.trainer or (known is not None and known.lease == lease):
            return
        if len(lease.route) != self._bench.stages:
            raise Refused("The lease's route does not have one member per stage.")
        if not verify(PeerId(self.state.trainer), LEASE_DOMAIN, lease.unsigned(), lease.signature):
            raise Refused("The lease is not signed by the trainer of this run.")

    def _check_neighbour(self, peer: PeerId, stage: int) -> None:
        seat = self.state.member_of(peer)
        if seat is None or seat.stage != stage:
            raise Refused(f"Only a member of stage {stage} sends that here.")

    def _take(self, lease: m.Lease, ids: m.Ids | None, body: memoryview) -> Item:
        assert self._bench and self._engine
        known, one_more = self._bench.items.get(lease.key), _predicts(lease)
        if ids is None or (known is not None and known.ids is not None):
            return self._bench.lease(lease)
        lengths = range(1 + one_more, self._engine.config.context + one_more + 1)
        unpacked = unpacked_ids(ids, body, self._engine.config.vocab, lengths)  # before anything is noted
        item = self._bench.lease(lease)
        item.ids = unpacked
        return item

    def _check_coefficients(self, tokens: int, size: int) -> None:
        """Raises FrameMalformed if `size` bytes are not the coefficients of so many tokens."""
        assert self._engine
        config = self._engine.config
        if tokens < 1 or size != nbytes(config.codec, tokens, config.boundary_width):
            raise FrameMalformed(f"{size} bytes are not the coefficients of {tokens} tokens in {config.codec}.")

    def _poke(self) -> None:
        assert self._claimant
        self._work.set()
        self._claimant.look()

    # --- computing

    async def _compute_loop(self) -> None:
        assert self._bench and self._engine
        while True:
            job = self._bench.next_job()
            if job is None:
                self._work.clear()
                self._state = "idle" if self._state == "working" else self._state
                await self._work.wait()
                continue
            self._state, voids = "working", self._bench.voids
            try:
                await self._compute.run(lambda job=job: self._do(job))  # type: ignore[misc]
            except (NumericsError, DiskFull) as error:
                await self._give_up(error)
                return
            if self._bench.voids == voids or job.kind is JobKind.FORWARD:
                self._after(job)

    def _do(self, job: Job) -> None:
        """In the compute thread."""
        assert self._engine and self._bench
        item, engine = job.item, self._engine
        lease, folds = item.lease, self._bench.folds(item)
        train = lease.kind is Kind.TRAIN
        ids = item.ids if lease.kind is Kind.SAMPLE else item.ids[:, :-1]
        match job.kind:
            case JobKind.FORWARD:
                self._reach(Point.FORWARD, lease.step)
                item.left = engine.forward(item.key, lease.step, ids, item.entered, train=train)
            case JobKind.BACKWARD:
                assert item.gradient is not None
                self._reach(Point.BACKWARD, lease.step)
                item.returned = engine.backward(item.key, lease.step, ids, item.entered, item.gradient, fold=folds)
            case JobKind.FINISH:
                self._reach(Point.BACKWARD, lease.step)
                self._finish(item, ids, folds)

    def _finish(self, item: Item, ids: Any, folds: bool) -> None:
        assert self._engine
        engine, lease = self._engine, item.lease
        match lease.kind:
            case Kind.TRAIN:
                targets = item.ids[:, 1:]
                item.value, item.returned = engine.finish(
                    item.key, lease.step, ids, targets, item.entered, lease.step_tokens, fold=folds
                )
            case Kind.EVAL:
                item.value = engine.cost(lease.step, ids, item.ids[:, 1:], item.entered)
            case Kind.SAMPLE:
                temperature, seed = lease.sampling or (0.0, 0)
                item.value = float(engine.sample(lease.step, ids, item.entered, temperature, seed))

    def _after(self, job: Job) -> None:
        assert self._bench and self._claimant and self._courier
        item = job.item
        self._reach(Point.FORWARDED if job.kind is JobKind.FORWARD else Point.FOLDED, item.lease.step)
        if job.kind is not JobKind.FORWARD:
            item.is_done = True
            self._telemetry.count(item)
            if item.value is not None and self._bench.folds(item):
                self._costs[item.lease.step, item.lease.microbatch] = item.value
            if self._bench.folds(item) or item.lease.kind is not Kind.TRAIN:
                self._claimant.finished(item)
        self._courier.route(item)

    # --- plumbing

    async def _give_up(self, error: KoinonError) -> None:
        """Something that no retry can mend: the coordinator ends the run, whole and resumable."""
        assert self._bench
        log.error("%s", error)
        await self._seating.tell_broken(self._bench.member, self._bench.stage, error)

    def _telemetry_now(self) -> m.Telemetry:
        queued = sum(1 for _ in self._bench.jobs()) if self._bench else 0
        recomputed = self._engine.recomputed_items if self._engine else 0
        told = self._telemetry.as_message(self._state, self._compute.busy_seconds, queued, recomputed)
        fetched = self._syncer.progress
        return told if fetched is None else m.fetching(told, fetched.done, fetched.total, fetched.rate)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._adopt(asyncio.create_task(work))

    def _adopt(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._observe)

    def _observe(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("a task of this worker broke", exc_info=error)
            self._ended.set()
