"""The transport seam: requests and pushes between peers, whatever carries them.

A peer is dialled by its key. A *request* carries one frame there and one back. A *push* offers a body: the receiver
answers at the header (ACCEPTED, BUSY, DROP) before a large body is sent. Both are at-least-once: after an error or a
passed deadline the handler may have run or not, and it may run twice for one call; only keys make a retry safe.
Every call ends by its deadline. Errors are PeerErrors: PeerUnreachable, DeadlinePassed, Refused, ProtocolMismatch,
FrameError. Knows nothing of sockets; `iroh_transport` and `memory` implement it and pass one contract suite.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Final, Protocol, TypeAlias

import msgspec

from koinon.errors import ProtocolMismatch
from koinon.net.frames import Buffer, Header, Wire
from koinon.net.passes import Pass
from koinon.units import BitsPerSecond, Bytes, PeerId, Seconds

PROTOCOL: Final = (1, 1)
"""Lowest and highest version of the exchange that this build speaks. A change of framing changes the ALPN instead."""


@dataclass(frozen=True, slots=True)
class NodeAddr:
    """A peer and where it may be dialled ("host:port", any may be stale)."""

    peer: PeerId
    addresses: tuple[str, ...]


class Accepted(Header, frozen=True, tag="accepted"):
    """The push is taken. `done`: the receiver had it already, and wants no body."""

    done: bool = False


class Busy(Header, frozen=True, tag="busy"):
    """No room now: ask again after that time, or take another replica."""

    after_ms: Annotated[int, msgspec.Meta(ge=0, le=3_600_000)]


class Drop(Header, frozen=True, tag="drop"):
    """Never here: not my stage, old step, lease revoked. The reason is a sentence."""

    reason: str


Verdict: TypeAlias = Accepted | Busy | Drop
ACCEPTED: Final = Accepted()
DONE: Final = Accepted(done=True)


@dataclass(frozen=True, slots=True)
class Reply:
    """A peer's answer. `body` is the caller's own copy."""

    header: msgspec.Struct
    body: bytearray


Answer: TypeAlias = msgspec.Struct | tuple[msgspec.Struct, Buffer] | None
"""What a handler returns: a reply, a reply and its body, or None, which says ACCEPTED to a push."""
Handler: TypeAlias = Callable[[PeerId, msgspec.Struct, bytearray], Awaitable[Answer]]
Admission: TypeAlias = Callable[[PeerId, msgspec.Struct], int | Verdict]
"""Decides at the header: how many body bytes may come, or a verdict that ends the exchange. May raise Refused."""


def up_to(limit: int) -> Admission:
    """Admit bodies of at most that many bytes."""
    return lambda _peer, _header: limit


def _nothing(_peer: PeerId, _header: msgspec.Struct) -> None:
    """A reservation that needs no release."""


@dataclass(frozen=True, slots=True)
class Service:
    """What a node speaks under one ALPN name.

    `handler` None: this node only asks, it does not serve. `body_limit` reserves room at the header; when the body then
    does not arrive, `abandoned` is called instead of the handler, so that the room can be freed.
    A handler that raises a KoinonError refuses with that sentence; any other exception is logged here with its
    traceback, and the caller gets a refusal without details. `reply_limit` bounds the body of a reply to this node.
    """

    alpn: str
    requests: Wire
    replies: Wire
    handler: Handler | None = None
    body_limit: Admission = field(default=up_to(0))
    abandoned: Callable[[PeerId, msgspec.Struct], None] = _nothing
    reply_limit: Bytes = field(default=Bytes.mib(64))


class Hello(Header, frozen=True, tag="hello"):
    """First frame on each new connection, both ways.

    `boot` is drawn at start-up: another boot under the same key means that the peer was restarted, so its older
    connections are dead, though nothing on the wire says so.
    """

    protocol: tuple[int, int] = PROTOCOL
    build: str = ""
    run: str = ""
    shown: Pass | None = None
    boot: str = ""


Gate: TypeAlias = Callable[[PeerId, str, Hello], None]
"""Asked for each connection: the peer, the ALPN, its hello. Raises Refused to keep it out, before a request is read."""


def open_gate(_peer: PeerId, _alpn: str, _hello: Hello) -> None:
    """Lets everybody in: for tests, private circles and the admission service."""


def everybody(_peer: PeerId) -> bool:
    """No peer is a stranger: for tests and private circles."""
    return True


def common_protocol(mine: tuple[int, int], theirs: tuple[int, int]) -> int:
    """The highest version both speak. Raises ProtocolMismatch with the sentence that the other side should read."""
    highest = min(mine[1], theirs[1])
    if highest < max(mine[0], theirs[0]):
        advice = "upgrade koinon" if theirs[1] < mine[0] else "use an older koinon, or upgrade this node"
        raise ProtocolMismatch(f"refused: you speak protocol {_span(theirs)}, this run needs {_span(mine)}; {advice}")
    return highest


def _span(versions: tuple[int, int]) -> str:
    low, high = versions
    return f"{low}" if low == high else f"{low}-{high}"


@dataclass(frozen=True, slots=True)
class Link:
    """A snapshot of the edge to one peer. Byte counts are payload and headers as handed to the socket, per ALPN.

    `udp_sent` and `udp_received` count what the open connections really moved (encryption, acknowledgements, repeats);
    0 where the transport has no datagrams. `last_heard` is on the event loop's clock.
    """

    peer: PeerId
    rtt: Seconds | None
    goodput: BitsPerSecond | None
    sent: Mapping[str, int]
    received: Mapping[str, int]
    last_heard: float
    connections: int
    lanes: int = 0
    udp_sent: int = 0
    udp_received: int = 0
    lost_packets: int = 0
    relayed: bool = False


class Transport(Protocol):
    """One per process: one event loop, one node key."""

    @property
    def me(self) -> PeerId: ...

    async def start(self, services: Sequence[Service]) -> NodeAddr:
        """Listen, and say where. Raises PortInUse, TransportUnusable."""

    def learn(self, addr: NodeAddr) -> None:
        """Where a peer can be dialled from now on; replaces what was known."""

    def introduce(self, hello: Hello) -> None:
        """What new connections show: call it when a pass was renewed."""

    async def request(
        self, peer: PeerId, alpn: str, header: msgspec.Struct, body: Buffer = b"", *, deadline: Seconds | None = None
    ) -> Reply:
        """One frame there, one back. Deadline None: what the edge has shown to be enough. Raises PeerErrors."""

    async def push(
        self, peer: PeerId, alpn: str, header: msgspec.Struct, body: Buffer, *, deadline: Seconds | None = None
    ) -> Verdict:
        """Offer a body; it is sent if the receiver wants it. Raises PeerErrors; BUSY and DROP are no errors."""

    def links(self) -> Mapping[PeerId, Link]:
        """A snapshot of every edge that was used."""

    def hang_up(self, peer: PeerId, reason: str) -> None:
        """Close every connection to a peer, for instance because its pass was revoked. Its pending calls fail."""

    async def close(self) -> None:
        """Close everything; pending calls fail at once, here and at the peers."""
