"""Leaving politely: what a member has claimed is committed first, and what only it holds is handed over.

Whoever vanishes costs the league its items of one step, and a tensor's optimizer state if nobody else held that. A
member that leaves costs neither. It is leased nothing from when the log says that it drains; it waits for its stage's
step, as long as steps usually take, and goes. Knows nothing of processes and signals.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from koinon.errors import PeerError
from koinon.nodes import messages as m
from koinon.nodes.clock import loop_time
from koinon.nodes.engine import Engine
from koinon.nodes.follower import Office
from koinon.nodes.messages import Kind
from koinon.nodes.reducer import Shares
from koinon.nodes.syncer import Syncer
from koinon.nodes.workbench import ClaimState, Workbench
from koinon.run.events import Member
from koinon.run.policies.deadlines import History, deadline, observe
from koinon.run.state import Phase, RunState, SeatStatus
from koinon.units import PeerId, Seconds

log = logging.getLogger(__name__)
PATIENCE_FLOOR = Seconds(10.0)
"""A step may take that long whatever earlier ones took."""
ANSWER = Seconds(2.0)
"""A coordinator that does not answer in that time may be gone itself, as when a whole machine is shut down."""
GLANCE = 0.02


class Departure:
    """One member's way out. `step_taken` is told of every step of its stage."""

    def __init__(
        self,
        office: Office,
        bench: Workbench,
        engine: Engine,
        syncer: Syncer,
        state: Callable[[], RunState],
    ) -> None:
        self._office, self._bench, self._engine = office, bench, engine
        self._syncer, self._state = syncer, state
        self._steps = History()
        self._last_step: float | None = None

    def step_taken(self) -> None:
        now = loop_time()
        if self._last_step is not None:
            self._steps = observe(self._steps, Seconds(now - self._last_step))
        self._last_step = now

    async def drain(self, reason: str) -> None:
        """Returns when nothing is left to wait for. Whoever calls it says goodbye then."""
        first, patience = self._engine.step, deadline(self._steps, floor=PATIENCE_FLOOR)
        try:
            wish = m.Leave(self._bench.member, reason, finishes=True)
            await self._office.ask(wish, deadline=ANSWER)
            async with asyncio.timeout(patience.value):
                while self._status() is SeatStatus.READY:
                    await asyncio.sleep(GLANCE)
                while self._status() is SeatStatus.DRAINING and self._engine.step == first and self._holds():
                    await asyncio.sleep(GLANCE)
                await self._hand_over()
        except PeerError as error:
            log.info("leaving without more ado: %s", error)
        except TimeoutError:
            log.warning("leaving though the step is not taken: that took more than %s", patience)

    def _status(self) -> SeatStatus | None:
        state = self._state()
        seat = state.seats.get(Member(self._bench.member))
        return None if seat is None or state.phase is not Phase.TRAINING else seat.status

    def _holds(self) -> bool:
        """Whether any item of this step is in our gradient, or on its way into it."""
        bench = self._bench
        claimed = (ClaimState.ASKED, ClaimState.GRANTED)
        return any(
            item.lease.kind is Kind.TRAIN and item.lease.step == bench.step and bench.is_mine(item)
            and bench.folds(item) and (item.is_done or item.claim in claimed)
            for item in bench.items.values()
        )  # fmt: skip

    async def _hand_over(self) -> None:
        """Optimizer state that no member who stays has goes to one of them. It may step meanwhile, and so may we."""
        while self._status() is SeatStatus.DRAINING and (names := self._only_here()):
            heir = self._state().ready(self._bench.stage)[0]
            try:
                await self._syncer.hand_over(PeerId(heir.worker), self._engine, names)
            except PeerError as error:
                log.info("member %s did not take over: %s", heir.member, error)
                await asyncio.sleep(GLANCE)
            else:
                log.info("handed the optimizer state of %d tensors to member %s", len(names), heir.member)
                return

    def _only_here(self) -> list[str]:
        """Tensors whose optimizer state nobody who stays has; none where nobody stays."""
        state = self._state()
        stage = state.stages[self._bench.stage]
        staying = {seat.member for seat in state.ready(stage.index)}
        version = next((v for v in stage.versions if v.step == self._engine.step), None)
        if not staying or version is None or self._bench.member not in version.members:
            return []
        shares = Shares.among(self._engine.sizes, version.members, state)
        held = {name for member in staying & set(version.members) for name in shares.summed[member]}
        return [name for name in self._engine.momentum if name not in held]
