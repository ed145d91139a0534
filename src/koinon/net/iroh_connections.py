"""The connections of one node: dialled, accepted, shared by concurrent callers, replaced when a peer was restarted.

Every await of the library stands under a deadline. Knows nothing of services or frames: it hands each pipe that a peer
opens to `serve`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

import iroh

from koinon.errors import PeerError, PeerUnreachable, PortInUse, Refused, TransportUnusable
from koinon.net import iroh_buffers
from koinon.net.allowance import Allowance, Rate
from koinon.net.deadlines import CONNECT
from koinon.net.dials import Dials
from koinon.net.edges import Edges
from koinon.net.iroh_channel import GOODBYE, REFUSED, Channel, why
from koinon.net.iroh_pipe import ConnectionLost, Pipe
from koinon.net.threshold import Caller, Ruling, Threshold
from koinon.net.transport import Gate, Hello
from koinon.units import PeerId, Seconds

log = logging.getLogger("koinon.net")

MAX_STRANGERS: Final = 1024
"""Connections of strangers. One more closes the one that has been silent longest."""
PER_STRANGER: Final = 8
CALLS: Final = Rate(40, 2.0), Rate(4096, 1000.0)
"""Connections that one stranger's key may begin, and all together."""
MAX_CHANNELS: Final = 128
"""Connections that one peer may hold to this node."""
MAX_SPREAD: Final = 12
"""Connections per peer and ALPN for bodies that are too small to be striped."""
_CLOSING: Final = Seconds(1.0)
"""The library also waits for dials that lead nowhere. Good-byes leave at once."""


@dataclass(frozen=True, slots=True)
class Host:
    """What connections ask of the transport that they belong to."""

    hello: Callable[[], Hello]
    gate: Gate
    addresses: Callable[[PeerId], tuple[str, ...]]
    serve: Callable[[Channel, Pipe], Awaitable[None]]
    spawn: Callable[[Coroutine[Any, Any, None]], None]
    knows: Callable[[PeerId], bool]
    """Whether a peer is no stranger."""
    is_friend: Callable[[str], bool]
    """Whether a peer that is no stranger may be at that address."""


class Connections:
    """Standing connections by peer and ALPN."""

    def __init__(self, host: Host, edges: Edges) -> None:
        self._host, self._edges = host, edges
        self._endpoint: Any = None
        self._alpns: set[str] = set()
        """Under which there were connections: few, for they are this node's own services."""
        self._channels: dict[tuple[PeerId, str], list[Channel]] = {}
        self._dials = Dials(self.dial)
        self._widening: set[tuple[PeerId, str]] = set()
        self._threshold = Threshold(host.is_friend)
        self._calls = Allowance(*CALLS, remembered=4096)
        self._strangers: set[Channel] = set()

    async def listen(self, secret: bytes, bind: str, alpns: Sequence[str]) -> tuple[str, ...]:
        """Bind and accept; returns the addresses. Raises PortInUse, TransportUnusable."""
        iroh_buffers.make_usable()
        options = iroh.EndpointOptions(
            preset=iroh.preset_minimal(),  # the default preset publishes to public name servers
            relay_mode=iroh.RelayMode.disabled(),
            bind_addr=bind,
            secret_key=secret,
            alpns=[alpn.encode() for alpn in alpns],
        )
        try:
            self._endpoint = await iroh.Endpoint.bind(options)
        except iroh.IrohError as error:
            raise _unbound(bind, error) from error
        self._host.spawn(self._accept_all())
        return self._listening(bind)

    async def close(self) -> None:
        """Every connection, then the endpoint. Peers learn it at once."""
        for channel in self.all():
            channel.close(GOODBYE, "the node was closed")
        await asyncio.gather(*self._dials.cancel(), return_exceptions=True)
        if self._endpoint is not None:
            with contextlib.suppress(TimeoutError, iroh.IrohError):  # what is left ends with the process
                async with asyncio.timeout(_CLOSING.value):
                    await self._endpoint.close()
        self._channels.clear()
        self._endpoint = None  # the library frees the socket with the last reference, not before

    def all(self) -> list[Channel]:
        return [channel for channels in self._channels.values() for channel in channels]

    def standing(self, peer: PeerId, alpn: str) -> list[Channel]:
        """Connections that may carry something new."""
        return [channel for channel in self._channels.get((peer, alpn), ()) if not channel.retired]

    def is_lossy(self, peer: PeerId) -> bool:
        """Whether packets on some connection to this peer are lost."""
        return any(channel.is_lossy() for channel in self.all() if channel.peer == peer and not channel.retired)

    def drop(self, channel: Channel) -> None:
        """Use it for nothing new."""
        channel.retire()
        standing = self._channels.get((channel.peer, channel.alpn), [])
        if channel in standing:
            standing.remove(channel)
        if not standing:
            self._channels.pop((channel.peer, channel.alpn), None)
        self._forget_stranger(channel)

    async def connect(self, peer: PeerId, alpn: str) -> Channel:
        """A standing connection, or a new one; concurrent callers share one dial. Raises what `dial` raises."""
        standing = self.standing(peer, alpn)
        return self._least_busy(standing) if standing else await self._dials.join(peer, alpn)

    def moved(self, peer: PeerId) -> None:
        """The peer has other addresses now."""
        self._dials.moved(peer)

    def _least_busy(self, standing: list[Channel]) -> Channel:
        """Where exchanges wait for each other on a lossy path, another connection is dialled for the next.

        Loss holds one Cubic connection at 2-4 of 80 Mbit/s however many exchanges share it (1% and 50 ms).
        """
        channel = min(standing, key=lambda c: c.busy) if len(standing) > 1 else standing[0]
        key = (channel.peer, channel.alpn)
        if channel.busy and len(standing) < MAX_SPREAD and key not in self._widening and channel.is_lossy():
            self._widening.add(key)
            self._host.spawn(self._widen(*key))
        return channel

    async def _widen(self, peer: PeerId, alpn: str) -> None:
        try:
            await self.dial(peer, alpn)
        except PeerError as error:
            log.info("no further connection to %s for %s: %s", peer[:10], alpn, error)
        finally:
            self._widening.discard((peer, alpn))

    async def dial(self, peer: PeerId, alpn: str) -> Channel:
        """One more connection. Raises PeerUnreachable, Refused, ProtocolMismatch."""
        addresses = self._host.addresses(peer)
        if not addresses:
            raise PeerUnreachable(peer, {})
        try:
            async with asyncio.timeout(CONNECT.value):
                channel = await self._reach(peer, alpn, addresses)
                await channel.introduce(self._host.hello(), self._host.gate)
        except TimeoutError:
            raise PeerUnreachable(peer, dict.fromkeys(addresses, f"no answer in {CONNECT}")) from None
        except iroh.IrohError as error:
            if _is_unserved(error):
                raise Refused(f"{peer[:10]} does not serve {alpn}") from error
            raise PeerUnreachable(peer, dict.fromkeys(addresses, why(error))) from error
        self._keep(channel)
        self._host.spawn(self._attend(channel))
        return channel

    async def _reach(self, peer: PeerId, alpn: str, addresses: tuple[str, ...]) -> Channel:
        """Tried twice: the library remembers an address that failed, and may answer from memory at first."""
        where = iroh.EndpointAddr(iroh.EndpointId.from_string(peer), None, list(addresses))
        try:
            connection = await self._endpoint.connect(where, alpn.encode())
        except iroh.IrohError as error:
            if _is_unserved(error):
                raise
            connection = await self._endpoint.connect(where, alpn.encode())
        return Channel(connection, peer, alpn, self._edges.count(peer, alpn))

    async def _accept_all(self) -> None:
        clock = asyncio.get_running_loop().time
        while (incoming := await self._endpoint.accept_next()) is not None:
            caller = await _caller(incoming)
            match self._threshold.judge(caller, clock()):
                case Ruling.ENTER:
                    self._host.spawn(self._welcome(incoming, caller))
                case Ruling.PROVE:
                    self._host.spawn(_told(incoming.retry()))
                case Ruling.REFUSE:
                    self._host.spawn(_told(incoming.refuse()))

    async def _welcome(self, incoming: Any, caller: Caller) -> None:
        clock, took = asyncio.get_running_loop().time, None
        began = clock()
        try:
            async with asyncio.timeout(self._threshold.patience().value):
                channel = self._channel_of(await (await incoming.accept()).connect())
                pipe = await channel.welcome(self._host.hello(), self._host.gate)
            if channel.is_stranger and self._host.knows(channel.peer):
                channel.trust(pipe)
            took = clock() - began
        except (iroh.IrohError, TimeoutError, PeerError) as error:
            log.info("a connection was not made: %s", why(error) if isinstance(error, iroh.IrohError) else error)
            return
        finally:
            self._threshold.leave(caller, took)
        self._keep(channel)
        self._host.spawn(self._serve(channel, pipe))
        await self._attend(channel)

    def _channel_of(self, connection: Any) -> Channel:
        peer, alpn = PeerId(str(connection.remote_id())), connection.alpn().decode()
        channel = Channel(connection, peer, alpn, self._edges.count(peer, alpn))
        known = self._host.knows(peer)
        most, reason = (MAX_CHANNELS if known else PER_STRANGER), ""
        if not known:
            channel.distrust()
            if wait := self._calls.take(peer, 1, asyncio.get_running_loop().time()).value:
                reason = f"refused: you have called too often; call again in {Seconds(wait)}"
        if not reason and sum(len(self._channels.get((peer, name), ())) for name in self._alpns) >= most:
            reason = f"refused: you hold {most} connections to this node"
        if reason:
            channel.close(REFUSED, reason)
            self._forget_stranger(channel)
            raise Refused(reason)
        return channel

    def _seat_stranger(self, channel: Channel) -> None:
        """Among those of other strangers; where there are too many, the one that was silent longest makes room."""
        self._strangers.add(channel)
        if len(self._strangers) > MAX_STRANGERS:
            silent = min(self._strangers, key=lambda other: other.heard)
            self._strangers.discard(silent)
            silent.close(GOODBYE, "others need the place: call again")

    def _forget_stranger(self, channel: Channel) -> None:
        self._strangers.discard(channel)
        if channel.is_stranger and not any(self._channels.get((channel.peer, name)) for name in self._alpns):
            self._edges.forget(channel.peer)

    def _keep(self, channel: Channel) -> None:
        """Use a new connection. One from another boot of the peer shows that the older ones are dead."""
        for other in [c for name in self._alpns for c in self._channels.get((channel.peer, name), ())]:
            if other.boot != channel.boot:
                other.close(GOODBYE, "you were restarted")
                self.drop(other)
        self._alpns.add(channel.alpn)
        self._channels.setdefault((channel.peer, channel.alpn), []).append(channel)
        if channel.is_stranger:
            self._seat_stranger(channel)

    async def _attend(self, channel: Channel) -> None:
        """Serve what the peer opens, until the connection ends."""
        try:
            while True:
                self._host.spawn(self._serve(channel, await channel.accept()))
        except ConnectionLost as lost:
            log.debug("%s", lost)
        finally:
            self.drop(channel)

    async def _serve(self, channel: Channel, pipe: Pipe) -> None:
        await self._host.serve(channel, pipe)

    def _listening(self, bind: str) -> tuple[str, ...]:
        """A wildcard address becomes the machine's own; a bind to IPv4 also opens a socket that is not told."""
        host = bind.rpartition(":")[0]
        mine = [address for address in self._endpoint.bound_sockets() if address.rpartition(":")[0] == host]
        if host != "0.0.0.0":
            return tuple(mine)
        port = mine[0].rpartition(":")[2]
        found = [a for a in self._endpoint.addr().direct_addresses() if a.rpartition(":")[2] == port]
        return tuple(found) or (f"127.0.0.1:{port}",)


async def _caller(incoming: Any) -> Caller:
    """Where it comes from, as far as the library tells."""
    with contextlib.suppress(iroh.IrohError):
        address = await incoming.remote_addr()
        if address.is_ip():
            host = str(address.addr).rpartition(":")[0].strip("[]")
            return Caller(host, is_proven=await incoming.remote_addr_validated())
    return Caller("")


async def _told(answer: Awaitable[None]) -> None:
    with contextlib.suppress(iroh.IrohError):  # it went by itself
        await answer


def _unbound(bind: str, error: iroh.IrohError) -> Exception:
    message = str(error.message())
    if "in use" in message:
        return PortInUse(bind)
    return TransportUnusable(f"No socket can be opened at {bind}: {why(error)}. Give an address of this machine.")


def _is_unserved(error: iroh.IrohError) -> bool:
    """TLS alert 120: the peer knows no protocol of that name (RFC 7301, section 3.2)."""
    return "error 120" in str(error.message())
