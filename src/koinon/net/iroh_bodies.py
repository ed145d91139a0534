"""How a body travels once its header is accepted: with it, after it on the same stream, or striped over lanes.

Small bodies go with their header, since a round trip costs more than their bytes. Above `STRIPED` the sender
says which way the body comes, and the receiver says when it is whole: so goodput is measured apart from what the
receiver then does with it. Knows nothing of services, and takes lanes from whoever dials them.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import defaultdict
from collections.abc import Callable
from typing import Final

from koinon.errors import FrameMalformed
from koinon.net import lanes
from koinon.net.desk import VERBS, Arrived, Inline, Striped
from koinon.net.iroh_channel import Channel
from koinon.net.iroh_pipe import Pipe
from koinon.net.stripes import Stripes
from koinon.units import PeerId

STRIPED: Final = 512 * 1024


class Bodies:
    """The bodies of one transport, both ways. `lanes_to` gives the lanes that stand, and has missing ones dialled."""

    def __init__(self, lanes_to: Callable[[PeerId, int], list[Channel]]) -> None:
        self._lanes_to = lanes_to
        self._collections = lanes.Collections()
        self.stripes: defaultdict[PeerId, Stripes] = defaultdict(Stripes)

    async def send(self, peer: PeerId, pipe: Pipe, body: memoryview) -> None:
        """The body of the frame whose header was sent on this pipe. Returns when it has left, or, if large, arrived."""
        if len(body) <= STRIPED:
            return await pipe.write(b"", body)
        clock = asyncio.get_running_loop().time
        started = clock()
        width = await self._send_large(peer, pipe, body)
        if not isinstance(await pipe.header(VERBS), Arrived):
            raise FrameMalformed(f"{peer[:10]} did not say that a large body arrived.")
        return self.stripes[peer].observe(width, len(body), clock() - started)

    async def take(self, peer: PeerId, pipe: Pipe, nbytes: int) -> bytearray:
        """The body of the frame whose header was read from this pipe, and whose size was found acceptable."""
        if nbytes <= STRIPED:
            return await pipe.body(nbytes) if nbytes else bytearray()
        match await pipe.header(VERBS):
            case Inline():
                body = await pipe.body(nbytes)
            case Striped(token=token, piece=piece):
                body = await self._collections.collect(peer, token, nbytes, piece)
            case other:
                raise FrameMalformed(f"{peer[:10]} said {other!r} instead of how a large body comes.")
        await pipe.write(VERBS.head(Arrived()))
        return body

    async def take_piece(self, peer: PeerId, piece: lanes.Piece, pipe: Pipe) -> None:
        """A piece that came on a lane."""
        await self._collections.add(peer, piece, pipe)

    async def _send_large(self, peer: PeerId, pipe: Pipe, body: memoryview) -> int:
        """How many connections carried it."""
        width = self.stripes[peer].width
        standing = self._lanes_to(peer, width) if width > 1 else []
        if len(standing) < 2:
            await pipe.write(VERBS.head(Inline()), body)
            return 1
        token, piece = secrets.token_bytes(16), lanes.piece_size(len(body), len(standing))
        await pipe.write(VERBS.head(Striped(token, piece)))
        await lanes.send_pieces(standing, token, body, piece)
        return len(standing)
