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
from collections.abc import Callable, Iterable, Iterator, Sequence
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
        self._standbys: set[PeerId] = set()
        self._onlookers: set[PeerId] = set()

    def add(self, peer: PeerId, first: int, *, stands_by: bool = False, looks_on: bool = False) -> None:
        """Send the log to `peer` from record `first` on; replaces an earlier wish.

        Onlookers are sent nothing that no standby has: what people were shown must outlive this process.
        """
        self.remove(peer)
        if stands_by:
            self._standbys.add(peer)
        if looks_on:
            self._onlookers.add(peer)
        self._due[peer] = asyncio.Event()
        self._followers[peer] = asyncio.create_task(self._feed(peer, first), name=f"publish to {peer[:8]}")

    def remove(self, peer: PeerId) -> None:
        self._cursors.pop(peer, None)
        self._due.pop(peer, None)
        self._stop_timer(peer)
        self._standbys.discard(peer)
        self._onlookers.discard(peer)
        self._wake_onlookers()
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
            while records := tuple(itertools.islice(batch(self._from(cursor)), self._allowance(peer, cursor))):
                try:
                    reply = await self._transport.request(peer, m.CTL, m.Records(cursor, records))
                except PeerError:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, 2.0)
                    continue
                assert isinstance(reply.header, m.Ack)
                cursor, pause = max(1, reply.header.next), 0.1
                self._cursors[peer] = cursor
                if peer in self._standbys:
                    self._wake_onlookers()
            await due.wait()

    def _stop_timer(self, peer: PeerId) -> None:
        if timer := self._timers.pop(peer, None):
            timer.cancel()

    def _wake_onlookers(self) -> None:
        for peer in self._onlookers:
            self._due[peer].set()

    def _allowance(self, peer: PeerId, cursor: int) -> int:
        """How many records this follower may be sent from `cursor` on."""
        if peer not in self._onlookers or not self._standbys:
            return self._log.head.seq + 1 - cursor
        return max(0, max(self._cursors.get(standby, 1) for standby in self._standbys) - cursor)

    def _from(self, cursor: int) -> Iterator[bytes]:
        """Encoded records from `cursor` on: from memory, or for a late comer from the disk."""
        if self._recent and cursor >= self._recent[0][0]:
            start = cursor - self._recent[0][0]
            yield from (raw for _, raw in itertools.islice(self._recent, start, None))
        else:
            yield from (record.encode() for record in self._log.records(cursor))


def batch(records: Iterable[bytes]) -> Iterator[bytes]:
    """As many of the encoded records, from the first, as one header takes; at least one, if there is one."""
    size = 0
    for raw in records:
        size += len(raw) + 8
        if size > BATCH_BYTES and size > len(raw) + 8:
            return
        yield raw
