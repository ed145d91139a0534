"""One iroh connection: to one peer, under one ALPN, with its hello done, and a pool of pipes.

Either side may open pipes on it, so a node behind a NAT can be asked over the connection that it dialled.
Knows nothing of services, requests or other connections.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any, Final

from iroh import IrohError

from koinon.errors import PeerError, ProtocolMismatch, Refused
from koinon.net.edges import Count
from koinon.net.frames import MAX_HEADER, Wire
from koinon.net.iroh_pipe import ConnectionLost, Pipe
from koinon.net.transport import Gate, Hello, common_protocol
from koinon.units import PeerId

HELLO: Final = Wire(Hello)
HELLO_LIMIT: Final = 4096
"""Bytes of a hello: a pass and a few names."""
STRANGER_PIPES: Final = 8
STRANGER_HEADER: Final = 16 * 1024
"""What a stranger may make this node keep, per connection: so many streams, each with a header of that size."""
MAX_PIPES: Final = 64
"""Streams that a peer may have open on one connection: each may hold a header and a small body in memory. The asking
side stays two below, since the library would let it wait for a stream that is never closed."""
GOODBYE, REFUSED, PROTOCOL, HUNG_UP = 0, 2, 3, 4
"""Close codes. The reason that goes with them is a sentence for the other side's operator. After 2 and 3 no request was
ever read on that connection: its hello was refused."""
LOSSY: Final = 0.0005
"""Share of packets lost from which several connections are faster than one: at 0.1% and 50 ms one carries 6-15 of 80
Mbit/s, eight carry 28-37."""
_FEW_LOST: Final = 5
_CLOSE_ERRORS: Final = {REFUSED: Refused, PROTOCOL: ProtocolMismatch}
_MAX_REASON: Final = 1000
_CLOSED = re.compile(r"closed by peer: (?P<reason>.*) \(code (?P<code>\d+)\)$", re.DOTALL)


class Channel:
    """A standing connection."""

    def __init__(self, connection: Any, peer: PeerId, alpn: str, count: Count) -> None:
        self.peer, self.alpn = peer, alpn
        self.boot = ""
        self.retired = False
        self.is_stranger = False
        """The other side is no member of anything: it may make this node keep little."""
        self._connection, self._count = connection, count
        self._idle: list[Pipe] = []
        self.busy = 0
        """Exchanges under way."""
        self._lossy, self._look_again = False, 0.0
        self._room = asyncio.Semaphore(MAX_PIPES - 2)
        connection.set_max_concurrent_bi_streams(MAX_PIPES)

    @property
    def heard(self) -> float:
        """When the peer was heard last, under this ALPN."""
        return self._count.heard

    # --- hello

    async def introduce(self, mine: Hello, gate: Gate) -> None:
        """The dialler's hello. Raises what the peer refused us for, or what we refuse it for."""
        try:
            pipe = await self._open()
            await pipe.write(HELLO.head(mine))
            theirs = await pipe.header(HELLO)
        except ConnectionLost as error:
            raise self._refusal() or error from None
        self._judge(mine, theirs, gate)
        self._idle.append(pipe)

    async def welcome(self, mine: Hello, gate: Gate) -> Pipe:
        """The other side's hello. The pipe on which it came goes on to carry requests."""
        pipe = await self.accept()
        pipe.bound(HELLO_LIMIT)
        self._judge(mine, await pipe.header(HELLO), gate)
        pipe.bound(self._longest)
        await pipe.write(HELLO.head(mine))
        return pipe

    def distrust(self) -> None:
        """Before anything is read: this is a stranger's."""
        self.is_stranger = True
        self._connection.set_max_concurrent_bi_streams(STRANGER_PIPES)

    def trust(self, pipe: Pipe) -> None:
        """What it showed makes it a member. `pipe`: the one that brought the hello."""
        self.is_stranger = False
        self._connection.set_max_concurrent_bi_streams(MAX_PIPES)
        pipe.bound(self._longest)

    def _judge(self, mine: Hello, theirs: object, gate: Gate) -> None:
        try:
            if not isinstance(theirs, Hello):
                raise Refused("refused: a connection begins with a hello")
            common_protocol(mine.protocol, theirs.protocol)
            gate(self.peer, self.alpn, theirs)
        except PeerError as error:
            self.close(PROTOCOL if isinstance(error, ProtocolMismatch) else REFUSED, str(error))
            raise
        self.boot = theirs.boot

    def _refusal(self) -> PeerError | None:
        """Why the peer closed, if it said so."""
        closed = _CLOSED.search(self._connection.close_reason() or "")
        kind = _CLOSE_ERRORS.get(int(closed["code"])) if closed else None
        return kind(closed["reason"]) if closed and kind else None

    # --- pipes

    async def take(self) -> Pipe:
        """A pipe for one exchange: give it back with `give`, or `discard` it."""
        await self._room.acquire()
        self.busy += 1
        try:
            return self._idle.pop() if self._idle else await self._open()
        except BaseException:
            self._release()
            raise

    def give(self, pipe: Pipe) -> None:
        """The exchange ended well; the pipe can carry another."""
        self._idle.append(pipe)
        self._release()

    async def discard(self, pipe: Pipe) -> None:
        """The exchange did not end well."""
        self._release()
        await pipe.abandon()

    async def accept(self) -> Pipe:
        """The next pipe that the peer opens. Raises ConnectionLost when the connection ends."""
        try:
            return self._pipe(await self._connection.accept_bi())
        except IrohError as error:
            raise self._lost(error) from error

    def is_lossy(self) -> bool:
        """Whether packets to this peer are lost. Looked up at most once a second, since that costs a call."""
        now = asyncio.get_running_loop().time()
        if not self._lossy and now >= self._look_again:
            self._look_again = now + 1.0
            stats = self._connection.stats()
            self._lossy = stats.lost_packets > max(_FEW_LOST, LOSSY * stats.udp_tx_datagrams)
        return self._lossy

    def retire(self) -> None:
        """Use it for nothing new, and close it when the last exchange on it is over."""
        self.retired = True
        if not self.busy:
            self.close(GOODBYE, "not needed any more")

    def close(self, code: int, reason: str) -> None:
        """At once: what is under way on it fails on both sides."""
        self.retired = True
        self._connection.close(code, reason.encode()[:_MAX_REASON])

    @property
    def connection(self) -> Any:
        """For measurements: rtt, paths, packet counts."""
        return self._connection

    async def _open(self) -> Pipe:
        try:
            return self._pipe(await self._connection.open_bi())
        except IrohError as error:
            lost = self._lost(error)
            lost.sent = False
            raise lost from error

    def _pipe(self, stream: Any) -> Pipe:
        pipe = Pipe(stream, self.peer, self._count, self._lost)
        pipe.bound(self._longest)
        return pipe

    @property
    def _longest(self) -> int:
        return STRANGER_HEADER if self.is_stranger else MAX_HEADER

    def _release(self) -> None:
        self._room.release()
        self.busy -= 1
        if self.retired and not self.busy:
            self.close(GOODBYE, "not needed any more")

    def _lost(self, error: IrohError) -> ConnectionLost:
        lost = ConnectionLost(self.peer, {self.alpn: self._connection.close_reason() or _last_line(error)})
        lost.sent = self._refusal() is None
        return lost


def _last_line(error: IrohError) -> str:
    """The library's errors are chains; the last line is the cause."""
    return str(error.message()).strip().splitlines()[-1].strip()


def why(error: IrohError) -> str:
    """A library error in one line. `str` of it is empty."""
    return f"{error.kind().name.lower()}: {_last_line(error)}"
