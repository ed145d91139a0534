"""All stages in one process and one autograd graph: the one machine that a league is compared with.

Boundaries are there all the same: coefficients go through the secret maps and, both ways, through the wire codec, whose
rounding the gradient passes straight through. So the arithmetic is the league's, item by item. Knows no optimizer; one
that has `step(tokens)` is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from koinon.model.codec import passed
from koinon.model.config import ModelConfig
from koinon.model.stage import Stage

Wire = Callable[[Tensor], Tensor]
"""What a boundary does to (n, k) numbers, in one direction."""


class Microbatch(NamedTuple):
    """ids and targets (b, T) int64; mask (b, T) bool, True where a target counts."""

    ids: Tensor
    targets: Tensor
    mask: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Targets that count in m."""
        return self.targets.numel() if self.mask is None else int(self.mask.sum())


class Optimizer(Protocol):
    def step(self, tokens: int) -> object:
        """Update the stages' weights from their accumulated gradients, of a step of that many tokens."""


class _Boundary(torch.autograd.Function):
    """The wire in both directions; its rounding has derivative one."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, forth: Wire, back: Wire) -> Tensor:
        ctx.back = back
        return forth(c)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradients[0]), None, None


class Monolith(nn.Module):
    """The whole model. `secrets`: one per stage, as for `Stage.found`.

    wire: what crosses a boundary becomes; by default the config's codec. `forth` and `back` may be given to compare
    other codecs.
    """

    def __init__(
        self, config: ModelConfig, secrets: Sequence[bytes], *, forth: Wire | None = None, back: Wire | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.stages = [Stage.found(config, index, secret) for index, secret in enumerate(secrets)]
        self._modules_of_stages = nn.ModuleList(self.stages)
        stochastic = config.gradient_rounding == "stochastic"
        dither = torch.Generator().manual_seed(0) if stochastic else None
        self._forth = forth or (lambda c: passed(c, config.codec))
        self._back = back or (lambda g: passed(g, config.codec, dither=dither))

    def logits(self, ids: Tensor) -> Tensor:
        """(b, T, V)."""
        return cast(Tensor, self.stages[-1](ids, self._coefficients(ids)))

    def loss_sum(self, ids: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        """-Σ log h[target] over unmasked tokens: a scalar."""
        return self.stages[-1].loss_sum(ids, self._coefficients(ids), targets, mask)

    def train_step(self, microbatches: Iterable[Microbatch], optimizer: Optimizer) -> float:
        """One step on those microbatches: gradients summed in their order, one update. Returns the mean -log h."""
        microbatches = list(microbatches)
        tokens = sum(microbatch.tokens for microbatch in microbatches)
        total = 0.0
        for ids, targets, mask in microbatches:
            loss = self.loss_sum(ids, targets, mask)
            # Divided before the backward, so what crosses a boundary is as small as it is in the league.
            loss.backward(torch.tensor(1 / tokens, dtype=loss.dtype))  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        optimizer.step(tokens)
        return total / tokens

    @torch.no_grad()
    def evaluate(self, microbatches: Iterable[Microbatch]) -> float:
        """Mean -log h over the unmasked tokens, in nats."""
        total, tokens = 0.0, 0
        for microbatch in microbatches:
            total += float(self.loss_sum(*microbatch))
            tokens += microbatch.tokens
        return total / tokens

    def _coefficients(self, ids: Tensor) -> Tensor | None:
        c: Tensor | None = None
        for stage in self.stages[:-1]:
            sent = stage(ids, c)
            c = cast(Tensor, _Boundary.apply(sent, self._forth, self._back))  # type: ignore[no-untyped-call]
        return c
