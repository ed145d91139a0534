"""Pushes the run log to everyone who follows it: one cursor and one task per follower.

A slow follower gets longer batches, not a longer queue: what it lacks is read from the log when it is ready for more.
What a follower need not act on waits a moment for company, because a push costs by the piece and not by the byte.
Knows nothing of what records mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from koinon.errors import PeerError
from koinon.net.transport import Transport
from koinon.nodes import messages as m
from koinon.run.log import RunLog
from koinon.run.record import Record
from koinon.units import PeerId, Seconds

BATCH_BYTES = 32 * 1024
"""Records in one push: well under the largest header a frame may have."""
LINGER = Seconds(1.0)
"""How long a record may wait for company on its way to those who need not act on it."""
REMEMBERED = 4096
"""Records kept in memory for followers that keep up."""


class Publisher:
    def __init__(self, log: RunLog[Any], transport: Transport) -> None:
        self._log, self._transport = log, transport
        self._recent: deque[tuple[int, bytes]] = deque(maxlen=REMEMBERED)
        self._cursors: dict[PeerId, int] = {}
        self._followers: dict[PeerId, asyncio.Task[None]] = {}
        self._due: dict[PeerId, asyncio.Event] = {}
        self._timers: dict[PeerId, asyncio.TimerHandle] = {}

    def add(self, peer: PeerId, first: int) -> None:
        """Send the log to `peer` from record `first` on; replaces an earlier wish."""
        self.remove(peer)
        self._due[peer] = asyncio.Event()
        self._followers[peer] = asyncio.create_task(self._feed(peer, first), name=f"publish to {peer[:8]}")

    def remove(self, peer: PeerId) -> None:
        self._cursors.pop(peer, None)
        self._due.pop(peer, None)
        self._stop_timer(peer)
        if task := self._followers.pop(peer, None):
            task.cancel()

    async def drain(self, patience: Seconds) -> None:
        """Wait until every follower has the whole log, or until patience ends."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience.value):
                while any(cursor <= self._log.head.seq for cursor in self._cursors.values()):
                    await asyncio.sleep(0.02)

    def publish(self, records: Sequence[Record], is_urgent: Callable[[PeerId], bool]) -> None:
        """These were just appended. Whom they do not concern gets them within `LINGER`, with what comes meanwhile."""
        self._recent.extend((record.seq, record.encode()) for record in records)
        for peer, due in self._due.items():
            if is_urgent(peer):
                due.set()
            elif not due.is_set() and peer not in self._timers:
                self._timers[peer] = asyncio.get_running_loop().call_later(LINGER.value, due.set)

    def close(self) -> None:
        for peer in list(self._followers):
            self.remove(peer)

    async def _feed(self, peer: PeerId, cursor: int) -> None:
        pause, due = 0.1, self._due[peer]
        self._cursors[peer] = cursor
        while True:
            due.clear()
            self._stop_timer(peer)
            while batch := list(self._batch(cursor)):
                try:
                    reply = await self._transport.request(peer, m.CTL, m.Records(cursor, tuple(batch)))
                except PeerError:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, 2.0)
                    continue
                assert isinstance(reply.header, m.Ack)
                cursor, pause = max(1, reply.header.next), 0.1
                self._cursors[peer] = cursor
            await due.wait()

    def _stop_timer(self, peer: PeerId) -> None:
        if timer := self._timers.pop(peer, None):
            timer.cancel()

    def _batch(self, cursor: int) -> Iterator[bytes]:
        size = 0
        for raw in self._from(cursor):
            size += len(raw) + 8
            if size > BATCH_BYTES and size > len(raw) + 8:
                return
            yield raw

    def _from(self, cursor: int) -> Iterator[bytes]:
        """Encoded records from `cursor` on: from memory, or for a late comer from the disk."""
        if self._recent and cursor >= self._recent[0][0]:
            start = cursor - self._recent[0][0]
            yield from (raw for _, raw in itertools.islice(self._recent, start, None))
        else:
            yield from (record.encode() for record in self._log.records(cursor))
