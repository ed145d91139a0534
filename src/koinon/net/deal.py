"""One large body on its way over lanes: pieces dealt as fast as each lane delivers them.

The library buffers 10 MB per connection, so only the receiver's word that a piece is there tells a fast lane from a
slow one. Lanes may join while the body is under way; one that fails leaves what was not answered to the others.
Knows nothing of how many lanes there should be, nor of how they are dialled.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from koinon.errors import PeerError, PeerUnreachable
from koinon.net.iroh_channel import Channel
from koinon.net.iroh_pipe import Pipe
from koinon.net.lanes import LANE, PLACED, WIRE, Piece
from koinon.units import PeerId

UNDER_WAY: Final = 2
"""Pieces on a lane that were not answered: one is being answered while the next is on the way."""
_SMALLEST: Final = 16 * 1024
_LARGEST: Final = 256 * 1024
_LOOK_AGAIN: Final = 0.25
"""Seconds after which lanes that have come meanwhile join."""


def piece_size(nbytes: int, lanes: int) -> int:
    """Every lane gets several pieces of a body, unless they would be too small to be worth an answer."""
    return min(_LARGEST, max(_SMALLEST, nbytes // (2 * UNDER_WAY * lanes)))


class Deal:
    """A body, and the places in it from which nothing was sent, or nothing was answered by a lane that failed."""

    def __init__(self, peer: PeerId, token: bytes, body: memoryview, piece: int) -> None:
        self._peer, self._token, self._body, self._piece = peer, token, body, piece
        self._offsets = deque(range(0, len(body), piece))
        self._at_work: dict[Channel, asyncio.Task[None]] = {}

    async def run(self, lanes: Callable[[], list[Channel]]) -> int:
        """Send it all; `lanes` is asked again and again. Returns how many lanes took part.

        Raises PeerUnreachable when no lane is left and something is.
        """
        used: set[Channel] = set()
        try:
            while self._offsets or self._at_work:
                for lane in lanes():
                    if self._offsets and lane not in self._at_work and not lane.retired:
                        self._at_work[lane] = asyncio.ensure_future(self._send_over(lane))
                        used.add(lane)
                if not self._at_work:
                    raise PeerUnreachable(self._peer, {LANE: f"{len(used)} lanes were lost"})
                await self._until_some_end()
        finally:
            for task in self._at_work.values():
                task.cancel()
            await asyncio.gather(*self._at_work.values(), return_exceptions=True)
        return len(used)

    async def _until_some_end(self) -> None:
        await asyncio.wait(self._at_work.values(), timeout=_LOOK_AGAIN, return_when=asyncio.FIRST_COMPLETED)
        for lane in [lane for lane, task in self._at_work.items() if task.done()]:
            self._at_work.pop(lane).result()

    async def _send_over(self, lane: Channel) -> None:
        under_way: deque[int] = deque()
        pipe: Pipe | None = None
        try:
            pipe = await lane.take()
            while self._offsets or under_way:
                await self._step(pipe, under_way)
        except PeerError:
            lane.retire()
        finally:
            self._offsets.extend(under_way)
            if pipe is not None and under_way:
                await lane.discard(pipe)
            elif pipe is not None:
                lane.give(pipe)

    async def _step(self, pipe: Pipe, under_way: deque[int]) -> None:
        """Send one more piece, or wait for the answer to the oldest."""
        if self._offsets and len(under_way) < UNDER_WAY:
            offset = self._offsets.popleft()
            under_way.append(offset)
            data = self._body[offset : offset + self._piece]
            await pipe.write(WIRE.head(Piece(self._token, offset, len(data))), data)
        elif await pipe.header(PLACED) is None:
            raise PeerUnreachable(self._peer, {LANE: "the lane was ended"})
        else:
            under_way.popleft()
