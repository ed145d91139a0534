"""Which role of this process answers which message.

Roles (coordinator, trainer, worker) share one transport and register a handler per message type; the switchboard
makes the transport's services of them. Knows nothing of what any message means.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import msgspec

from koinon.errors import Refused
from koinon.net.chunks import ChunkGiven, ChunkLater, ChunkWanted
from koinon.net.frames import Wire
from koinon.net.transport import Answer, Service, Verdict
from koinon.nodes import join_messages as j
from koinon.nodes import messages as m
from koinon.units import Bytes, PeerId

Handle = Callable[[PeerId, Any, bytearray], Awaitable[Answer]]
Limit = Callable[[PeerId, Any], int | Verdict]
Abandoned = Callable[[PeerId, Any], None]

REQUESTS: Final[Mapping[str, tuple[type[msgspec.Struct], ...]]] = {
    m.CTL: (
        m.Claims,
        m.Heartbeat,
        m.Ready,
        m.Renew,
        m.Attend,
        m.Held,
        m.Complain,
        m.Broken,
        m.Leave,
        m.InventoryWanted,
        m.StageDone,
        m.Happened,
        m.Records,
        m.Follow,
        m.Norms,
        m.Pulse,
        m.TailWanted,
        m.Shown,
    ),
    m.JOIN: (m.Join, m.Withdraw, j.Knock, j.Probe, j.Reach, j.Wave, j.Whereabouts),
    m.WORK: (m.Offer, m.Forward, m.Backward, m.Slice, m.Updated),
    m.BULK: (m.ContentWanted, ChunkWanted, m.MomentumWanted, m.MomentumGiven),
}
"""Every message that asks for something, under the one ALPN that may carry it."""
REPLIES: Final[Mapping[str, tuple[type[msgspec.Struct], ...]]] = {
    m.CTL: (m.Granted, m.Renewed, m.Ack, m.Inventory, m.Tail, m.Seen),
    m.JOIN: (m.Welcome, m.Waiting, m.Later, m.Ack, j.Opened, j.Probed, j.Reached, j.Waved, j.Known),
    m.WORK: (),
    m.BULK: (m.ContentOffered, ChunkGiven, ChunkLater, m.Tensors, m.Ack),
}


class Switchboard:
    """Handlers by message type. Register all before `services` is handed to a transport's `start`."""

    def __init__(self, state_limit: Bytes) -> None:
        """`state_limit`: the largest body of tensors that this node will take, in or out."""
        self._handlers: dict[type[msgspec.Struct], Handle] = {}
        self._limits: dict[type[msgspec.Struct], Limit] = {}
        self._abandoned: dict[type[msgspec.Struct], Abandoned] = {}
        self._state_limit = state_limit

    def on(
        self,
        message: type[msgspec.Struct],
        handler: Handle,
        limit: Limit | None = None,
        abandoned: Abandoned | None = None,
    ) -> None:
        """Answer `message` with `handler`; `limit` says at the header how many body bytes may come (default: none).

        abandoned: called instead of the handler when a body that was admitted does not come.
        """
        self._handlers[message] = handler
        if limit is not None:
            self._limits[message] = limit
        if abandoned is not None:
            self._abandoned[message] = abandoned

    def services(self) -> list[Service]:
        """One service per ALPN. Those without a handler here still let this node ask."""
        return [
            Service(
                alpn,
                Wire(*kinds),
                Wire(*REPLIES[alpn]) if REPLIES[alpn] else Wire(m.Ack),
                self._dispatch,
                body_limit=self._limit,
                abandoned=self._abandon,
                reply_limit=self._state_limit,
            )
            for alpn, kinds in REQUESTS.items()
        ]

    async def _dispatch(self, peer: PeerId, message: msgspec.Struct, body: bytearray) -> Answer:
        handler = self._handlers.get(type(message))
        if handler is None:
            raise Refused(f"This node does not answer {type(message).__name__}.")
        return await handler(peer, message, body)

    def _limit(self, peer: PeerId, message: msgspec.Struct) -> int | Verdict:
        limit = self._limits.get(type(message))
        return 0 if limit is None else limit(peer, message)

    def _abandon(self, peer: PeerId, message: msgspec.Struct) -> None:
        abandoned = self._abandoned.get(type(message))
        if abandoned is not None:
            abandoned(peer, message)
