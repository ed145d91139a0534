"""A worker's side of claims: it asks for every item that it was leased, and tells what it has finished.

Exchanges cost by the piece and not by the byte, so both travel many in one message. A claim is asked for as soon as the
lease is known: claimed or not, an item is only ever taken from a member together with its whole contribution. News of
finished items waits for company for as long as nobody waits for the news. Knows nothing of computing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from koinon.errors import Refused
from koinon.net.transport import Transport
from koinon.nodes import messages as m
from koinon.nodes.faults import Point, Reach
from koinon.nodes.follower import insist
from koinon.nodes.messages import Kind
from koinon.nodes.workbench import ClaimState, Item, Workbench
from koinon.run.state import RunState
from koinon.units import PeerId, Seconds

log = logging.getLogger(__name__)
LINGER = Seconds(1.0)
"""How long news of a finished item may wait. It waits less wherever somebody would wait for it."""


class Claimant:
    """Asks and tells, one request at a time: what gathers meanwhile goes with the next one.

    `voids`: how often what this member had folded was voided, as far as it has acted on it. `granted`: set whenever an
    answer has come, for whoever looks for work.
    """

    def __init__(
        self,
        bench: Workbench,
        transport: Transport,
        state: Callable[[], RunState],
        voids: Callable[[], int],
        granted: asyncio.Event,
        reach: Reach,
    ) -> None:
        self._bench, self._transport, self._state, self._voids = bench, transport, state, voids
        self._granted, self._reach = granted, reach
        self._finished: list[m.Finished] = []
        self._moved = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._hurried = -1
        self._asking: asyncio.Task[m.Message] | None = None
        self.wanted_soon = False
        """The trainer holds items back until some of these are finished."""

    def look(self) -> None:
        """Leases have come, or the step: is there anything to ask, or to tell now?"""
        if any(self._bench.claimable()) or (self._finished and not self._may_wait()):
            self._moved.set()

    def finished(self, item: Item) -> None:
        """The item is folded, or answered."""
        lease = item.lease
        self._finished.append(m.Finished(lease.kind, lease.step, lease.microbatch, lease.revision, item.value))
        if not self._may_wait():
            self._moved.set()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LINGER.value, self._moved.set)

    def void(self, step: int) -> None:
        """What was folded at this step is lost: it is not finished after all."""
        self._finished = [f for f in self._finished if f.kind is not Kind.TRAIN or f.step != step]

    def begin_term(self, costs: Mapping[tuple[int, int], float]) -> None:
        """Another trainer holds the office: the question under way is void, and all that is finished. It is told the
        costs of steps that were taken, by (step, microbatch), which nobody else knows."""
        self._finished = [
            m.Finished(Kind.TRAIN, step, microbatch, 0, cost) for (step, microbatch), cost in costs.items()
        ]
        self._hurried, self.wanted_soon = -1, False
        if self._asking is not None:
            self._asking.cancel()
        self._moved.set()

    def hurry(self) -> None:
        """A member was lost: until the step is taken, what the trainer knows of it decides who does what again."""
        self._hurried = self._bench.step
        self._moved.set()

    async def run(self) -> None:
        """Until the task is cancelled."""
        try:
            await self._ask_and_tell()
        finally:
            self._stop_timer()

    async def _ask_and_tell(self) -> None:
        while True:
            await self._moved.wait()
            self._moved.clear()
            self._stop_timer()
            asked, finished = list(self._bench.claimable()), self._finished
            self._finished = []
            if asked or finished:
                await self._exchange(asked, finished)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

    def _may_wait(self) -> bool:
        """Whether nobody waits for the news of what is finished."""
        if self._hurried == self._bench.step or any(finished.kind is not Kind.TRAIN for finished in self._finished):
            return False
        if self.wanted_soon and 2 * len(self._finished) >= self._bench.capacity:
            return False
        return self._bench.has_open_items() and not any(self._bench.claimable())

    async def _exchange(self, asked: list[Item], finished: list[m.Finished]) -> None:
        for item in asked:
            self._reach(Point.CLAIM, item.lease.step)
            item.claim = ClaimState.ASKED
        claims = tuple(m.Claim(i.lease.step, i.lease.microbatch, i.lease.revision) for i in asked)
        try:
            answer = await self._ask(m.Claims(claims, tuple(finished), self._voids(), self._state().term))
        except Refused as refusal:
            log.info("claims refused: %s", refusal)
            answer = m.Granted(())
        assert isinstance(answer, m.Granted)
        granted = set(answer.granted)
        for index, item in enumerate(asked):
            self._reach(Point.CLAIMED, item.lease.step)
            if item.claim is ClaimState.ASKED:
                item.claim = ClaimState.GRANTED if index in granted else ClaimState.REFUSED
        self._granted.set()

    async def _ask(self, message: m.Claims) -> m.Message:
        """Insist, while the trainer that leased these items holds its office. Raises Refused."""
        trainer = PeerId(self._state().trainer)
        self._asking = asked = asyncio.create_task(insist(self._transport, trainer, m.CTL, message))
        try:
            await asyncio.wait([asked])
            if asked.cancelled():
                raise Refused(f"Term {self._state().term} began: claims of the term before are void.")
            return asked.result()
        finally:
            asked.cancel()
