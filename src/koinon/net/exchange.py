"""The asking side of both transports: checks before sending, deadlines, self-delivery, and what replies mean.

A carrier derives from `Exchange` and provides `_converse`: bring one frame there and its reply back.
Knows nothing of streams, sockets or faults.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from koinon.errors import DeadlinePassed, FrameMalformed, Refused
from koinon.net import desk
from koinon.net.deadlines import CONNECT, Deadlines
from koinon.net.desk import VERBS, Refusal
from koinon.net.edges import Edges
from koinon.net.frames import Buffer, FrameReader, Wire, body_size, flat
from koinon.net.identity import NodeKey
from koinon.net.transport import Accepted, Busy, Drop, Gate, Hello, NodeAddr, Reply, Service, Verdict, open_gate
from koinon.units import PeerId, Seconds

EAGER: Final = 64 * 1024
"""Bodies up to this size go with their header: a round trip costs more than the bytes."""
log = logging.getLogger("koinon.net")


@dataclass(frozen=True, slots=True)
class Call:
    """One outgoing exchange, checked and encoded."""

    peer: PeerId
    service: Service
    header: msgspec.Struct
    head: bytes
    body: memoryview

    @property
    def edge(self) -> tuple[PeerId, str, str]:
        """What deadlines are learned for: a kind of request to a peer."""
        return self.peer, self.service.alpn, type(self.header).__name__


class Timer:
    """The deadline of one call. An adaptive one starts anew when the connection stands and when a body is announced."""

    def __init__(self, timeout: asyncio.Timeout, deadlines: Deadlines, call: Call, *, fixed: bool) -> None:
        self._timeout, self._deadlines, self._call, self._fixed = timeout, deadlines, call, fixed

    def connected(self) -> None:
        self._allow(self._deadlines.of(self._call.edge, len(self._call.body)))

    def announced(self, nbytes: int) -> None:
        """A reply's body of that size is under way."""
        self._allow(self._deadlines.of((*self._call.edge, "reply"), nbytes))

    def _allow(self, seconds: Seconds) -> None:
        if not self._fixed:
            self._timeout.reschedule(asyncio.get_running_loop().time() + seconds.value)


class Exchange(ABC):
    """What both transports share."""

    def __init__(self, key: NodeKey, *, hello: Hello | None = None, gate: Gate = open_gate) -> None:
        self.key, self.gate = key, gate
        self.boot = secrets.token_hex(8)
        self.deadlines = Deadlines()
        self.asked: Counter[str] = Counter()
        """Exchanges with other nodes that were begun here, by kind of message. What they cost goes by their number."""
        self._hello = hello or Hello()
        self._edges = Edges()
        self._services: dict[str, Service] = {}
        self._replies: dict[str, Wire] = {}
        self._addresses: dict[PeerId, NodeAddr] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def me(self) -> PeerId:
        return self.key.peer_id

    @property
    def hello(self) -> Hello:
        """What a new connection shows."""
        return msgspec.structs.replace(self._hello, boot=self.boot)

    def introduce(self, hello: Hello) -> None:
        self._hello = hello

    def learn(self, addr: NodeAddr) -> None:
        self._addresses[addr.peer] = addr

    async def request(
        self, peer: PeerId, alpn: str, header: msgspec.Struct, body: Buffer = b"", *, deadline: Seconds | None = None
    ) -> Reply:
        """See `Transport.request`. A verdict that is no acceptance is a refusal here."""
        reply = await self._exchange(self._call(peer, alpn, header, body), deadline)
        match reply.header:
            case Busy(after_ms=after_ms):
                raise Refused(f"{peer[:10]} is busy; ask again in {Seconds.ms(after_ms)}")
            case Drop(reason=reason):
                raise Refused(reason)
            case _:
                return reply

    async def push(
        self, peer: PeerId, alpn: str, header: msgspec.Struct, body: Buffer, *, deadline: Seconds | None = None
    ) -> Verdict:
        """See `Transport.push`."""
        reply = await self._exchange(self._call(peer, alpn, header, body), deadline)
        if isinstance(reply.header, Accepted | Busy | Drop):
            return reply.header
        raise FrameMalformed(f"{peer[:10]} answered a push with {type(reply.header).__name__}, which is no verdict.")

    @abstractmethod
    async def _converse(self, call: Call, timer: Timer) -> Reply:
        """Bring the frame there and the reply back. Raises PeerErrors; is cancelled when the deadline passes."""

    @abstractmethod
    def _suspect(self, peer: PeerId, alpn: str) -> None:
        """Nothing was heard in the time of a whole deadline: dial anew next time, the peer may have been replaced."""

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run in the background, until done or `close`. A defect in it is told in the log."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._observe)

    def _observe(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a background task of the transport failed: %r", error, exc_info=error)

    def _register(self, services: Sequence[Service]) -> None:
        self._services = {service.alpn: service for service in services}
        self._replies = {service.alpn: service.replies | VERBS for service in services}

    def _call(self, peer: PeerId, alpn: str, header: msgspec.Struct, body: Buffer) -> Call:
        service = self._services.get(alpn)
        if service is None:
            raise ValueError(f"{alpn} is not among the services that `start` was given.")
        view = flat(body)
        if body_size(header) != len(view):
            raise ValueError(f"{type(header).__name__} says {body_size(header)} bytes, the body has {len(view)}.")
        return Call(peer, service, header, service.requests.head(header), view)

    async def _exchange(self, call: Call, deadline: Seconds | None) -> Reply:
        clock = asyncio.get_running_loop().time
        started = clock()
        if call.peer != self.me:
            self.asked[type(call.header).__name__] += 1
        wait = deadline or self.deadlines.of(call.edge, len(call.body)) + CONNECT
        try:
            async with asyncio.timeout(wait.value) as timeout:
                timer = Timer(timeout, self.deadlines, call, fixed=deadline is not None)
                reply = await (self._locally(call) if call.peer == self.me else self._converse(call, timer))
        except TimeoutError:
            self._missed(call, started, adaptive=deadline is None)
            waited = Seconds(clock() - started)
            kind = type(call.header).__name__
            raise DeadlinePassed(
                f"{call.peer[:10]} did not answer {kind} on {call.service.alpn} in {waited}."
            ) from None
        if isinstance(reply.header, Refusal):
            raise Refused(reply.header.reason)
        if not isinstance(reply.header, Busy | Drop):
            self.deadlines.observe(call.edge, len(call.body), clock() - started)
            if len(reply.body) > EAGER:
                self.deadlines.observe((*call.edge, "reply"), len(reply.body), clock() - started)
        return reply

    def _missed(self, call: Call, since: float, *, adaptive: bool) -> None:
        if adaptive:
            self.deadlines.missed(call.edge, len(call.body))
        if self._edges.count(call.peer, call.service.alpn).heard <= since:
            self._suspect(call.peer, call.service.alpn)

    async def _locally(self, call: Call) -> Reply:
        """To oneself: the same desk and the same encoding, without a carrier."""

        async def receive() -> bytearray:
            return bytearray(call.body)

        wire = self._replies[call.service.alpn]
        head, body = await desk.answer(self.me, call.service, wire, call.header, receive)
        reader = FrameReader()
        reader.feed(head)
        header = reader.header(wire)
        assert header is not None
        return Reply(header, bytearray(body))
