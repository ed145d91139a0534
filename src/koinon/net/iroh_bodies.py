"""How a body travels once its header is accepted: with it, after it on the same stream, or striped over lanes.

Small bodies go with their header, since a round trip costs more than their bytes. Above `STRIPED` the sender
says which way the body comes, and the receiver says when it is whole: so goodput is measured apart from what the
receiver then does with it. Knows nothing of services.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import defaultdict
from typing import Final

from koinon.errors import FrameMalformed
from koinon.net.deal import Deal, piece_size
from koinon.net.desk import VERBS, Arrived, Inline, Striped
from koinon.net.iroh_channel import Channel
from koinon.net.iroh_connections import Connections
from koinon.net.iroh_lanes import Lanes
from koinon.net.iroh_pipe import Pipe
from koinon.net.lanes import Collections, Piece
from koinon.net.stripes import Stripes, widened
from koinon.units import PeerId

STRIPED: Final = 512 * 1024


class Bodies:
    """The bodies of one transport, both ways."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._lanes = Lanes(connections)
        self._collections = Collections()
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
        stripes = self.stripes[peer]
        stripes.observe(width, len(body), clock() - started)
        if stripes.is_settled:
            self._lanes.trim(peer, stripes.width)
        return None

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

    def cancel(self) -> list[asyncio.Task[None]]:
        """Give dials of lanes up; returns the tasks that are ending."""
        return self._lanes.cancel()

    async def take_piece(self, peer: PeerId, piece: Piece, pipe: Pipe) -> None:
        """A piece that came on a lane."""
        await self._collections.add(peer, piece, pipe)

    async def _send_large(self, peer: PeerId, pipe: Pipe, body: memoryview) -> int:
        """How many connections carried it. On a lossy path, more join the longer it takes."""
        width = self.stripes[peer].begin(len(body), lossy=self._connections.is_lossy(peer))
        if width == 1 or not await self._lanes.first(peer, width):
            await pipe.write(VERBS.head(Inline()), body)
            return 1
        clock = asyncio.get_running_loop().time
        started = clock()

        def lanes_now() -> list[Channel]:
            lossy = self._connections.is_lossy(peer)
            return self._lanes.to(peer, widened(width, clock() - started) if lossy else width)

        token, piece = secrets.token_bytes(16), piece_size(len(body), width)
        await pipe.write(VERBS.head(Striped(token, piece)))
        return await Deal(peer, token, body, piece).run(lanes_now)
