"""Large bodies in pieces over several connections, and put together again at the other end.

The sender draws a token, announces it on the exchange's own stream, and deals pieces to its lanes as fast as each
delivers them: the library buffers 10 MB per connection, so only the receiver's word that a piece is there tells a fast
lane from a slow one. A lane that fails has its pieces dealt to the others. The receiver knows where each piece belongs,
so order and repeats do not matter. Knows nothing of how lanes are dialled.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Final

import msgspec

from koinon.errors import DeadlinePassed, FrameMalformed, PeerError, PeerUnreachable
from koinon.net.frames import Header, NBytes, Wire
from koinon.net.iroh_channel import Channel
from koinon.net.iroh_pipe import STALL, Pipe
from koinon.units import PeerId, Seconds

LANE: Final = "koinon/lane/1"
"""The ALPN of connections that carry pieces. Their bytes are counted under this name."""
ANNOUNCED: Final = Seconds(5.0)
"""How long a piece waits for its announcement, which travels on another connection."""


class Piece(Header, frozen=True, tag="piece"):
    """Bytes [offset, offset + nbytes) of the body with that token."""

    token: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    offset: NBytes
    nbytes: NBytes


class Placed(Header, frozen=True, tag="placed"):
    """The oldest piece on this lane that was not yet answered is where it belongs."""


WIRE: Final = Wire(Piece)
_PLACED: Final = Wire(Placed)
UNDER_WAY: Final = 2
"""Pieces on a lane that were not answered: one is being answered while the next is on the way."""
_SMALLEST: Final = 16 * 1024
_LARGEST: Final = 256 * 1024


def piece_size(nbytes: int, lanes: int) -> int:
    """Every lane gets several pieces of a body, unless they would be too small to be worth an answer."""
    return min(_LARGEST, max(_SMALLEST, nbytes // (2 * UNDER_WAY * lanes)))


@dataclass(slots=True)
class _Collection:
    """A body that is being put together. `missing`: offsets of the pieces not yet here."""

    body: bytearray
    piece: int
    missing: set[int]
    whole: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Collections:
    """Bodies under way to this node, by sender and token: a peer cannot add to another's."""

    def __init__(self) -> None:
        self._open: dict[tuple[PeerId, bytes], asyncio.Future[_Collection]] = {}

    async def collect(self, peer: PeerId, token: bytes, nbytes: int, piece: int) -> bytearray:
        """The whole body. The caller has checked that so many bytes are allowed. Raises DeadlinePassed on a stall."""
        collection = _Collection(bytearray(nbytes), piece, set(range(0, nbytes, piece)))
        slot = self._slot(peer, token)
        if slot.done():
            raise FrameMalformed("A token was announced twice.")
        slot.set_result(collection)
        try:
            while not collection.whole.done():
                before = len(collection.missing)
                await asyncio.wait({collection.whole}, timeout=STALL.value)
                if before == len(collection.missing):
                    raise DeadlinePassed(f"No piece of a body came from {peer[:10]} for {STALL}.")
        finally:
            self._open.pop((peer, token), None)
        return collection.body

    async def add(self, peer: PeerId, piece: Piece, pipe: Pipe) -> None:
        """Read a piece's bytes into its place. A repeat is read and dropped."""
        collection = await self._announced(peer, piece.token)
        size = min(collection.piece, len(collection.body) - piece.offset)
        if piece.offset % collection.piece or piece.nbytes != size:
            raise FrameMalformed(f"A piece [{piece.offset}, +{piece.nbytes}) has no place in its body.")
        data = await pipe.body(piece.nbytes)
        if piece.offset in collection.missing:
            memoryview(collection.body)[piece.offset : piece.offset + size] = data
            collection.missing.discard(piece.offset)
        if not collection.missing and not collection.whole.done():
            collection.whole.set_result(None)
        await pipe.write(_PLACED.head(Placed()))

    async def _announced(self, peer: PeerId, token: bytes) -> _Collection:
        try:
            async with asyncio.timeout(ANNOUNCED.value):
                return await asyncio.shield(self._slot(peer, token))
        except TimeoutError:
            self._open.pop((peer, token), None)
            raise FrameMalformed(f"A piece came whose body was not announced within {ANNOUNCED}.") from None

    def _slot(self, peer: PeerId, token: bytes) -> asyncio.Future[_Collection]:
        if (slot := self._open.get((peer, token))) is None:
            slot = self._open[peer, token] = asyncio.get_running_loop().create_future()
        return slot


async def send_pieces(lanes: Sequence[Channel], token: bytes, body: memoryview, piece: int) -> None:
    """Deal the body to the lanes. Raises PeerUnreachable when the last lane fails before the last piece is there."""
    offsets = deque(range(0, len(body), piece))
    while offsets:
        standing = [lane for lane in lanes if not lane.retired]
        if not standing:
            raise PeerUnreachable(lanes[0].peer, {LANE: f"{len(lanes)} lanes were lost"})
        async with asyncio.TaskGroup() as group:
            for lane in standing:
                group.create_task(_send_over(lane, token, body, piece, offsets))


async def _send_over(lane: Channel, token: bytes, body: memoryview, piece: int, offsets: deque[int]) -> None:
    """Send pieces until none are left; if the lane fails, leave what was not answered to the others."""
    under_way: deque[int] = deque()
    pipe: Pipe | None = None
    try:
        pipe = await lane.take()
        while offsets or under_way:
            if offsets and len(under_way) < UNDER_WAY:
                under_way.append(offsets.popleft())
                data = body[under_way[-1] : under_way[-1] + piece]
                await pipe.write(WIRE.head(Piece(token, under_way[-1], len(data))), data)
            elif await pipe.header(_PLACED) is None:
                raise PeerUnreachable(lane.peer, {LANE: "the lane was ended"})
            else:
                under_way.popleft()
    except PeerError:
        lane.retire()
    finally:
        offsets.extend(under_way)
        if pipe is not None and under_way:
            await lane.discard(pipe)
        elif pipe is not None:
            lane.give(pipe)
