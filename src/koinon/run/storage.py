"""How records lie in a file: a magic, then one frame after another.

    frame = u32 length | u32 crc32 | msgpack `Record`          (big-endian; both are of the record's bytes)

The crc tells a damaged disk from a broken history; trust comes from the hash chain and signatures in `record`.
Reads with `pread` and never maps the file: a reader must survive a writer that cuts the end off.
Knows nothing of keys, of order, or of who writes.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass

from koinon.errors import FrameMalformed
from koinon.run.record import Record, decode_record

MAGIC = b"koinlog1"
MAX_EVENT = 4 * 1024**2
"""Bytes of one event; larger ones are refused on writing. It bounds what a damaged length can make a reader do."""
_MAX_RECORD = MAX_EVENT + 1024
_PREFIX = struct.Struct(">II")
_READ_AHEAD = 4096
_ARRAY_OF_FIVE = b"\x95"


@dataclass(frozen=True, slots=True)
class Frame:
    """A whole frame; the next one begins at `end`."""

    record: Record
    end: int


@dataclass(frozen=True, slots=True)
class Fault:
    """No whole frame begins at `offset`."""

    offset: int
    reason: str


def pack_frame(record: Record) -> bytes:
    body = record.encode()
    return _PREFIX.pack(len(body), zlib.crc32(body)) + body


def frame_at(fd: int, offset: int, size: int) -> Frame | Fault | None:
    """The frame that begins at `offset` of a file of `size` bytes; None at its end."""
    if offset == size:
        return None
    start = os.pread(fd, _READ_AHEAD, offset)
    if len(start) < _PREFIX.size:
        return Fault(offset, "the file ends in the middle of a record's length")
    length, crc = _PREFIX.unpack_from(start)
    if not 0 < length <= _MAX_RECORD:
        return Fault(offset, f"a record cannot be {length} bytes long")
    first = offset + _PREFIX.size
    if first + length > size:
        return Fault(offset, "the file ends in the middle of a record")
    body = start[_PREFIX.size : _PREFIX.size + length]
    if len(body) < length:
        body = os.pread(fd, length, first)
    record = _record_of(body, length, crc)
    return Frame(record, first + length) if record else Fault(offset, "the record's bytes do not match their checksum")


def something_whole_after(fd: int, fault: Fault, size: int) -> bool:
    """Whether a whole record begins anywhere behind the fault: then it is damage, not a half-written end.

    A length may be what is damaged, so every place is tried that could begin a record.
    """
    window = os.pread(fd, min(size - fault.offset, 2 * _MAX_RECORD), fault.offset)
    at = window.find(_ARRAY_OF_FIVE, _PREFIX.size + 1)
    while at != -1:
        length, crc = _PREFIX.unpack_from(window, at - _PREFIX.size)
        if 0 < length <= len(window) - at and _record_of(window[at : at + length], length, crc):
            return True
        at = window.find(_ARRAY_OF_FIVE, at + 1)
    return False


def _record_of(body: bytes, length: int, crc: int) -> Record | None:
    if len(body) != length or zlib.crc32(body) != crc:
        return None
    try:
        return decode_record(body)
    except FrameMalformed:
        return None
