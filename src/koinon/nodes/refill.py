"""The coordinator's part when a stage is emptied: the run pauses, and refills, or goes back together, or fails.

Nothing is decided from what members say they have when they join: before the run goes back, every member reads its
snapshots again and compares them with the log. Knows nothing of leases or reduces.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from koinon.errors import PeerError
from koinon.net.transport import Transport
from koinon.nodes import messages as m
from koinon.run import events as ev
from koinon.run.policies.refill import emptied, everybody_is_back, goes_back_to
from koinon.run.spec import RunSpec
from koinon.run.state import RunState, Seat, StageState
from koinon.units import PeerId, Seconds

log = logging.getLogger(__name__)
RESTORING = Seconds(5.0)
"""What somebody is given to load its snapshot, once nobody else can come, before all are asked what they have."""


class Refill:
    """`watch` is called now and then; what it decides goes through `write`."""

    def __init__(
        self,
        spec: RunSpec,
        transport: Transport,
        state: Callable[[], RunState],
        write: Callable[[ev.Event], None],
        term: Callable[[], int],
        clock: Callable[[], float],
    ) -> None:
        self._league, self._transport, self._state, self._write = spec.league, transport, state, write
        self._term, self._clock = term, clock
        self._since: dict[int, float] = {}
        self._asking: asyncio.Task[None] | None = None
        self._ask_after = 0.0

    def watch(self) -> None:
        """Raises what `write` raises."""
        state, now = self._state(), self._clock()
        empty = emptied(state)
        self._since = {stage.index: self._since.get(stage.index, now) for stage in empty}
        if self._asking is not None and self._asking.done():
            asking, self._asking = self._asking, None
            asking.result()
        if not empty:
            return
        waited = now - min(self._since.values())
        if self._league.pause_s and waited > self._league.pause_s:
            self._write(ev.RunFailed(_given_up(empty, Seconds(waited))))
        elif self._asking is None and now >= self._ask_after and all(self._is_due(state, s, now) for s in empty):
            self._ask_after = now + max(RESTORING.value, self._league.grace_s / 2)
            self._asking = asyncio.create_task(self._go_back(), name="refill")

    def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()

    def _is_due(self, state: RunState, stage: StageState, now: float) -> bool:
        """Whether it is time to look for an older step: whoever comes later might have had the newest."""
        patience = self._league.grace_s
        if everybody_is_back(state, stage.index):
            patience = min(patience, RESTORING.value)
        return now - self._since[stage.index] >= patience

    async def _go_back(self) -> None:
        asked = self._state()
        seats = [seat for stage in asked.stages for seat in asked.seats_of(stage.index)]
        supplies: dict[int, dict[int, str]] = {}
        for stage, found in await asyncio.gather(*(self._ask(asked, seat) for seat in seats)):
            supplies.setdefault(stage, {}).update(found)
        state = self._state()
        if (step := goes_back_to(state, supplies)) is not None:
            log.warning("stages %s are emptied: all go back to step %s", [s.index for s in emptied(state)], step)
            self._write(ev.RunResumed(step, self._term()))

    async def _ask(self, state: RunState, seat: Seat) -> tuple[int, dict[int, str]]:
        """What one member has on its disk, by step."""
        roots = {version.step: version.root for version in state.stages[seat.stage].versions}
        wanted = m.InventoryWanted(seat.stage, tuple(roots.items()))
        try:
            reply = await self._transport.request(PeerId(seat.worker), m.CTL, wanted)
        except PeerError as error:
            log.info("member %s does not say what it has: %s", seat.member, error)
            return seat.stage, {}
        assert isinstance(reply.header, m.Inventory)
        return seat.stage, {step: roots[step] for step in reply.header.steps if step in roots}


def _given_up(empty: list[StageState], waited: Seconds) -> str:
    needed = " and ".join(f"stage {stage.index} at step {stage.step}" for stage in empty)
    return (
        f"Nobody has {needed} any more, and nobody came back with it in {waited} (`pause_s` in [league]). Bring back a "
        "machine that held it, with its folder, then resume: the run goes back to the newest step that every stage has."
    )
