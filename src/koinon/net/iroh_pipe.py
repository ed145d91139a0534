"""One bidirectional iroh stream, read and written as frames.

A pipe carries one exchange at a time and is used again for the next: opening a stream costs more than a small request.
Inside a frame every await has a deadline; waiting for the next frame has none here: whoever asked holds one. An await
that was cancelled has lost bytes, so the pipe is abandoned, never reused. Knows nothing of what frames mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import msgspec
from iroh import IrohError

from koinon.errors import DeadlinePassed, FrameMalformed, PeerUnreachable
from koinon.net.edges import Count
from koinon.net.frames import Buffer, FrameReader, Wire
from koinon.units import PeerId, Seconds

T = TypeVar("T")

COALESCE: Final = 128 * 1024
"""Up to here the parts of a frame are joined: one call into the library costs more than the copy."""
PIECE: Final = 256 * 1024
"""Bytes per write of a large body. The library copies twice, so larger pieces only cost memory."""
_READ_FIRST: Final = 32 * 1024
_READ_MOST: Final = 1024 * 1024
STALL: Final = Seconds(15.0)
"""A peer that began a frame and then moves nothing for so long has given it up."""
ABANDONED: Final = 1
"""Stream error code: the exchange ended early, for a reason that is told elsewhere."""


class ConnectionLost(PeerUnreachable):
    """The connection ended under an exchange. `sent`: whether the peer may have read the request."""

    sent = True


class Pipe:
    """Frames over one stream. `lost` makes the error of a library error: it knows the peer and the connection."""

    def __init__(self, stream: Any, peer: PeerId, count: Count, lost: Callable[[IrohError], ConnectionLost]) -> None:
        self._send, self._recv = stream.send(), stream.recv()
        self._peer, self._count, self._lost = peer, count, lost
        self._reader = FrameReader()
        self._clock = asyncio.get_running_loop().time

    async def write(self, head: bytes, body: Buffer = b"") -> None:
        """A frame, or the rest of one (no head). A small frame leaves in one piece."""
        self._count.sent += len(head) + len(body)
        if head and len(head) + len(body) <= COALESCE:
            head, body = b"".join((head, body)), b""
        if head:
            await self._moving(self._send.write_all(head))
        view = memoryview(body)
        for start in range(0, len(view), PIECE):
            await self._moving(self._send.write_all(view[start : start + PIECE]))

    def bound(self, header: int) -> None:
        """No longer headers than that are waited for."""
        self._reader.limit = header

    async def header(self, wire: Wire) -> msgspec.Struct | None:
        """The next header; None when the peer ended the stream between two frames. Raises FrameError, DeadlinePassed.

        Whoever has begun one ends it in `STALL`, however the bytes drip.
        """
        begun: float | None = None
        while (header := self._reader.header(wire)) is None:
            reading = self._read(self._recv.read(max(_READ_FIRST, self._reader.wanted)))
            if self._reader.held:
                begun = begun if begun is not None else self._clock()
                data = await self._moving(reading, begun + STALL.value)
            else:
                data = await reading
            if not data:
                if self._reader.held:
                    raise FrameMalformed("A stream ended inside a header.")
                return None
        return header

    async def body(self, nbytes: int) -> bytearray:
        """The body of the frame whose header was read. The caller has checked that so many bytes are allowed."""
        self._reader.expect(nbytes)
        while (body := self._reader.body()) is None:
            await self._moving(self._read(self._recv.read_exact(min(self._reader.wanted, _READ_MOST))))
        return body

    async def finish(self) -> None:
        """No more frames from this side; what was written still arrives."""
        await self._try(self._send.finish())

    async def turn_away(self) -> None:
        """No more frames from either side; what was written still arrives."""
        await self.finish()
        await self._try(self._recv.stop(ABANDONED))

    async def abandon(self) -> None:
        """Give the stream up: what is under way on it is not wanted any more."""
        for ending in (self._send.reset(ABANDONED), self._recv.stop(ABANDONED)):
            try:
                await ending
            except IrohError:
                pass  # it ended by itself

    async def _read(self, reading: Awaitable[bytes]) -> bytes:
        data = await self._try(reading)
        self._count.received += len(data)
        self._count.heard = self._clock()
        self._reader.feed(data)
        return data

    async def _moving(self, call: Awaitable[T], until: float | None = None) -> T:
        """Something that a living peer and link do soon."""
        try:
            async with asyncio.timeout_at(until if until is not None else self._clock() + STALL.value):
                return await self._try(call)
        except TimeoutError:
            raise DeadlinePassed(f"{self._peer[:10]} stopped in the middle of a frame for {STALL}.") from None

    async def _try(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except IrohError as error:
            raise self._lost(error) from error
