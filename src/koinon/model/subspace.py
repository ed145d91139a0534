"""What a stage has of its own around its blocks: a private view of the tokens, and the way to and from the wire.

`Side` is everything that follows from token ids alone and so costs no bytes: a private token table F, hashed n-gram
tables N, a short causal convolution. `Lift` raises k coefficients to full width on a private orthonormal basis U.
`Exit` projects what the stage added back onto k numbers. `Edges` are the secret orthogonal maps in which coefficients
travel. With private F, U and maps, a leaked stage says nothing about how its neighbours would read it.
Source: subspace networks, arXiv:2506.01260; changing edges after arXiv:2605.23464. Knows nothing of blocks or losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from koinon.errors import FrameMalformed
from koinon.model.config import ModelConfig
from koinon.model.layers import rms_norm

HASH_PRIME = 2**31 - 1


def adopt(module: nn.Module, weights: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> None:
    """Register the weights as parameters and the frozen tensors as buffers that no state dict holds."""
    for name, weight in weights.items():
        module.register_parameter(name, nn.Parameter(weight))
    for name, tensor in frozen.items():
        module.register_buffer(name, tensor, persistent=False)


class Side(nn.Module):
    """F[t] + Σ_n Σ_j N_n[hash_j(t, .., t-n+1)], and what a causal depthwise convolution adds to that sum."""

    tokens: Tensor
    salt: Tensor
    taps: Tensor

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> None:
        super().__init__()
        adopt(self, weights, frozen)
        self._has_tokens = "tokens" in weights or "tokens" in frozen
        self._grams = tuple(gram for gram in range(2, config.grams + 1) if f"grams{gram}" in weights)
        self._taps, self._buckets, self._hashes = config.taps, config.table, config.hashes
        self.reach = max(0, *(gram - 1 for gram in (*self._grams, 1))) + max(0, config.taps - 1)
        """How many ids before a position its side depends on."""

    def forward(self, ids: Tensor) -> Tensor | None:
        """ids (b, T) int64 -> (b, T, d), or None if nothing follows from ids. Position 0 is a sequence's first."""
        parts = [F.embedding(ids, self.tokens)] if self._has_tokens else []
        for gram in self._grams:
            rows = torch.stack([self.buckets(ids, gram, hash_) for hash_ in range(self._hashes)], -1)
            parts.append(F.embedding(rows, self.get_parameter(f"grams{gram}")).sum(-2))
        if not parts:
            return None
        side = sum(parts[1:], start=parts[0])
        return side + self._convolved(side) if self._taps else side

    def buckets(self, ids: Tensor, gram: int, hash_: int = 0) -> Tensor:
        """The row of each position's n-gram under one hash of its table. What stands before a sequence counts as id -1,
        so nothing crosses sequence starts. The multipliers are the stage's own: n-grams that share a row here differ in
        other stages."""
        hashed = torch.zeros_like(ids)
        for back in range(gram):
            earlier = F.pad(ids, (back, 0), value=-1)[:, : ids.shape[1]]
            hashed = (hashed + (earlier + 1) * self.salt[hash_, gram - 2, back]) % HASH_PRIME
        return hashed % self._buckets

    def _convolved(self, side: Tensor) -> Tensor:
        padded = F.pad(side, (0, 0, self._taps - 1, 0))
        length = side.shape[1]
        return sum(
            (padded[:, back : back + length] * self.taps[back] for back in range(self._taps)),
            start=torch.zeros_like(side),
        )


class Lift(nn.Module):
    """a U^T: coefficients (.., k) to full width (.., d)."""

    basis: Tensor

    def __init__(self, weights: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> None:
        super().__init__()
        adopt(self, weights, frozen)

    def forward(self, a: Tensor) -> Tensor:
        return F.linear(a, self.basis)


class Exit(nn.Module):
    """What a stage added to its stream, (.., d), onto the boundary's coefficients, (.., k). Trained."""

    projection: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        adopt(self, weights, {})
        self._reading = config.reading

    def forward(self, added: Tensor) -> Tensor:
        plain = F.linear(added, self.projection)
        match self._reading:
            case "linear":
                return plain
            case "gated":  # gates start at 1
                return plain * (2 * torch.sigmoid(F.linear(rms_norm(added), self.gate)))
            case "deep":  # the hidden layer starts at 0
                return plain + F.linear(F.silu(F.linear(rms_norm(added), self.up)), self.down)


@dataclass(frozen=True, slots=True)
class Edges:
    """The secret maps of a stage: A (entry) out of the frame before it, B (exit) into the frame after it.

    k x k, orthogonal, fp64: after 10,000 changes of frame fp32 masters would be off by 1e-5, bf16 ones by 17%. A change
    makes a new value; whoever may still have to redo an older item keeps the older value.
    """

    entry: Tensor | None = None
    exit: Tensor | None = None

    def entered(self, turn: Tensor) -> Edges:
        """After the boundary before this stage turned by Q: A <- Q^T A."""
        assert self.entry is not None, "the first stage has no boundary before it"
        return replace(self, entry=_orthogonal(turn, self.entry).T @ self.entry)

    def exited(self, turn: Tensor) -> Edges:
        """After the boundary behind this stage turned by Q: B <- B Q."""
        assert self.exit is not None, "the last stage has no boundary behind it"
        return replace(self, exit=self.exit @ _orthogonal(turn, self.exit))


def orthonormal(normal: Tensor) -> Tensor:
    """Orthonormal columns from a (rows, columns) fp64 matrix of normal numbers, Haar distributed.

    QR with the signs of R's diagonal made positive, without which the distribution is not uniform (math-ph/0609050).
    """
    q, r = torch.linalg.qr(normal)
    uniform: Tensor = q * torch.diagonal(r).sgn()
    return uniform


def _orthogonal(turn: Tensor, master: Tensor) -> Tensor:
    unit = torch.eye(len(master), dtype=torch.float64)
    fits = turn.dtype == torch.float64 and turn.shape == master.shape
    if not (fits and (turn.T @ turn - unit).abs().max() < 1e-9):  # so written that NaN is refused too
        raise FrameMalformed(f"A change of frame must be an orthogonal {tuple(master.shape)} matrix in fp64.")
    return turn
