"""A member's part in a reduce: slices to owners and seconds, one sum, one update, the same bytes for all.

    every member        sends its gradient of each tensor to the tensor's owner and second
    owner and second    sum the slices in member order, and exchange the sums of squares for the stage's clip
    owner               runs the optimizer and sends the *updated bytes* to all; the second compares them with its own
    every member        holds all tensors, writes them down durably, and says so; applies them when the log commits
    attendee            is sent the updated bytes too, after the members; owns nothing, and nobody waits for it

So replicas are equal by construction, whatever hardware they run on, and nobody applies early. Any trouble ends in a
complaint; the coordinator decides who stays and opens the next attempt. Knows nothing of how items are folded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from koinon.errors import DiskFull, FrameMalformed, KoinonError, NonFiniteLoss, PeerError, Refused
from koinon.model.codec import nbytes
from koinon.net.transport import Answer, Drop, Transport
from koinon.nodes import messages as m
from koinon.nodes.clock import loop_time
from koinon.nodes.compute import Compute
from koinon.nodes.engine import SECOND_TOLERANCE, Engine, Prepared, largest_difference, squares
from koinon.nodes.faults import Point, Reach
from koinon.nodes.follower import RunFollower
from koinon.nodes.syncer import MOMENTUM_TRIES, Syncer
from koinon.optim.ownership import owners
from koinon.run import events as ev
from koinon.run.events import Member
from koinon.run.items import unpack
from koinon.run.policies.deadlines import History, deadline, observe
from koinon.run.spec import RunSpec
from koinon.run.state import OpenReduce, RunState, Seat, SeatStatus
from koinon.units import PeerId, Seconds

log = logging.getLogger(__name__)
T = TypeVar("T")
PATIENCE_FLOOR = Seconds(3.0)
_Slot = tuple[int, int, type[m.Message], Member]


@dataclass(frozen=True, slots=True)
class Shares:
    """Who sums what in one attempt: the same on every member, because it follows from the members alone."""

    owned: dict[Member, tuple[str, ...]]
    summed: dict[Member, tuple[str, ...]]
    """Owned or seconded, in name order."""

    @classmethod
    def among(cls, sizes: dict[str, int], members: Iterable[Member], state: RunState) -> Shares:
        members = tuple(members)
        accounts = {str(member): state.seats[member].account for member in members}
        names = {str(member): member for member in members}
        owned: dict[Member, list[str]] = {member: [] for member in members}
        summed: dict[Member, list[str]] = {member: [] for member in members}
        for tensor, (owner, second) in sorted(owners(sizes, list(names), accounts=accounts).items()):
            owned[names[owner]].append(tensor)
            summed[names[owner]].append(tensor)
            if second is not None:
                summed[names[second]].append(tensor)
        return cls({k: tuple(v) for k, v in owned.items()}, {k: tuple(v) for k, v in summed.items()})


class Reducer:
    """Runs at most one attempt at a time, as the log says."""

    def __init__(
        self,
        spec: RunSpec,
        engine: Engine,
        member: Member,
        stage: int,
        transport: Transport,
        compute: Compute,
        syncer: Syncer,
        follower: RunFollower,
        state: Callable[[], RunState],
        folded: Callable[[int], set[int]],
        give_up: Callable[[KoinonError], Coroutine[Any, Any, None]],
        reach: Reach,
    ) -> None:
        """folded: the items of a step that lie in the engine's accumulators."""
        self._spec, self._engine, self._member, self._stage = spec, engine, member, stage
        self._transport, self._compute, self._syncer, self._follower = transport, compute, syncer, follower
        self._state, self._folded, self._give_up, self._reach = state, folded, give_up, reach
        self._inbox: dict[_Slot, asyncio.Future[Any]] = {}
        self._running: tuple[int, int] | None = None
        self._task: asyncio.Task[None] | None = None
        self._prepared: dict[tuple[int, int], Prepared] = {}
        self._attending: tuple[tuple[int, int], asyncio.Task[Prepared]] | None = None
        self._courtesies: set[asyncio.Task[None]] = set()  # what attendees are sent; it may outlast the attempt
        self._waits = History()
        self._lacking_since = (0, 0.0)  # a step, and when optimizer state for it was first found to be missing here
        tokens = spec.train.microbatch * spec.model.context
        self.item_limit = nbytes(spec.model.codec, tokens, spec.model.boundary_width) + 4 * (
            tokens + spec.train.microbatch
        )
        """Bytes of the largest body that an item's message may have."""

    def close(self) -> None:
        self._stop()
        self._end_attendance()

    def on_event(self, _event: ev.Event, state: RunState) -> None:
        """Follow the log: start the attempt that is open, stop one that is not."""
        reduce = state.stages[self._stage].reduce
        wanted = None if reduce is None else (reduce.step, reduce.attempt)
        if wanted == self._running:
            return
        self._stop()
        self._running = wanted
        if reduce is None:
            if self._attending is not None and self._attending[0][0] >= state.stages[self._stage].step:
                self._end_attendance()  # the attempt came to nothing
            return
        self._end_attendance()
        if self._member in reduce.members:
            self._forget_before(reduce.step, reduce.attempt)
            self._task = asyncio.create_task(self._take_part(reduce), name=f"reduce {wanted}")
        elif self._member in reduce.attendees:
            self._forget_before(reduce.step, reduce.attempt)
            key = (reduce.step, reduce.attempt)
            self._attending = key, asyncio.create_task(self._attend(reduce), name=f"attend {wanted}")

    def prepared(self, event: ev.StageStepped) -> Prepared | None:
        """What this member holds of a committed attempt; None if it was not part of it."""
        held = self._prepared.get((event.step, event.attempt))
        self._prepared.clear()
        return held if held is not None and held.root == event.root else None

    async def attended(self, event: ev.StageStepped) -> Prepared | None:
        """The same of an attempt that this member attended, once the last bytes have come; None if they never do."""
        if self._attending is None or self._attending[0] != (event.step, event.attempt):
            return None
        task = self._attending[1]
        await asyncio.wait([task])
        if task.cancelled() or (error := task.exception()) is not None:
            log.info("step %s was attended in vain: %s", event.step, "it took too long" if task.cancelled() else error)
            return None
        return task.result() if task.result().root == event.root else None

    def deposit(self, peer: PeerId, message: m.Slice | m.Updated | m.Norms, body: bytearray) -> Answer:
        """A member's piece. It may come before we have read that the attempt is open."""
        seat = self._state().member_of(peer)
        if seat is None or seat.stage != self._stage or message.stage != self._stage:
            raise Refused("Only members of the same stage reduce with each other.")
        newest = max(self._engine.step, self._state().stages[self._stage].step)  # an attendee's own may be older
        if not self._engine.step <= message.step <= newest + 1:
            return Drop(reason="an old step")
        content: Any = message.squares if isinstance(message, m.Norms) else body
        slot = self._slot(message.step, message.attempt, type(message), seat.member)
        if not slot.done():
            slot.set_result(content)
        return m.Ack() if isinstance(message, m.Norms) else None

    # --- one attempt

    async def _take_part(self, reduce: OpenReduce) -> None:
        try:
            await self._reduce(reduce)
        except* (DiskFull, NonFiniteLoss) as group:  # it may come out of the group of pushes
            for error in group.exceptions:
                assert isinstance(error, DiskFull | NonFiniteLoss)
                await self._give_up(error)
        except* PeerError as group:
            log.warning("reduce of step %s, attempt %s: %s", reduce.step, reduce.attempt, list(group.exceptions))

    async def _reduce(self, reduce: OpenReduce) -> None:
        while self._engine.step < reduce.step:  # the step before is still being applied
            await asyncio.sleep(0.005)
        engine, me = self._engine, self._member
        shares = Shares.among(engine.sizes, reduce.members, self._state())
        contributors = [mem for mem, bitmap in zip(reduce.members, reduce.sets, strict=True) if bitmap]
        if me in contributors:
            await self._compare(reduce)
        self._reach(Point.REDUCE, reduce.step)
        async with asyncio.TaskGroup() as pushes:
            if me in contributors:
                await self._send_slices(reduce, shares, pushes)
            self._reach(Point.SLICED, reduce.step)
            summed, squared = await self._sum(reduce, shares, contributors)
            lost = await self._ensure_momentum(reduce, shares.summed[me])
            norm = await self._norm(reduce, shares, squared, pushes)
            weights, states = await self._compute.run(lambda: engine.update(summed, norm))
            mine = await self._send_updated(reduce, shares, weights, pushes)
            self._reach(Point.UPDATED, reduce.step)
            whole = await self._gather(reduce, shares, weights)
            await self._check_as_second(reduce, shares, weights, whole)
            held, penalised = await self._compute.run(lambda: self._hold(reduce, whole, states))
        self._reach(Point.HELD, reduce.step)
        self._send_attendees(reduce, mine)
        message = m.Held(
            me, self._stage, reduce.step, reduce.attempt, held.root, norm, penalised, tuple(lost)
        )  # fmt: skip
        await self._follower.insist(message)

    async def _compare(self, reduce: OpenReduce) -> None:
        """A gradient goes into the step with exactly the items that the log lists for it, or not at all.

        Claims see to that before; this is what the promise of "once" does not rest on, and is checked by.
        """
        listed, folded = set(reduce.items_of(self._member)), self._folded(reduce.step)
        if listed != folded:
            log.error("step %s: the log lists items %s, folded are %s", reduce.step, sorted(listed), sorted(folded))
            reason = f"has folded {len(folded & listed)} of its {len(listed)} items, and {len(folded - listed)} others"
            await self._complain(reduce, self._member, reason)
            raise FrameMalformed(reason)

    async def _send_slices(self, reduce: OpenReduce, shares: Shares, pushes: asyncio.TaskGroup) -> None:
        for other in reduce.members:
            names = shares.summed[other]
            if other == self._member or not names:
                continue
            body = await self._compute.run(lambda names=names: self._engine.gradients(names))  # type: ignore[misc]
            header = m.Slice(self._stage, reduce.step, reduce.attempt, len(body))
            pushes.create_task(self._push(reduce, other, header, body))

    async def _send_updated(
        self, reduce: OpenReduce, shares: Shares, weights: dict[str, Tensor], pushes: asyncio.TaskGroup
    ) -> bytes:
        names = shares.owned[self._member]
        others = [member for member in reduce.members if member != self._member]
        if not names or not (others or reduce.attendees):
            return b""
        mine = await self._compute.run(lambda: self._engine.sent(names, weights))
        for other in others:
            header = m.Updated(self._stage, reduce.step, reduce.attempt, len(mine))
            pushes.create_task(self._push(reduce, other, header, mine))
        return mine

    def _send_attendees(self, reduce: OpenReduce, mine: bytes) -> None:
        """When the members have all: until the next attempt begins, in this one's shade."""
        header = m.Updated(self._stage, reduce.step, reduce.attempt, len(mine))
        for attendee in reduce.attendees if mine else ():
            task = asyncio.create_task(self._push(reduce, attendee, header, mine), name=f"courtesy to {attendee}")
            self._courtesies.add(task)
            task.add_done_callback(self._courtesies.discard)

    async def _attend(self, reduce: OpenReduce) -> Prepared:
        """Every owner's update, as it comes. No complaint: whoever attends has no claim to it."""
        shares, whole = Shares.among(self._engine.sizes, reduce.members, self._state()), dict[str, Tensor]()
        for owner, names in shares.owned.items():
            if names:
                body = await self._slot(reduce.step, reduce.attempt, m.Updated, owner)
                whole |= await self._compute.run(lambda names=names, body=body: self._engine.received(names, body))  # type: ignore[misc]
        return await self._compute.run(lambda: self._engine.attended(whole, reduce.step))

    async def _sum(
        self, reduce: OpenReduce, shares: Shares, contributors: list[Member]
    ) -> tuple[dict[str, Tensor], tuple[float, ...]]:
        """The cost's gradient of what this member sums, and the sums of squares of what it owns of that."""
        names, mine = shares.summed[self._member], shares.owned[self._member]
        slices: list[bytearray | None] = []
        for member in contributors if names else ():
            slices.append(None if member == self._member else await self._awaited(reduce, m.Slice, member))
        if not names:
            return {}, ()
        # A stage that went without dropped items divides by the tokens it really folded.
        folded = sum(len(unpack(bitmap)) for bitmap in reduce.sets)
        scale = self._state().microbatches / folded if folded else 0.0
        tokens = folded * self._spec.train.microbatch * self._spec.model.context
        engine = self._engine

        def sum_up() -> tuple[dict[str, Tensor], tuple[float, ...]]:
            gradients = engine.cost_gradients(engine.summed(names, slices), scale, max(1, tokens))
            return gradients, squares({name: gradients[name] for name in mine})

        try:
            return await self._compute.run(sum_up)
        except FrameMalformed as error:
            culprit = contributors[int(str(error).split()[1])]
            if contributors == [self._member]:
                raise NonFiniteLoss(f"The gradient of step {reduce.step} is not finite.") from error
            if culprit != self._member:  # of ours the others say so, who were sent the same
                await self._complain(reduce, culprit, str(error))
            raise

    async def _norm(
        self, reduce: OpenReduce, shares: Shares, mine: tuple[float, ...], pushes: asyncio.TaskGroup
    ) -> float:
        """L2 norm of the stage's whole gradient, from every owner's tensors."""
        me = self._member
        for other in reduce.members:
            if other != me and mine:
                header = m.Norms(self._stage, reduce.step, reduce.attempt, mine)
                pushes.create_task(self._ask(reduce, other, header))
        by_name = dict(zip(shares.owned[me], mine, strict=True))
        for other in reduce.members:
            if other != me and shares.owned[other]:
                theirs = await self._awaited(reduce, m.Norms, other)
                if len(theirs) != len(shares.owned[other]) or not all(math.isfinite(s) and s >= 0 for s in theirs):
                    await self._complain(reduce, other, "sent norms that are none")
                    raise FrameMalformed("norms that are none")
                by_name |= dict(zip(shares.owned[other], theirs, strict=True))
        return math.sqrt(math.fsum(by_name.values()))

    async def _gather(self, reduce: OpenReduce, shares: Shares, mine: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every tensor of the stage as its owner computed it."""
        whole = {name: mine[name] for name in shares.owned[self._member]}
        for other in reduce.members:
            names = shares.owned[other]
            if other == self._member or not names:
                continue
            body = await self._awaited(reduce, m.Updated, other)
            try:
                whole |= self._engine.received(names, body)
            except FrameMalformed as error:
                await self._complain(reduce, other, str(error))
                raise
        return whole

    async def _check_as_second(
        self, reduce: OpenReduce, shares: Shares, mine: dict[str, Tensor], whole: dict[str, Tensor]
    ) -> None:
        for other in reduce.members:
            seconded = {n: mine[n] for n in shares.owned[other] if n in mine}
            if other == self._member or not seconded:
                continue
            tensor, error = largest_difference(seconded, whole)
            if error > SECOND_TOLERANCE:
                await self._complain(reduce, other, "another update from the same slices", tensor, error)
                raise FrameMalformed(f"member {other} updated {tensor} differently")

    def _hold(self, reduce: OpenReduce, weights: dict[str, Tensor], momentum: dict[str, Any]) -> tuple[Prepared, float]:
        """Write the outcome down before anyone may rely on it. Returns J's penalty of the weights before, too."""
        prepared = self._engine.prepare(weights, momentum)
        self._syncer.save(self._engine, prepared)
        self._prepared[reduce.step, reduce.attempt] = prepared
        return prepared, self._engine.penalised_squares()

    async def _ensure_momentum(self, reduce: OpenReduce, names: tuple[str, ...]) -> list[str]:
        """Fetch optimizer state that we are to use for the first time; returns what nobody has any more.

        Whoever may hold it is asked until it has answered, or has left, however silent it is now. The attempt may end
        over that; the next one goes on asking.
        """
        if reduce.step == 0:
            return []
        answered, rounds, pause = {self._member}, 0, 0.05
        while missing := self._without_state(names):
            seats = [seat for seat in self._state().seats_of(self._stage) if seat.member not in answered]
            if rounds >= MOMENTUM_TRIES:
                seats = [seat for seat in seats if self._may_hold_state(seat, reduce.step)]
            if not seats:
                log.warning("nobody has the optimizer state of %s any more: it starts from zero", ", ".join(missing))
                return missing
            for seat in sorted(seats, key=lambda seat: seat.status is not SeatStatus.READY):
                if missing := self._without_state(names):
                    with contextlib.suppress(PeerError):
                        worker = PeerId(seat.worker)
                        given = await self._syncer.momentum(worker, self._stage, reduce.step, missing)
                        self._engine.momentum |= given
                        answered.add(seat.member)
            rounds += 1
            await asyncio.sleep(pause)
            pause = min(2 * pause, 1.0)
        return []

    def _may_hold_state(self, seat: Seat, step: int) -> bool:
        """Who was ready with the weights of this step may; and whose machine was and began anew: it has it on its disk,
        unless that is gone. For that one we wait as long as for a member that is silent, and no longer."""
        if self._lacking_since[0] != step:
            self._lacking_since = (step, loop_time())
        state = self._state()
        versions = [version for version in state.stages[self._stage].versions if version.step == step]
        machines = {state.seats[member].worker for version in versions for member in version.members}
        patient = loop_time() - self._lacking_since[1] < self._spec.league.grace_s
        return seat.step == step or (patient and seat.worker in machines)

    def _without_state(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name not in self._engine.momentum]

    # --- plumbing

    def _slot(self, step: int, attempt: int, kind: type[m.Message], member: Member) -> asyncio.Future[Any]:
        key = (step, attempt, kind, member)
        if key not in self._inbox:
            self._inbox[key] = asyncio.get_running_loop().create_future()
        return self._inbox[key]

    async def _awaited(self, reduce: OpenReduce, kind: type[m.Message], member: Member) -> Any:
        """A member's piece. Once it is late we say so, and go on waiting: the coordinator decides."""
        slot = self._slot(reduce.step, reduce.attempt, kind, member)
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(deadline(self._waits, floor=PATIENCE_FLOOR).value):
                content = await asyncio.shield(slot)
        except TimeoutError:
            await self._complain(reduce, member, f"sent no {kind.__name__}")
            content = await slot
        self._waits = observe(self._waits, Seconds(loop.time() - began))
        return content

    async def _push(self, reduce: OpenReduce, member: Member, header: m.Message, body: bytes) -> None:
        await self._repeat(lambda peer: self._transport.push(peer, m.WORK, header, body), member)

    async def _ask(self, reduce: OpenReduce, member: Member, header: m.Message) -> None:
        await self._repeat(lambda peer: self._transport.request(peer, m.CTL, header), member)

    async def _repeat(self, call: Callable[[PeerId], Coroutine[Any, Any, Any]], member: Member) -> None:
        """Until the member has it. An attempt that the log ends takes this with it."""
        pause = 0.05
        while True:
            try:
                await call(PeerId(self._state().seats[member].worker))
            except PeerError:
                await asyncio.sleep(pause)
                pause = min(2 * pause, 1.0)
            else:
                return

    async def _complain(
        self, reduce: OpenReduce, about: Member, reason: str, tensor: str = "", error: float = 0.0
    ) -> None:
        message = m.Complain(
            self._member, self._stage, reduce.step, reduce.attempt, about, reason, tensor, error
        )  # fmt: skip
        with contextlib.suppress(PeerError):
            await self._follower.ask(message)

    def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._task = None

    def _end_attendance(self) -> None:
        """The next attempt begins: what the last one still owed, to us or by us, is of no use any more."""
        for task in list(self._courtesies):
            task.cancel()
        if self._attending is not None:
            self._attending[1].cancel()
        self._attending = None

    def _forget_before(self, step: int, attempt: int) -> None:
        for key in [key for key in self._inbox if key[:2] < (step, attempt)]:
            del self._inbox[key]
