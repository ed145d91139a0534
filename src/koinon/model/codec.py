"""Wire codecs: coefficients and their gradients to bytes and back. Knows neither the model nor the network.

Layout of n tokens x k numbers, little-endian: fp32 and bf16 are the plain rows. int8 and int4 are n bf16 scales, then n
rows of k signed integers (int4: two per byte, the even index in the low half). Row i is scale_i * q_i.

The scale is max|c| / (2^(bits-1) - 1), kept in bf16 *rounded up*: bf16 because gradients are divided by the step's
tokens and a scale below 3e-8 is zero in fp16; up so that nothing is ever clipped. Error: half a scale per value, a
whole one with stochastic rounding.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from koinon.errors import FrameMalformed, NonFiniteLoss
from koinon.model.config import Codec, row_bytes

_NOT_FINITE = "A coefficient or gradient is NaN or infinite: nothing of it may cross a boundary."
Floats = npt.NDArray[np.float32]

LARGEST = {"int8": 127, "int4": 7}
_SMALLEST_SCALE = 2.0**-126  # the smallest normal number: a row of zeros divides by it and stays zero
_LARGEST_VALUE = 3.3e38  # short of fp32's end by more than the scale's rounding


def nbytes(codec: Codec, n: int, k: int) -> int:
    """Bytes that `encode` makes of n tokens x k numbers."""
    return n * row_bytes(codec, k)


def encode(c: Tensor, codec: Codec, *, dither: torch.Generator | None = None) -> bytes:
    """c (n, k) fp32 -> `nbytes(codec, n, k)` bytes. Raises NonFiniteLoss if a value is NaN or infinite.

    dither: with a generator, integers are rounded up or down at random so that the mean is exact (for gradients); seed
    it from the work item, so that repeating the item repeats its bytes. fp32 and bf16 ignore it.
    """
    values = c.detach().to(device="cpu", dtype=torch.float32).contiguous()
    match codec:
        case "fp32":
            rows = values.numpy()
            _assert_finite(rows)
            return rows.tobytes()
        case "bf16":
            rounded = values.to(torch.bfloat16)
            _assert_finite(rounded.float().numpy())
            return rounded.view(torch.int16).numpy().tobytes()
        case "int8" | "int4":
            scale_bits, q = _quantised(values.numpy(), LARGEST[codec], dither)
            return scale_bits.tobytes() + (q if codec == "int8" else _packed(q)).tobytes()


def decode(data: bytes | bytearray | memoryview, codec: Codec, n: int, k: int) -> Tensor:
    """The (n, k) fp32 tensor of those bytes. Raises FrameMalformed on a wrong length or a value that is no number."""
    if len(data) != nbytes(codec, n, k):
        raise FrameMalformed(
            f"{n} rows of {k} numbers in {codec} take {nbytes(codec, n, k)} bytes; these are {len(data)}."
        )
    match codec:
        case "fp32":
            rows = np.frombuffer(data, "<f4").reshape(n, k).copy()
        case "bf16":
            rows = _from_bf16(np.frombuffer(data, "<u2")).reshape(n, k)
        case "int8" | "int4":
            scales = _from_bf16(np.frombuffer(data, "<u2", n))
            if not ((scales >= 0) & (scales <= 1.01 * _LARGEST_VALUE / LARGEST[codec])).all():
                raise FrameMalformed("A row's scale is negative, too large or not a number.")
            body = np.frombuffer(data, np.int8, offset=2 * n).reshape(n, row_bytes(codec, k) - 2)
            return torch.from_numpy((body if codec == "int8" else _unpacked(body, k)) * scales[:, None])
    if not np.isfinite(rows).all():
        raise FrameMalformed("A coefficient is NaN or infinite.")
    return torch.from_numpy(rows)


def passed(c: Tensor, codec: Codec, *, dither: torch.Generator | None = None) -> Tensor:
    """What the other side decodes: decode(encode(c)) number for number, without making bytes. Unchecked."""
    match codec:
        case "fp32":
            return c.detach()
        case "bf16":
            return c.detach().to(torch.bfloat16).to(c.dtype)
        case "int8" | "int4":
            largest = LARGEST[codec]
            rows = c.detach().float()
            scale = _rounded_up(rows.abs().amax(-1, keepdim=True) / largest)
            q = rows / scale
            q = q.round_() if dither is None else q.add_(_noise(q, dither)).floor_()
            return q.clamp_(-largest, largest).mul_(scale).to(c.dtype)


def _quantised(
    rows: Floats, largest: int, dither: torch.Generator | None
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int8]]:
    top = np.abs(rows).max(-1, initial=0)
    if not (top <= _LARGEST_VALUE).all():
        raise NonFiniteLoss(_NOT_FINITE)
    scales = _rounded_up(torch.from_numpy(top / np.float32(largest))).numpy()
    q = rows / scales[:, None]
    q = np.rint(q, out=q) if dither is None else np.floor(q + _noise(torch.from_numpy(q), dither).numpy())
    bits = (scales.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return bits, np.clip(q, -largest, largest, out=q).astype(np.int8)


def _rounded_up(scale: Tensor) -> Tensor:
    """The least bf16 number at or above each non-negative fp32 number, and no subnormal; still fp32."""
    up = (scale.view(torch.int32) + 0xFFFF) & ~0xFFFF
    return up.view(torch.float32).clamp_min_(_SMALLEST_SCALE)


def _noise(like: Tensor, dither: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=dither, device=dither.device).to(like.device)


def _packed(q: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    if q.shape[-1] % 2:
        q = np.pad(q, ((0, 0), (0, 1)))
    nibbles = q.view(np.uint8) & np.uint8(15)
    return nibbles[:, ::2] | nibbles[:, 1::2] << np.uint8(4)


def _unpacked(body: npt.NDArray[np.int8], k: int) -> npt.NDArray[np.int8]:
    q = np.empty((len(body), 2 * body.shape[-1]), np.int8)
    q[:, ::2] = body << np.int8(4) >> np.int8(4)  # shifting back arithmetically restores the sign
    q[:, 1::2] = body >> np.int8(4)
    return q[:, :k]


def _from_bf16(bits: npt.NDArray[np.uint16]) -> Floats:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _assert_finite(rows: Floats) -> None:
    if not np.isfinite(rows).all():
        raise NonFiniteLoss(_NOT_FINITE)
