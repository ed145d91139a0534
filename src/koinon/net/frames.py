"""Wire frames: `u32 header length | msgpack header | raw body`, and the checks that come before any allocation.

A header is a `Header` struct; a `Wire` knows the closed set of headers that may arrive in one place. The body is not
part of the encoding: a header that has one says its size in `nbytes`, and whoever reads decides about it first.
QUIC authenticates bytes in flight, so frames carry no checksum; what is stored or relayed is hashed where it is stored.
Knows nothing of sockets: `FrameReader` turns any stream of bytes into headers and bodies, however the bytes are cut.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Annotated, Final, TypeAlias

import msgspec

from koinon.errors import FrameMalformed, FrameTooLarge

Buffer: TypeAlias = bytes | bytearray | memoryview
NBytes: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
"""Size of a body in bytes, as a header field."""

MAX_HEADER: Final = 64 * 1024
MAX_BODY: Final = 1 << 40
_LENGTH: Final = struct.Struct(">I")
_DIMENSION_LIMIT: Final = 1 << 31

ITEMSIZE: Final = {
    "bool": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "int32": 4,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
}
"""Bytes per element of the types that may travel. bfloat16 travels as its 16 bits."""
PLAIN: Final = "plain"
"""The codec of a tensor whose bytes are its elements, little-endian, row-major."""


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, array_like=True):
    """Base of wire headers: tagged with the class name, closed to unknown fields, an array on the wire and no map.

    A header with a body declares `nbytes: NBytes`. A subclass repeats `frozen=True`, for the type checker.
    """


class TensorMeta(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a body holds: one tensor. `nbytes` counts encoded bytes; `shape` and `dtype` describe the decoded tensor."""

    dtype: str
    shape: tuple[int, ...]
    codec: str = PLAIN
    nbytes: NBytes

    def check(self, limit: int) -> None:
        """Refuse a tensor that is not one, or that takes more than `limit` bytes encoded or decoded."""
        itemsize = ITEMSIZE.get(self.dtype)
        if itemsize is None:
            raise FrameMalformed(f"A tensor's dtype {self.dtype[:20]!r} is not one of {', '.join(ITEMSIZE)}.")
        if not 1 <= len(self.shape) <= 4 or not all(0 < d < _DIMENSION_LIMIT for d in self.shape):
            raise FrameMalformed(f"A tensor needs 1 to 4 positive dimensions, not {self.shape[:5]}.")
        decoded = math.prod(self.shape) * itemsize
        if max(decoded, self.nbytes) > limit:
            raise FrameTooLarge(f"A tensor of {max(decoded, self.nbytes)} bytes came where {limit} are allowed.")
        if self.codec == PLAIN and decoded != self.nbytes:
            raise FrameMalformed(f"{self.dtype}{list(self.shape)} takes {decoded} bytes, the frame says {self.nbytes}.")


class Wire:
    """A codec for one closed set of headers.

    Raises TypeError when a type is not tagged, not an array or open to unknown fields, or when two share a tag.
    """

    def __init__(self, *types: type[msgspec.Struct]) -> None:
        for kind in types:
            config = kind.__struct_config__
            if config.tag is None or not config.forbid_unknown_fields or not config.array_like:
                raise TypeError(f"{kind.__name__} is not a wire header: derive it from `Header`.")
        self.types = types
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[msgspec.Struct] = msgspec.msgpack.Decoder(union_of(types))

    def __or__(self, other: Wire) -> Wire:
        """The codec for the headers of both."""
        return Wire(*self.types, *(t for t in other.types if t not in self.types))

    def head(self, header: msgspec.Struct) -> bytes:
        """Length prefix and encoded header."""
        if not isinstance(header, self.types):
            raise TypeError(f"{type(header).__name__} is not one of {', '.join(t.__name__ for t in self.types)}.")
        encoded = self._encoder.encode(header)
        if len(encoded) > MAX_HEADER:
            raise FrameTooLarge(f"A {type(header).__name__} header takes {len(encoded)} bytes, {MAX_HEADER} at most.")
        return _LENGTH.pack(len(encoded)) + encoded

    def encode(self, header: msgspec.Struct, body: Buffer = b"") -> list[Buffer]:
        """The buffers of one frame, in order; the body is passed through without a copy.

        Raises ValueError when the body is not as long as the header says.
        """
        if body_size(header) != len(body):
            raise ValueError(f"{type(header).__name__} says {body_size(header)} bytes, the body has {len(body)}.")
        return [self.head(header), body] if len(body) else [self.head(header)]

    def decode_header(self, encoded: Buffer) -> msgspec.Struct:
        """The header in exactly these bytes, without its length prefix. Raises FrameMalformed, FrameTooLarge."""
        if len(encoded) > MAX_HEADER:
            raise FrameTooLarge(f"A header of {len(encoded)} bytes came, {MAX_HEADER} are allowed.")
        try:
            header = self._decoder.decode(encoded)
        except (msgspec.DecodeError, UnicodeDecodeError, OverflowError, RecursionError) as error:
            raise FrameMalformed(f"A header cannot be read: {error}") from error
        if not 0 <= body_size(header) <= MAX_BODY:
            raise FrameTooLarge(f"A {type(header).__name__} announces {body_size(header)} bytes.")
        return header


def union_of(types: Sequence[type]) -> type:
    """`A | B | ...` of types known only at run time."""
    union = types[0]
    for kind in types[1:]:
        union = union | kind  # type: ignore[assignment]
    return union


def body_size(header: msgspec.Struct) -> int:
    """How many body bytes follow this header."""
    size = getattr(header, "nbytes", 0)
    return size if isinstance(size, int) else 0


def flat(body: object) -> memoryview:
    """Any contiguous buffer as a view of plain bytes: lengths are bytes, never elements. Raises TypeError otherwise."""
    view = memoryview(body)  # type: ignore[arg-type]
    return view if view.format == "B" and view.ndim == 1 and view.c_contiguous else view.cast("B")


class FrameReader:
    """An incremental reader of frames.

    `feed` bytes in; `header(wire)` gives the next header once it is whole; `expect(n)` then says that n body bytes
    follow (the caller has decided that they may), and `body()` gives them once whole. `wanted` is how many bytes are
    missing until there is something to take. Holds at most what was fed plus the one body that was expected.
    """

    def __init__(self) -> None:
        self.limit = MAX_HEADER
        """Longest header that is waited for."""
        self._buffer = bytearray()
        self._body: bytearray | None = None
        self._room = memoryview(b"")

    @property
    def wanted(self) -> int:
        """Bytes missing until the next header or body is whole; 0 when it is. May be low for a header's first bytes."""
        if self._body is not None:
            return len(self._room)
        if len(self._buffer) < _LENGTH.size:
            return _LENGTH.size - len(self._buffer)
        return max(0, _LENGTH.size + self._header_length() - len(self._buffer))

    @property
    def held(self) -> int:
        """Bytes of memory in use."""
        return len(self._buffer) + (len(self._body) if self._body is not None else 0)

    def feed(self, data: Buffer) -> None:
        if self._room:
            view = memoryview(data)
            taken = min(len(view), len(self._room))
            self._room[:taken] = view[:taken]
            self._room = self._room[taken:]
            data = view[taken:]
        self._buffer += data

    def header(self, wire: Wire) -> msgspec.Struct | None:
        """The next header, one of that wire's, or None while it is incomplete. Raises FrameMalformed, FrameTooLarge."""
        if len(self._buffer) < _LENGTH.size:
            return None
        end = _LENGTH.size + self._header_length()
        if len(self._buffer) < end:
            return None
        encoded = bytes(memoryview(self._buffer)[_LENGTH.size : end])
        del self._buffer[:end]
        return wire.decode_header(encoded)

    def expect(self, nbytes: int) -> None:
        """The next `nbytes` bytes are a body. The caller has checked that so many may be kept in memory."""
        self._body = bytearray(nbytes)
        self._room = memoryview(self._body)
        early = bytes(memoryview(self._buffer)[:nbytes])
        del self._buffer[:nbytes]
        self.feed(early)

    def body(self) -> bytearray | None:
        """The body that was expected, or None while it is incomplete."""
        if self._body is None or self._room:
            return None
        body, self._body = self._body, None
        return body

    def _header_length(self) -> int:
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > self.limit:
            raise FrameTooLarge(f"A header of {length} bytes was announced, {self.limit} are allowed.")
        return int(length)
