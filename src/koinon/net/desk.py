"""The desk: where a request that came in meets the service that answers it, whichever carrier brought it.

One place decides about admission, about what a handler's errors become, and about what the caller may learn of them.
Knows nothing of streams or deadlines; the carrier brings the body when the desk asks for it.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Annotated, Final, TypeAlias

import msgspec

from koinon.errors import FrameTooLarge, KoinonError, Refused
from koinon.net.frames import Header, Wire, body_size, flat
from koinon.net.transport import ACCEPTED, Accepted, Answer, Busy, Drop, Service, Verdict
from koinon.units import PeerId

log = logging.getLogger("koinon.net")
_REASON_LIMIT: Final = 2000


class Refusal(Header, frozen=True, tag="refusal"):
    """The request was refused, for this reason. `last`: where one frame ends is lost, so the stream ends here."""

    reason: str
    last: bool = False


class Go(Header, frozen=True, tag="go"):
    """Room is reserved: send the body."""


class Arrived(Header, frozen=True, tag="arrived"):
    """A large body is here, whole. Says to the sender how fast the link is, apart from what the handler does."""


class Inline(Header, frozen=True, tag="inline"):
    """The large body follows on this stream."""


class Striped(Header, frozen=True, tag="striped"):
    """The large body comes over the lanes, in pieces of that size but the last, marked with this token."""

    token: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    piece: Annotated[int, msgspec.Meta(ge=16 * 1024, le=1024 * 1024)]


VERBS: Final = Wire(Accepted, Busy, Drop, Refusal, Go, Arrived, Inline, Striped)
"""What transports say to each other, besides what services say."""

Encoded: TypeAlias = tuple[bytes, memoryview]
"""Head (length prefix and header) and body of a reply that is ready to be sent."""


def refusal(reason: str, *, last: bool = False) -> Encoded:
    return VERBS.head(Refusal(reason[:_REASON_LIMIT], last)), memoryview(b"")


async def answer(
    peer: PeerId,
    service: Service,
    wire: Wire,
    header: msgspec.Struct,
    receive: Callable[[], Awaitable[bytearray]],
) -> Encoded:
    """What to reply. `receive` brings the body, and is not called when the body is not wanted.

    `wire` encodes the service's replies and the verbs. Raises only what `receive` raises.
    """
    try:
        verdict = admit(peer, service, header)
    except Exception as error:
        return _refused(peer, service, header, error)
    if verdict is not None:
        return wire.head(verdict), memoryview(b"")
    try:
        body = await receive()
    except BaseException:
        service.abandoned(peer, header)
        raise
    try:
        assert service.handler is not None
        return _encode(wire, await service.handler(peer, header, body))
    except Exception as error:
        return _refused(peer, service, header, error)


def admit(peer: PeerId, service: Service, header: msgspec.Struct) -> Verdict | None:
    """None: the body may come. Raises Refused, FrameTooLarge, and whatever the service's admission raises."""
    if service.handler is None:
        raise Refused(f"this node does not serve {service.alpn}")
    allowed = service.body_limit(peer, header)
    if not isinstance(allowed, int):
        return allowed
    if body_size(header) > allowed:
        service.abandoned(peer, header)
        raise FrameTooLarge(f"{type(header).__name__} offers {body_size(header)} bytes, {allowed} are allowed here.")
    return None


def _encode(wire: Wire, given: Answer) -> Encoded:
    header, body = given if isinstance(given, tuple) else (given, b"")
    header = ACCEPTED if header is None else header
    head, view = wire.head(header), flat(body)
    if body_size(header) != len(view):
        raise ValueError(f"{type(header).__name__} says {body_size(header)} bytes, the body has {len(view)}.")
    return head, view


def _refused(peer: PeerId, service: Service, header: msgspec.Struct, error: Exception) -> Encoded:
    """A refusal on purpose is passed on. A defect is told in this node's log; the caller learns only that it is one."""
    if isinstance(error, KoinonError):
        return refusal(str(error))
    what = f"{type(header).__name__} on {service.alpn}"
    log.error("%s from %s failed here: %r", what, peer[:10], error, exc_info=error)
    return refusal(f"{what} failed on the other side; its log has the cause")
