"""Pushes the run log to everyone who follows it: one cursor and one task per follower.

A slow follower gets longer batches, not a longer queue: what it lacks is read from the log when it is ready for more.
Knows nothing of what records mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import msgspec

from koinon.errors import PeerError
from koinon.net.transport import Transport
from koinon.nodes import messages as m
from koinon.run.log import RunLog
from koinon.units import PeerId

BATCH_BYTES = 32 * 1024
"""Records in one push: well under the largest header a frame may have."""


class Publisher:
    def __init__(self, log: RunLog[Any], transport: Transport) -> None:
        self._log, self._transport = log, transport
        self._news = asyncio.Event()
        self._followers: dict[PeerId, asyncio.Task[None]] = {}

    def add(self, peer: PeerId, first: int) -> None:
        """Send the log to `peer` from record `first` on; replaces an earlier wish."""
        self.remove(peer)
        self._followers[peer] = asyncio.create_task(self._feed(peer, first), name=f"publish to {peer[:8]}")

    def remove(self, peer: PeerId) -> None:
        if task := self._followers.pop(peer, None):
            task.cancel()

    def wake(self) -> None:
        """There is something new in the log."""
        self._news.set()
        self._news = asyncio.Event()

    def close(self) -> None:
        for peer in list(self._followers):
            self.remove(peer)

    async def _feed(self, peer: PeerId, cursor: int) -> None:
        pause = 0.1
        while True:
            news = self._news
            while batch := list(self._batch(cursor)):
                try:
                    reply = await self._transport.request(peer, m.CTL, m.Records(cursor, tuple(batch)))
                except PeerError:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, 2.0)
                    continue
                assert isinstance(reply.header, m.Ack)
                cursor, pause = max(1, reply.header.next), 0.1
            await news.wait()

    def _batch(self, cursor: int) -> Iterator[bytes]:
        size = 0
        for record in self._log.records(cursor):
            raw = msgspec.msgpack.encode(record)
            size += len(raw) + 8
            if size > BATCH_BYTES and size > len(raw) + 8:
                return
            yield raw
