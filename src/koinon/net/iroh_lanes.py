"""The lanes to each peer: dialled when they are wanted, and not again soon where that failed.

Knows nothing of what they carry.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from typing import Final

from koinon.errors import PeerError
from koinon.net.iroh_channel import Channel
from koinon.net.iroh_connections import Connections
from koinon.net.lanes import LANE
from koinon.units import PeerId

log = logging.getLogger("koinon.net")

_NOT_AGAIN_FOR: Final = 60.0
"""Seconds: a peer behind a NAT that dialled this node cannot be dialled by it."""


class Lanes:
    """Connections under `LANE`, beside those of the services."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._dials: defaultdict[PeerId, set[asyncio.Task[None]]] = defaultdict(set)
        self._hopeless_until: dict[PeerId, float] = {}

    def to(self, peer: PeerId, width: int) -> list[Channel]:
        """The lanes that stand, at most `width`; missing ones are being dialled when this returns."""
        standing = self._connections.standing(peer, LANE)[:width]
        if asyncio.get_running_loop().time() >= self._hopeless_until.get(peer, 0.0):
            for _ in range(width - len(standing) - len(self._dials[peer])):
                self._begin(peer)
        return standing

    async def first(self, peer: PeerId, width: int) -> bool:
        """Whether a lane stands, once one does or none can be had. Ends within the time of a dial."""
        while not self.to(peer, width):
            if not self._dials[peer]:
                return False
            await asyncio.wait(self._dials[peer], return_when=asyncio.FIRST_COMPLETED)
        return True

    def trim(self, peer: PeerId, width: int) -> None:
        """Let go of lanes beyond that width; one lane is none, for a body then travels on the stream of its frame."""
        for lane in self._connections.standing(peer, LANE)[width if width > 1 else 0 :]:
            self._connections.drop(lane)

    def cancel(self) -> list[asyncio.Task[None]]:
        """Give every dial up; returns the tasks that are ending."""
        tasks = [task for tasks in self._dials.values() for task in tasks]
        for task in tasks:
            task.cancel()
        return tasks

    def _begin(self, peer: PeerId) -> None:
        task = asyncio.ensure_future(self._dial(peer))
        self._dials[peer].add(task)
        task.add_done_callback(self._dials[peer].discard)

    async def _dial(self, peer: PeerId) -> None:
        try:
            await self._connections.dial(peer, LANE)
        except PeerError as error:
            self._hopeless_until[peer] = asyncio.get_running_loop().time() + _NOT_AGAIN_FOR
            log.info("no further lane to %s: %s", peer[:10], error)
