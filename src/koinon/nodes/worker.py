"""A worker: one stage, one compute thread, and the wiring between its bench, its engine and its neighbours.

What it computes is the engine's business, what it may compute is the bench's, how a step is summed is the reducer's,
how it gets its state is the syncer's. Here messages meet them. Knows nothing of other stages' weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from koinon.errors import DiskFull, FrameMalformed, KoinonError, NothingToResume, NumericsError, PeerError, Refused
from koinon.model.codec import nbytes
from koinon.model.flops import item_flops
from koinon.net.identity import NodeKey, verify
from koinon.net.transport import DONE, Answer, Busy, Drop, Transport, Verdict
from koinon.nodes import messages as m
from koinon.nodes.compute import Compute
from koinon.nodes.counters import Counters
from koinon.nodes.engine import Engine
from koinon.nodes.faults import Point, Reach, nothing
from koinon.nodes.flight import packed_ids, unpacked_ids
from koinon.nodes.follower import RunFollower, insist
from koinon.nodes.messages import Kind
from koinon.nodes.reducer import Reducer
from koinon.nodes.switchboard import Switchboard
from koinon.nodes.syncer import Syncer
from koinon.nodes.trainer import LEASE_DOMAIN
from koinon.nodes.workbench import ClaimState, Item, Job, JobKind, Workbench
from koinon.run import events as ev
from koinon.run.events import Member
from koinon.run.spec import RunSpec
from koinon.run.state import Phase, RunState, SeatStatus
from koinon.run.terms import TermStore
from koinon.units import PeerId, RunId, Seconds

log = logging.getLogger(__name__)
HEARTBEAT_SECONDS = 1.0
FAREWELL = Seconds(1.0)
FINISHED_LINGER = Seconds(0.05)


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
        """secret: 32 bytes that a founding replica draws its stage from; fresh entropy if not given.
        terms: where it learns who coordinates; without it, `coordinator` does for ever."""
        self._transport, self._key, self._compute, self._reach = transport, key, compute, reach
        self._account, self._wanted = account, stage
        self._addresses: tuple[str, ...] = ()
        self._follower = RunFollower(transport, board, coordinator, run, terms=terms)
        self._follower.went_astray = self._go_astray
        self._syncer = Syncer(transport, board, compute, directory, secret)
        self._engine: Engine | None = None
        self._bench: Workbench | None = None
        self._reducer: Reducer | None = None
        self._work = asyncio.Event()
        self._claims = asyncio.Event()
        self._finished: list[m.Finished] = []
        self._asking: asyncio.Task[m.Message] | None = None
        self._costs: dict[tuple[int, int], float] = {}  # (step, microbatch) that we folded, of the last steps
        self._ended = asyncio.Event()
        self._goodbye = False
        self._syncing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._telemetry = Counters()
        self._state = "joining"
        self._register(board)

    @property
    def state(self) -> RunState:
        return self._follower.state

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
        """Join (reachable at `addresses`), work, leave. Raises KoinonError when it cannot begin."""
        self._addresses = addresses
        self._follower.listen(self._on_event)
        self._spawn(self._follower.keep_seeking())
        welcome, spec, engine = await self._take_seat()
        self._engine = engine
        self._bench = Workbench(welcome.member, welcome.stage, spec.model.stages, engine.step, spec.league.in_flight)
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
        self._telemetry.flops_per_item = item_flops(
            spec.model, welcome.stage, spec.train.microbatch, spec.model.context
        ).total.count
        self._spawn(self._get_ready())
        self._spawn(self._compute_loop())
        self._spawn(self._claim_loop())
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

    def end(self) -> None:
        """Let `run` return; it says goodbye first, if it has a seat."""
        self._goodbye = True
        self._ended.set()

    async def _take_seat(self) -> tuple[m.Welcome, RunSpec, Engine]:
        """Ask for a seat and get its stage's state. If the last member that had it dies meanwhile, ask again: the stage
        may have to be founded anew, or loaded from this very disk."""
        while True:
            welcome = await self._join()
            host = self._follower.coordinator
            await self._follower.start(self._addresses)
            while not self._has(welcome) and self._follower.coordinator == host:
                await asyncio.sleep(0.01)
            if not self._has(welcome):
                continue  # whoever gave us the seat was replaced before anybody else had heard of it
            beats = asyncio.create_task(self._heartbeats(welcome.member))
            self._state = "syncing"
            spec = RunSpec.parse(welcome.spec)
            try:
                engine = await self._syncer.begin(welcome, spec, self._follower)
            except NothingToResume as error:
                log.info("%s", error)
                beats.cancel()
                await asyncio.sleep(0.1)
                continue
            except DiskFull as error:  # its own text log may have no room to say so
                await self._tell_broken(welcome.member, welcome.stage, error)
                beats.cancel()
                raise
            except BaseException:
                beats.cancel()
                raise
            self._adopt(beats)
            return welcome, spec, engine

    def _has(self, welcome: m.Welcome) -> bool:
        seat = self.state.seats.get(Member(welcome.member))
        return seat is not None and seat.worker == self._transport.me

    async def _join(self) -> m.Welcome:
        stage, have = self._syncer.inventory(self._wanted)
        message = m.Join(self._account, self._addresses, secrets.token_hex(8), stage, have)
        welcome = await self._follower.insist(message, m.JOIN)
        assert isinstance(welcome, m.Welcome)
        return welcome

    async def _get_ready(self) -> None:
        """Fetch until the coordinator agrees that this member has what the stage has.

        One at a time: a fetch that ends when the member is at work again would throw away what it has folded.
        """
        async with self._syncing:
            await self._fetch_until_ready()

    async def _fetch_until_ready(self) -> None:
        assert self._engine and self._bench
        while True:
            self._state = "syncing"
            root = await self._compute.run(lambda: self._syncer.root_of(self._engine))
            message = m.Ready(self._bench.member, self._engine.step, root)
            try:
                await self._follower.insist(message)
            except Refused as refusal:
                log.info("not ready yet: %s", refusal)
                await asyncio.sleep(0.1)
                await self._syncer.catch_up(self._engine, self._follower)
                self._bench.step = self._engine.step
                continue
            self._state = "idle"
            self._work.set()
            return

    async def _heartbeats(self, member: int) -> None:
        while True:
            beat = m.Heartbeat(member, self._telemetry_now())
            try:
                await self._follower.ask(beat)
            except Refused as refusal:
                log.warning("unseated: %s", refusal)
                self._ended.set()
                return
            except PeerError as error:
                log.info("the coordinator does not answer: %s", error)
            await asyncio.sleep(HEARTBEAT_SECONDS)

    # --- the log

    def _on_event(self, event: ev.Event, state: RunState) -> None:
        if self._bench is None or self._reducer is None or self._engine is None:
            return
        match event:
            case ev.Excluded(member=member, step=step) if member == self._bench.member:
                self._void(step)
            case ev.Unreachable(member=member) if member == self._bench.member:
                self._void(self._engine.step)
            case ev.Returned(member=member) if member == self._bench.member:
                self._spawn(self._resync())
            case ev.SeatLeft(member=member) if member == self._bench.member:
                self._ended.set()
            case ev.TermBegan():
                self._begin_term()
            case ev.StageStepped(stage=stage) if stage == self._bench.stage:
                self._spawn(self._step_taken(event))
            case ev.RunCompleted() | ev.RunStopped() | ev.RunFailed() if not self._serves(state):
                self._ended.set()
            case _:
                pass
        self._reducer.on_event(event, state)
        for key in self._bench.retire(state.step):
            self._engine.forget(key)
        self._work.set()

    def _serves(self, state: RunState) -> bool:
        return state.phase in (Phase.COMPLETE, Phase.SERVING)

    def _void(self, step: int) -> None:
        """Everything folded at this step is lost. From this moment no job starts until the accumulators are empty."""
        assert self._bench
        self._bench.void(step)
        self._forget_costs(lambda at: at == step)
        self._spawn(self._empty())

    def _begin_term(self) -> None:
        """Another trainer begins the open step anew. Nothing that was folded, claimed or finished before counts."""
        assert self._bench
        self._bench.begin_term()
        self._forget_costs(lambda at: at >= self._bench.step)  # type: ignore[union-attr]
        self._finished = [
            m.Finished(Kind.TRAIN, step, microbatch, 0, cost)
            for (step, microbatch), cost in self._costs.items()  # what the former trainer knew is gone with it
        ]
        if self._asking is not None:
            self._asking.cancel()
        self._spawn(self._empty())
        if Member(self._bench.member) in self.state.seats:
            self._spawn(self._resync())  # if nobody but the former coordinator knew that we were ready
        else:
            self._ended.set()

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
            await self._resync()
            return
        self._reach(Point.COMMIT, event.step)
        await self._compute.run(lambda: self._engine.commit(prepared))  # type: ignore[union-attr]
        self._reach(Point.COMMITTED, event.step)
        self._bench.step = self._engine.step
        self._forget_costs(lambda at: at < self._engine.step - 2)  # type: ignore[union-attr]
        self._syncer.prune(self.state.step)  # a resume goes back to a step that every stage has
        self._work.set()
        self._claims.set()

    async def _resync(self) -> None:
        assert self._engine and self._bench
        seat = self.state.seats[Member(self._bench.member)]
        if seat.status is SeatStatus.SYNCING:
            self._void(self._engine.step)
            await self._get_ready()

    # --- messages

    def _body_limit(self, _peer: PeerId, message: Any) -> int | Verdict:
        """What the run spec allows for this kind of body; nothing before we know the spec."""
        assert self._bench or self._engine is None
        if self._engine is None or self._reducer is None:
            raise Refused("Still joining: ask again in a moment.")
        if isinstance(message, m.Slice | m.Updated):
            return sum(self._engine.sizes.values())
        if isinstance(message, m.Forward) and self._bench and not self._bench.admits(message.lease.key):
            return Busy(after_ms=20)
        return self._reducer.item_limit

    async def _on_offer(self, peer: PeerId, message: m.Offer, body: bytearray) -> Answer:
        if not self._is_current(message.lease):
            return Drop(reason="an old step")
        self._check_lease(message.lease)
        item = self._take(message.lease, message.ids, memoryview(body))
        self._route_kept(item)
        self._poke()
        return None

    async def _on_forward(self, peer: PeerId, message: m.Forward, body: bytearray) -> Answer:
        assert self._bench
        if not self._is_current(message.lease):
            return Drop(reason="an old step")
        self._check_lease(message.lease)
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
        if item is None:
            return Drop(reason="no such item here (any more)")
        if item.gradient is not None:
            return DONE
        self._check_coefficients(item.ids[:, 1:].size, len(body))
        item.gradient = bytes(body)
        self._poke()
        return None

    async def _on_reduce_message(self, peer: PeerId, message: Any, body: bytearray) -> Answer:
        if self._reducer is None:
            raise Refused("Still joining: ask again in a moment.")
        return self._reducer.deposit(peer, message, body)

    def _is_current(self, lease: m.Lease) -> bool:
        if self._bench is None:
            raise Refused("Still joining: ask again in a moment.")
        return lease.step >= self.state.step or lease.kind is not Kind.TRAIN

    def _check_lease(self, lease: m.Lease) -> None:
        assert self._bench
        if lease.term != self.state.term:
            raise Refused(f"The lease is of term {lease.term}, and this is term {self.state.term}.")
        if len(lease.route) != self._bench.stages:
            raise Refused("The lease's route does not have one member per stage.")
        if not verify(PeerId(self.state.trainer), LEASE_DOMAIN, lease.unsigned(), lease.signature):
            raise Refused("The lease is not signed by the trainer of this run.")

    def _check_neighbour(self, peer: PeerId, stage: int) -> None:
        seat = self.state.member_of(peer)
        if seat is None or seat.stage != stage:
            raise Refused(f"Only a member of stage {stage} sends that here.")

    def _take(self, lease: m.Lease, ids: m.Ids, body: memoryview) -> Item:
        assert self._bench and self._engine
        known, one_more = self._bench.items.get(lease.key), _predicts(lease)
        if known is not None and known.ids is not None:
            return self._bench.lease(lease)
        lengths = range(1 + one_more, self._engine.config.context + one_more + 1)
        unpacked = unpacked_ids(ids, body, self._vocab(), lengths)  # before anything is noted: it may be no item
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
        self._work.set()
        self._claims.set()

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
        assert self._bench
        item = job.item
        self._reach(Point.FORWARDED if job.kind is JobKind.FORWARD else Point.FOLDED, item.lease.step)
        if job.kind is JobKind.FORWARD:
            if item.gradient is not None:
                self._claims.set()
        else:
            item.is_done = True
            self._telemetry.count(item)
            if item.value is not None and self._bench.folds(item):
                self._costs[item.lease.step, item.lease.microbatch] = item.value
            if self._bench.folds(item) or item.lease.kind is not Kind.TRAIN:
                lease = item.lease
                self._finished.append(m.Finished(lease.kind, lease.step, lease.microbatch, lease.revision, item.value))
                self._claims.set()
        self._route_kept(item)

    def _route_kept(self, item: Item) -> None:
        """Hand what we computed to whoever holds the neighbouring places on the route now."""
        assert self._bench
        stage, route = self._bench.stage, item.lease.route
        if not self._bench.is_mine(item):
            return
        if item.left is not None and item.forward_to != route[stage + 1]:
            item.forward_to = route[stage + 1]
            self._spawn(self._send_forward(item, route[stage + 1]))
        if item.returned is not None and item.backward_to != route[stage - 1]:
            item.backward_to = route[stage - 1]
            self._spawn(self._send_backward(item, route[stage - 1]))

    async def _send_forward(self, item: Item, member: int) -> None:
        assert self._bench
        assert item.left is not None
        lease = item.lease
        ids, packed = packed_ids(item.ids, self._vocab())
        header = m.Forward(lease, ids, len(item.left) + len(packed))
        sent = await self._send(item, member, header, item.left + packed, lambda: item.forward_to == member)
        if sent and lease.kind is not Kind.TRAIN:
            self._bench.items.pop(item.key, None)

    async def _send_backward(self, item: Item, member: int) -> None:
        assert item.returned is not None
        lease = item.lease
        header = m.Backward(lease.step, lease.microbatch, lease.revision, len(item.returned))
        await self._send(item, member, header, item.returned, lambda: item.backward_to == member)

    async def _send(self, item: Item, member: int, header: m.Message, body: bytes, wanted: Any) -> bool:
        """Push until the neighbour has it, or it is no longer the one who needs it. True if it got there."""
        assert self._bench
        pause = 0.02
        while self._bench.items.get(item.key) is item and wanted():
            seat = self.state.seats.get(Member(member))
            if seat is not None and seat.status is SeatStatus.LEFT:
                return False
            if seat is not None:
                try:
                    verdict = await self._transport.push(PeerId(seat.worker), m.WORK, header, body)
                except PeerError as error:
                    log.debug("push to member %s: %s", member, error)
                else:
                    if isinstance(verdict, Busy):
                        await asyncio.sleep(verdict.after_ms / 1e3)
                        continue
                    if isinstance(verdict, Drop):
                        return False
                    self._telemetry.sent(header, body, item)
                    return True
            await asyncio.sleep(pause)
            pause = min(2 * pause, 1.0)
        return False

    def _vocab(self) -> int:
        assert self._engine
        return self._engine.config.vocab

    # --- claims

    def _can_wait(self) -> bool:
        assert self._bench
        only_folded = all(finished.kind is Kind.TRAIN for finished in self._finished)
        return only_folded and self._bench.has_open_items() and not any(self._bench.claimable())

    async def _claim_loop(self) -> None:
        """One request at a time: what gathers meanwhile goes with the next one.

        That an item is finished waits a moment for the next claim, unless the trainer waits for it: exchanges cost by
        the piece.
        """
        assert self._bench
        while True:
            await self._claims.wait()
            self._claims.clear()
            if self._finished and self._can_wait():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(FINISHED_LINGER.value):  # wait_for of 3.11 can swallow a cancellation
                        await self._claims.wait()
                        self._claims.clear()
            asked = list(self._bench.claimable())
            finished, self._finished = self._finished, []
            if not asked and not finished:
                continue
            for item in asked:
                self._reach(Point.CLAIM, item.lease.step)
                item.claim = ClaimState.ASKED
            claims = tuple(m.Claim(i.lease.step, i.lease.microbatch, i.lease.revision) for i in asked)
            try:
                granted = await self._ask(m.Claims(claims, tuple(finished), self.state.term))
            except Refused as refusal:
                log.info("claims refused: %s", refusal)
                granted = m.Granted(())
            assert isinstance(granted, m.Granted)
            for index, item in enumerate(asked):
                self._reach(Point.CLAIMED, item.lease.step)
                if item.claim is ClaimState.ASKED:
                    item.claim = ClaimState.GRANTED if index in granted.granted else ClaimState.REFUSED
            self._work.set()

    async def _ask(self, message: m.Claims) -> m.Message:
        """Insist, while the trainer that leased these items holds its office. Raises Refused."""
        self._asking = asked = asyncio.create_task(
            insist(self._transport, PeerId(self.state.trainer), m.CTL, message)
        )  # fmt: skip
        try:
            await asyncio.wait([asked])
            if asked.cancelled():
                raise Refused(f"Term {self.state.term} began: claims of the term before are void.")
            return asked.result()
        finally:
            asked.cancel()

    # --- plumbing

    async def _give_up(self, error: KoinonError) -> None:
        """Something that no retry can mend: the coordinator ends the run, whole and resumable."""
        assert self._bench
        log.error("%s", error)
        await self._tell_broken(self._bench.member, self._bench.stage, error)

    async def _tell_broken(self, member: int, stage: int, error: KoinonError) -> None:
        message = m.Broken(member, f"Stage {stage}: {error}")
        await self._follower.insist(message)

    def _telemetry_now(self) -> m.Telemetry:
        queued = sum(1 for _ in self._bench.jobs()) if self._bench else 0
        recomputed = self._engine.recomputed_items if self._engine else 0
        return self._telemetry.as_message(self._state, self._compute.busy_seconds, queued, recomputed)

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
