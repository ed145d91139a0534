"""Brings what a worker has computed to the neighbours on an item's route, and again to whoever takes their place.

The bytes are those that the bench keeps, so a neighbour's replacement is served without computing anything again. Knows
nothing of what the bytes mean.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from koinon.errors import PeerError
from koinon.net.transport import Busy, Drop, Transport
from koinon.nodes import messages as m
from koinon.nodes.clock import loop_time
from koinon.nodes.counters import Counters
from koinon.nodes.flight import ids_of, packed_ids
from koinon.nodes.messages import Kind
from koinon.nodes.workbench import Item, Workbench
from koinon.run.events import Member
from koinon.run.state import RunState, SeatStatus
from koinon.units import PeerId

log = logging.getLogger(__name__)
Spawn = Callable[[Coroutine[Any, Any, None]], None]


class Courier:
    """`spawn` runs a push in the background, for as long as the worker lives."""

    def __init__(
        self,
        bench: Workbench,
        transport: Transport,
        state: Callable[[], RunState],
        counters: Counters,
        vocab: int,
        spawn: Spawn,
    ) -> None:
        self._bench, self._transport, self._state = bench, transport, state
        self._counters, self._vocab, self._spawn = counters, vocab, spawn

    def route(self, item: Item) -> None:
        """Hand what we computed to whoever holds the neighbouring places on the route now."""
        stage, route = self._bench.stage, item.lease.route
        if not self._bench.is_mine(item):
            return
        if item.left is not None and item.forward_to != route[stage + 1]:
            item.forward_to = route[stage + 1]
            self._spawn(self._forward(item, route[stage + 1]))
        if item.returned is not None and item.backward_to != route[stage - 1]:
            item.backward_to = route[stage - 1]
            self._spawn(self._back(item, route[stage - 1]))

    async def _forward(self, item: Item, member: int) -> None:
        assert item.left is not None
        lease, ids = item.lease, ids_of(item.ids, self._vocab)
        body = item.left + packed_ids(item.ids, ids)
        header = m.Forward(lease, ids, len(body))
        sent = await self._push(item, member, header, body, lambda: item.forward_to == member)
        if sent and lease.kind is not Kind.TRAIN:
            self._bench.items.pop(item.key, None)

    async def _back(self, item: Item, member: int) -> None:
        assert item.returned is not None
        lease = item.lease
        header = m.Backward(lease.step, lease.microbatch, lease.revision, len(item.returned))
        await self._push(item, member, header, item.returned, lambda: item.backward_to == member)

    async def _push(self, item: Item, member: int, header: m.Message, body: bytes, wanted: Callable[[], bool]) -> bool:
        """Until the neighbour has it, or it is no longer the one who needs it. True if it got there."""
        pause = 0.02
        while self._bench.items.get(item.key) is item and wanted():
            seat = self._state().seats.get(Member(member))
            if seat is not None and seat.status is SeatStatus.LEFT:
                return False
            if seat is not None:
                began = loop_time()
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
                    self._counters.sent(header, body, item, loop_time() - began)
                    return True
            await asyncio.sleep(pause)
            pause = min(2 * pause, 1.0)
        return False
