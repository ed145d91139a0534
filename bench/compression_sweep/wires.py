"""Other ways to make the uncompressed stream smaller, to compare with: each is one function for both directions.

All get what they would get in practice: rounding in the forward and in the backward, derivative one through it. Bytes
are per token, boundary and direction, and count everything that a receiver needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from koinon.model.codec import passed
from koinon.model.config import row_bytes


@dataclass(frozen=True, slots=True)
class TopK:
    """The `kept` largest of each row's d numbers: bf16 values, and positions in one byte (d <= 256)."""

    kept: int

    def bytes_per_token(self, width: int, rows: int) -> float:
        return 3.0 * self.kept

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.detach()
        at = rows.abs().topk(self.kept, -1, sorted=False).indices
        return torch.zeros_like(rows).scatter_(-1, at, passed(rows.gather(-1, at), "bf16"))


@dataclass(frozen=True, slots=True)
class LowRank:
    """The best approximation of a microbatch's (rows, d) matrix by a matrix of rank `rank`: the bf16 basis, anew for
    each microbatch, and each row's coefficients in int8. The idea of PowerSGD (arXiv:1905.13727), with the exact
    basis in place of its estimate."""

    rank: int

    def bytes_per_token(self, width: int, rows: int) -> float:
        return row_bytes("int8", self.rank) + 2 * self.rank * width / rows

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.detach()
        basis = torch.linalg.eigh((rows.T @ rows).double()).eigenvectors[:, -self.rank :].float()
        basis = passed(basis, "bf16")
        return passed(rows @ basis, "int8") @ basis.T


@dataclass(frozen=True, slots=True)
class Int8:
    """Every number in int8, one scale per row."""

    def bytes_per_token(self, width: int, rows: int) -> float:
        return row_bytes("int8", width)

    def __call__(self, x: Tensor) -> Tensor:
        return passed(x, "int8")


Wire = TopK | LowRank | Int8
WIRES: dict[str, Wire] = {"top-2": TopK(2), "top-16": TopK(16), "low rank 4": LowRank(4), "int8": Int8()}
