"""Sets of work items of one stage and step, as they stand in events: a little-endian bitmap over microbatches.

Knows nothing of who computed them.
"""

from __future__ import annotations

from collections.abc import Iterable


def pack(microbatches: Iterable[int]) -> bytes:
    """Bitmap in which bit i stands for microbatch i. Shortest form: no trailing zero bytes."""
    bits = 0
    for microbatch in microbatches:
        bits |= 1 << microbatch
    return bits.to_bytes((bits.bit_length() + 7) // 8, "little")


def unpack(bitmap: bytes) -> tuple[int, ...]:
    """The microbatches of a bitmap, ascending."""
    bits = int.from_bytes(bitmap, "little")
    return tuple(i for i in range(bits.bit_length()) if bits >> i & 1)
