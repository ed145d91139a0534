"""The in-memory twin of the network: the same contract, encoding, admission and errors, without a socket.

Frames travel as letters through a `Hub` that may delay, lose, duplicate, reorder or spoil them. Nothing is repeated
below the caller, so a lost letter is a passed deadline: harsher than QUIC, which is the point of a twin.
`kill` vanishes without a word, as a process does under SIGKILL; `close` says good-bye.
Knows nothing of what messages mean.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from koinon.errors import FrameMalformed, FrameTooLarge, PeerError, PeerUnreachable, Refused
from koinon.net import desk
from koinon.net.deadlines import CONNECT
from koinon.net.desk import VERBS, Go, Inline
from koinon.net.dials import Dials
from koinon.net.exchange import EAGER, Call, Exchange, Timer
from koinon.net.frames import FrameReader, Wire, body_size
from koinon.net.hub import Faults, Hub, Letter, Part
from koinon.net.identity import NodeKey
from koinon.net.transport import Gate, Hello, Link, NodeAddr, Reply, Service, common_protocol, open_gate
from koinon.units import PeerId, Seconds

__all__ = ["Faults", "Hub", "MemoryTransport"]

log = logging.getLogger("koinon.net")

BODY_WAIT: Final = Seconds(30.0)
"""How long room stays reserved for a body that was asked for."""
_HELLO: Final = Wire(Hello)
_ports = itertools.count(1)


@dataclass(slots=True)
class _Conversation:
    """An exchange this node asked for: words that come back, or the error that ended the connection."""

    peer: PeerId
    words: asyncio.Queue[bytes | PeerError] = field(default_factory=asyncio.Queue)


class MemoryTransport(Exchange):
    """A node on a hub. Implements `Transport`."""

    def __init__(self, hub: Hub, key: NodeKey, *, hello: Hello | None = None, gate: Gate = open_gate) -> None:
        super().__init__(key, hello=hello, gate=gate)
        self._hub = hub
        self._address = ""
        self._connections: dict[tuple[PeerId, str], str] = {}
        self._dials = Dials(self._dial)
        self._asked: dict[int, _Conversation] = {}
        self._bodies: dict[tuple[PeerId, int], asyncio.Future[bytes]] = {}
        self._exchanges = itertools.count()

    async def start(self, services: Sequence[Service]) -> NodeAddr:
        self._register(services)
        self._address = f"memory:{next(_ports)}"
        self._hub.members[self._address] = self
        self._hub.attach(self.me, self._receive)
        return NodeAddr(self.me, (self._address,))

    def learn(self, addr: NodeAddr) -> None:
        if self._addresses.get(addr.peer) != addr:
            super().learn(addr)
            self._dials.moved(addr.peer)

    def links(self) -> Mapping[PeerId, Link]:
        return {peer: self._link(peer) for peer in self._edges.peers()}

    def hang_up(self, peer: PeerId, reason: str) -> None:
        other = next((t for t in self._hub.members.values() if t.me == peer), None)
        self._forget(peer, reason)
        if other is not None and not self._hub.is_cut(self.me, peer):
            other._forget(self.me, reason)

    def kill(self) -> None:
        """Vanish: no peer is told."""
        self._hub.detach(self.me, self._receive)
        self._hub.members.pop(self._address, None)
        self._dials.cancel()
        for task in self._tasks:
            task.cancel()
        for asked in self._asked.values():
            asked.words.put_nowait(PeerUnreachable(asked.peer, {self._address: "this node was closed"}))

    async def close(self) -> None:
        self.kill()
        for peer in {peer for peer, _ in self._connections}:
            self.hang_up(peer, "closed by the peer")
        await asyncio.gather(*self._dials.cancel(), *self._tasks, return_exceptions=True)

    # --- asking

    async def _converse(self, call: Call, timer: Timer) -> Reply:
        connection = await self._connect(call.peer, call.service.alpn)
        timer.connected()
        number = next(self._exchanges)
        asked = self._asked[number] = _Conversation(call.peer)
        try:
            eager = bytes(call.body) if len(call.body) <= EAGER else b""
            self._post(call.peer, connection, call.service.alpn, number, Part.ASK, call.head + eager)
            return await self._await_reply(call, connection, number, asked)
        finally:
            del self._asked[number]

    async def _await_reply(self, call: Call, connection: str, number: int, asked: _Conversation) -> Reply:
        sent = False
        while True:
            word = await asked.words.get()
            if isinstance(word, PeerError):
                raise word
            header, body = _whole(self._replies[call.service.alpn], word, call.service.reply_limit.count)
            if not isinstance(header, Go):
                return Reply(header, body)
            if not sent:
                parcel = VERBS.head(Inline()) + bytes(call.body)
                self._post(call.peer, connection, call.service.alpn, number, Part.BODY, parcel)
                sent = True

    def _suspect(self, peer: PeerId, alpn: str) -> None:
        self._connections.pop((peer, alpn), None)

    async def _connect(self, peer: PeerId, alpn: str) -> str:
        """The name of a standing connection; concurrent callers share one dial."""
        if (standing := self._connections.get((peer, alpn))) is not None:
            return standing
        return await self._dials.join(peer, alpn)

    async def _dial(self, peer: PeerId, alpn: str) -> str:
        addresses = self._addresses.get(peer, NodeAddr(peer, ())).addresses
        if not addresses:
            raise PeerUnreachable(peer, {})
        await asyncio.sleep(self._hub.trip(self.me, peer).value)
        other = next((t for a in addresses if (t := self._hub.members.get(a)) is not None and t.me == peer), None)
        if other is None or self._hub.is_cut(self.me, peer) or self._hub.is_cut(peer, self.me):
            await asyncio.sleep(CONNECT.value)
            raise PeerUnreachable(peer, dict.fromkeys(addresses, f"no answer in {CONNECT}"))
        theirs = other._welcome(self.me, alpn, _HELLO.head(self.hello))
        await asyncio.sleep(self._hub.trip(peer, self.me).value)
        return self._shake(peer, alpn, theirs)

    # --- connections

    def _welcome(self, peer: PeerId, alpn: str, hello: bytes) -> bytes:
        """The other side of a dial. Raises Refused and ProtocolMismatch at the dialler, as a close code would."""
        if self._services.get(alpn) is None or self._services[alpn].handler is None:
            raise Refused(f"{self.me[:10]} does not serve {alpn}")
        self._shake(peer, alpn, hello)
        return _HELLO.head(self.hello)

    def _shake(self, peer: PeerId, alpn: str, hello: bytes) -> str:
        theirs, _ = _whole(_HELLO, hello, 0)
        assert isinstance(theirs, Hello)
        common_protocol(self._hello.protocol, theirs.protocol)
        self.gate(peer, alpn, theirs)
        connection = "/".join(sorted((self.boot, theirs.boot)))
        if any(p == peer and name != connection for (p, _), name in self._connections.items()):
            self._forget(peer, "it was restarted")
        self._connections[peer, alpn] = connection
        self._edges.count(peer, alpn)
        return connection

    def _forget(self, peer: PeerId, reason: str) -> None:
        for key in [key for key in self._connections if key[0] == peer]:
            del self._connections[key]
        for asked in self._asked.values():
            if asked.peer == peer:
                asked.words.put_nowait(PeerUnreachable(peer, {"connection": reason}))

    # --- letters

    def _post(self, peer: PeerId, connection: str, alpn: str, number: int, part: Part, data: bytes) -> None:
        self._edges.count(peer, alpn).sent += len(data)
        self._hub.send(Letter(self.me, peer, connection, alpn, number, part, data))

    def _receive(self, letter: Letter) -> None:
        count = self._edges.count(letter.sender, letter.alpn)
        count.received += len(letter.data)
        count.heard = asyncio.get_running_loop().time()
        if self.boot not in letter.connection.split("/"):
            return  # meant for the process that had this key before
        match letter.part:
            case Part.ASK:
                self._spawn(self._serve(letter))
            case Part.BODY:
                waiting = self._bodies.get((letter.sender, letter.exchange))
                if waiting is not None and not waiting.done():
                    waiting.set_result(letter.data)
            case Part.WORD:
                if (asked := self._asked.get(letter.exchange)) is not None:
                    asked.words.put_nowait(letter.data)

    # --- answering

    async def _serve(self, letter: Letter) -> None:
        service = self._services.get(letter.alpn)
        if service is None:
            self._reply(letter, desk.refusal(f"this node does not serve {letter.alpn}"))
            return
        try:
            header, eager = _parse(service.requests, letter.data)
            receive = self._receiver(letter, body_size(header), eager)
            encoded = await desk.answer(letter.sender, service, self._replies[letter.alpn], header, receive)
        except PeerError as error:
            log.info("dropped a request of %s on %s: %s", letter.sender[:10], letter.alpn, error)
            encoded = desk.refusal(str(error))
        self._reply(letter, encoded)

    def _receiver(self, letter: Letter, nbytes: int, eager: FrameReader) -> Callable[[], Awaitable[bytearray]]:
        async def receive() -> bytearray:
            if nbytes <= EAGER:
                return _take_body(eager, nbytes)
            key = (letter.sender, letter.exchange)
            future = self._bodies.setdefault(key, asyncio.get_running_loop().create_future())
            self._reply(letter, (VERBS.head(Go()), memoryview(b"")))
            try:
                async with asyncio.timeout(BODY_WAIT.value):
                    parcel = await asyncio.shield(future)
            except TimeoutError:
                raise FrameMalformed(f"a body of {nbytes} bytes did not come in {BODY_WAIT}") from None
            finally:
                self._bodies.pop(key, None)
            _, rest = _parse(VERBS, parcel)
            return _take_body(rest, nbytes)

        return receive

    def _reply(self, letter: Letter, encoded: desk.Encoded) -> None:
        head, body = encoded
        data = head + bytes(body)
        self._post(letter.sender, letter.connection, letter.alpn, letter.exchange, Part.WORD, data)

    def _link(self, peer: PeerId) -> Link:
        trips = self._hub.trip(self.me, peer) + self._hub.trip(peer, self.me)
        return Link(
            peer=peer,
            rtt=trips,
            goodput=self._hub.faults.rate,
            sent=self._edges.sent(peer),
            received=self._edges.received(peer),
            last_heard=self._edges.heard(peer),
            connections=sum(1 for p, _ in self._connections if p == peer),
        )


def _parse(wire: Wire, data: bytes) -> tuple[msgspec.Struct, FrameReader]:
    """The header of a letter, and the reader that holds the rest. Raises FrameError."""
    reader = FrameReader()
    reader.feed(data)
    header = reader.header(wire)
    if header is None:
        raise FrameMalformed(f"a frame of {len(data)} bytes ends inside its header")
    return header, reader


def _take_body(reader: FrameReader, nbytes: int) -> bytearray:
    reader.expect(nbytes)
    body = reader.body()
    if body is None:
        raise FrameMalformed(f"a body of {nbytes} bytes was cut short")
    return body


def _whole(wire: Wire, data: bytes, limit: int) -> tuple[msgspec.Struct, bytearray]:
    header, reader = _parse(wire, data)
    if body_size(header) > limit:
        raise FrameTooLarge(f"{type(header).__name__} brings {body_size(header)} bytes, {limit} are allowed here.")
    return header, _take_body(reader, body_size(header))
