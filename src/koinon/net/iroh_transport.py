"""The transport over iroh: QUIC connections whose address is an Ed25519 key, so each is authenticated by being there.

A connection per peer and ALPN, found by whoever dials first and used from both sides; a pool of streams on each, one
exchange at a time per stream; large bodies striped over lanes of their own. Importing this starts nothing: threads
begin with `start`, so a process may fork between the two. Knows nothing of what messages mean.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

import msgspec

from koinon.errors import FrameError, FrameTooLarge, PeerError
from koinon.net import desk
from koinon.net.desk import VERBS, Go, Refusal
from koinon.net.exchange import EAGER, Call, Exchange, Timer
from koinon.net.frames import Wire, body_size
from koinon.net.identity import NodeKey
from koinon.net.iroh_bodies import Bodies
from koinon.net.iroh_channel import HUNG_UP, Channel
from koinon.net.iroh_connections import Connections, Host
from koinon.net.iroh_pipe import ConnectionLost, Pipe
from koinon.net.lanes import LANE, WIRE, Piece
from koinon.net.transport import Gate, Hello, Link, NodeAddr, Reply, Service, everybody, open_gate
from koinon.net.turnstile import Turnstile
from koinon.units import PeerId, Seconds

log = logging.getLogger("koinon.net")


class IrohTransport(Exchange):
    """A node on the network. Implements `Transport`.

    `bind` is an IPv4 "host:port", port 0 for any. `advertise` replaces the addresses that `start` returns, for a node
    behind a forwarded port.
    """

    def __init__(
        self,
        key: NodeKey,
        *,
        bind: str = "0.0.0.0:0",
        advertise: Sequence[str] = (),
        hello: Hello | None = None,
        gate: Gate = open_gate,
        knows: Callable[[PeerId], bool] = everybody,
    ) -> None:
        """knows: whether a peer is no stranger. What strangers may keep busy is bounded, and they let others pass."""
        super().__init__(key, hello=hello, gate=gate)
        self._bind, self._advertise = bind, tuple(advertise)
        host = Host(lambda: self.hello, gate, self._addresses_of, self._serve, self._spawn, knows, self._is_friend)
        self._turnstile = Turnstile()
        self._connections = Connections(host, self._edges)
        self._bodies = Bodies(self._connections)

    async def start(self, services: Sequence[Service]) -> NodeAddr:
        """See `Transport.start`."""
        self._register(services)
        served = [service.alpn for service in services if service.handler is not None]
        listening = await self._connections.listen(self.key.raw, self._bind, [*served, LANE])
        return NodeAddr(self.me, self._advertise or listening)

    async def close(self) -> None:
        """See `Transport.close`."""
        ending = [*self._tasks, *self._bodies.cancel()]
        for task in ending:
            task.cancel()
        await self._connections.close()
        await asyncio.gather(*ending, return_exceptions=True)

    def learn(self, addr: NodeAddr) -> None:
        """See `Transport.learn`."""
        if self._addresses_of(addr.peer) != addr.addresses:
            super().learn(addr)
            self._connections.moved(addr.peer)

    def hang_up(self, peer: PeerId, reason: str) -> None:
        """See `Transport.hang_up`."""
        for channel in self._connections.all():
            if channel.peer == peer:
                channel.close(HUNG_UP, reason)

    def links(self) -> Mapping[PeerId, Link]:
        """See `Transport.links`."""
        return {peer: self._link(peer) for peer in self._edges.peers()}

    # --- asking

    async def _converse(self, call: Call, timer: Timer) -> Reply:
        """A connection that turns out to be gone before the request left is replaced once, unseen by the caller."""
        channel = await self._connections.connect(call.peer, call.service.alpn)
        timer.connected()
        try:
            return await self._converse_on(channel, call, timer)
        except ConnectionLost as lost:
            self._connections.drop(channel)
            if lost.sent:
                raise
        channel = await self._connections.connect(call.peer, call.service.alpn)
        return await self._converse_on(channel, call, timer)

    async def _converse_on(self, channel: Channel, call: Call, timer: Timer) -> Reply:
        pipe = await channel.take()
        try:
            reply = await self._speak(pipe, call, timer)
        except BaseException:
            await channel.discard(pipe)
            raise
        if isinstance(reply.header, Refusal) and reply.header.last:
            await channel.discard(pipe)
        else:
            channel.give(pipe)
        return reply

    async def _speak(self, pipe: Pipe, call: Call, timer: Timer) -> Reply:
        wire, service = self._replies[call.service.alpn], call.service
        try:
            await pipe.write(call.head, call.body if len(call.body) <= EAGER else b"")
        except ConnectionLost as lost:
            lost.sent = False  # at most a part of a frame left, and nobody acts on a part
            raise
        header = await pipe.header(wire)
        if isinstance(header, Go):
            await self._bodies.send(call.peer, pipe, call.body)
            header = await pipe.header(wire)
        if header is None:
            raise ConnectionLost(call.peer, {service.alpn: "the peer ended the stream without a reply"})
        nbytes = body_size(header)
        if nbytes > service.reply_limit.count:
            raise FrameTooLarge(f"{type(header).__name__} brings {nbytes} bytes, {service.reply_limit} are allowed.")
        if nbytes > EAGER:
            timer.announced(nbytes)
        return Reply(header, await self._bodies.take(call.peer, pipe, nbytes))

    def _suspect(self, peer: PeerId, alpn: str) -> None:
        for channel in self._connections.standing(peer, alpn):
            self._connections.drop(channel)

    # --- answering

    async def _serve(self, channel: Channel, pipe: Pipe) -> None:
        """Frames on one pipe, one after the other, until the peer ends it."""
        try:
            if channel.alpn == LANE:
                await self._serve_lane(channel.peer, pipe)
            else:
                await self._serve_requests(channel, pipe)
        except ConnectionLost:
            pass  # the caller gave up, or the connection ended: whoever attends to it knows
        except PeerError as error:
            log.info("dropped a stream of %s on %s: %s", channel.peer[:10], channel.alpn, error)
            await pipe.abandon()

    async def _serve_requests(self, channel: Channel, pipe: Pipe) -> None:
        service, wire = self._services[channel.alpn], self._replies[channel.alpn]
        try:
            if channel.is_stranger:
                await self._turnstile.enter(channel.peer)
            while (header := await pipe.header(service.requests)) is not None:
                await self._answer(channel.peer, pipe, service, wire, header)
                if channel.is_stranger:
                    await self._turnstile.enter(channel.peer)
            await pipe.finish()
        except FrameError as error:
            log.info("turned away a stream of %s on %s: %s", channel.peer[:10], channel.alpn, error)
            await pipe.write(*desk.refusal(str(error), last=True))
            await pipe.turn_away()

    async def _answer(self, peer: PeerId, pipe: Pipe, service: Service, wire: Wire, header: msgspec.Struct) -> None:
        nbytes = body_size(header)
        early = (await pipe.body(nbytes) if nbytes else bytearray()) if nbytes <= EAGER else None

        async def receive() -> bytearray:
            if early is not None:
                return early
            await pipe.write(VERBS.head(Go()))
            return await self._bodies.take(peer, pipe, nbytes)

        head, body = await desk.answer(peer, service, wire, header, receive)
        if len(body) <= EAGER:
            await pipe.write(head, body)
        else:
            await pipe.write(head)
            await self._bodies.send(peer, pipe, body)

    async def _serve_lane(self, peer: PeerId, pipe: Pipe) -> None:
        while (piece := await pipe.header(WIRE)) is not None:
            assert isinstance(piece, Piece)
            await self._bodies.take_piece(peer, piece, pipe)

    def _is_friend(self, host: str) -> bool:
        return any(
            address.rpartition(":")[0].strip("[]") == host
            for addr in self._addresses.values()
            for address in addr.addresses
        )

    # --- measuring

    def _addresses_of(self, peer: PeerId) -> tuple[str, ...]:
        return self._addresses[peer].addresses if peer in self._addresses else ()

    def _link(self, peer: PeerId) -> Link:
        channels = [channel for channel in self._connections.all() if channel.peer == peer]
        stats = [channel.connection.stats() for channel in channels]
        rtts = [rtt for channel in channels if (rtt := channel.connection.rtt()) is not None]
        paths = [path for channel in channels for path in channel.connection.paths() if path.is_selected]
        return Link(
            peer=peer,
            rtt=Seconds.ms(min(rtts)) if rtts else None,
            goodput=self._bodies.stripes[peer].goodput,
            sent=self._edges.sent(peer),
            received=self._edges.received(peer),
            last_heard=self._edges.heard(peer),
            connections=sum(1 for channel in channels if channel.alpn != LANE),
            lanes=sum(1 for channel in channels if channel.alpn == LANE),
            udp_sent=sum(s.udp_tx_bytes for s in stats),
            udp_received=sum(s.udp_rx_bytes for s in stats),
            lost_packets=sum(s.lost_packets for s in stats),
            relayed=any(path.is_relay for path in paths),
        )
