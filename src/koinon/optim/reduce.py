"""How gradients of one tensor travel to its owner and are summed there. One path, two codecs.

`identity` is exact. `compressed` sends the largest entries and keeps the rest as a residual that the next step adds
again (error feedback, arXiv:1809.07599), for links on which the exact sum would take more than a tenth of a step.
Weights are equal on all replicas in both. Encoding is pure: the residual is the caller's, so an attempt that fails
takes nothing with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from koinon.errors import FrameMalformed, NonFiniteLoss


class ReduceCodec(Protocol):
    def encode(self, gradient: Tensor, residual: Tensor | None) -> tuple[bytes, Tensor | None]:
        """(bytes, residual to keep if this attempt commits). Raises NonFiniteLoss."""

    def decode(self, data: bytes, shape: Sequence[int]) -> Tensor:
        """fp32 of that shape. Raises FrameMalformed."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Plain fp32, little-endian."""

    def encode(self, gradient: Tensor, residual: Tensor | None) -> tuple[bytes, Tensor | None]:
        values = _finite(gradient.detach().float().cpu().contiguous())
        return values.numpy().tobytes(), None

    def decode(self, data: bytes, shape: Sequence[int]) -> Tensor:
        if len(data) != 4 * math.prod(shape):
            raise FrameMalformed(f"A gradient of shape {tuple(shape)} takes {4 * math.prod(shape)} bytes.")
        return _checked(torch.from_numpy(np.frombuffer(data, "<f4").copy())).view(*shape)


@dataclass(frozen=True, slots=True)
class Compressed:
    """The `share` of entries that are largest: ascending int32 positions, then their bf16 values; 6 bytes each."""

    share: float = 0.05

    def encode(self, gradient: Tensor, residual: Tensor | None) -> tuple[bytes, Tensor | None]:
        wanted = _finite(gradient.detach().float().cpu())
        wanted = wanted if residual is None else wanted + residual
        flat = wanted.flatten()
        at = flat.abs().topk(self.kept(flat.numel()), sorted=False).indices.sort().values
        values = flat[at].to(torch.bfloat16)
        left = flat.index_copy(0, at, flat[at] - values.float())
        body = at.to(torch.int32).numpy().tobytes() + values.view(torch.int16).numpy().tobytes()
        return body, left.view_as(wanted)

    def decode(self, data: bytes, shape: Sequence[int]) -> Tensor:
        size = math.prod(shape)
        kept = self.kept(size)
        if len(data) != 6 * kept:
            raise FrameMalformed(
                f"A compressed gradient of {kept} entries takes {6 * kept} bytes; these are {len(data)}."
            )
        at = np.frombuffer(data, "<i4", kept).astype(np.int64)
        if at[0] < 0 or at[-1] >= size or (np.diff(at) <= 0).any():
            raise FrameMalformed("A compressed gradient's positions must ascend within the tensor.")
        values = torch.from_numpy(np.frombuffer(data, "<i2", offset=4 * kept).copy()).view(torch.bfloat16)
        return _checked(torch.zeros(size).index_copy(0, torch.from_numpy(at), values.float())).view(*shape)

    def kept(self, size: int) -> int:
        return max(1, math.ceil(self.share * size))


def summed(parts: Iterable[Tensor]) -> Tensor:
    """The sum in the order given (the members' order in the log), in fp32: the same bits for the same order."""
    total: Tensor | None = None
    for part in parts:
        total = part.clone() if total is None else total.add_(part)
    if total is None:
        raise ValueError("nothing to sum: a step has at least one contribution")
    return total


def _finite(values: Tensor) -> Tensor:
    if not torch.isfinite(values).all():
        raise NonFiniteLoss("A gradient is NaN or infinite: it is not sent.")
    return values


def _checked(values: Tensor) -> Tensor:
    if not torch.isfinite(values).all():
        raise FrameMalformed("A gradient holds NaN or infinity.")
    return values
