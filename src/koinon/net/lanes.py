"""Large bodies that come in pieces over several connections, put together again.

The sender draws a token and announces it on the exchange's own stream; each piece names the token and its place. So
order and repeats do not matter, and lanes can come and go. Knows nothing of how pieces are dealt: see `deal`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Annotated, Final

import msgspec

from koinon.errors import DeadlinePassed, FrameMalformed
from koinon.net.frames import Header, NBytes, Wire
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
PLACED: Final = Wire(Placed)


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
        await pipe.write(PLACED.head(Placed()))

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
