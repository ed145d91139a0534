"""J(θ), the cost that training lowers: a sum over examples divided by their number m, and a penalty on the weights.

    logistic  J = -(1/m) Σ_i Σ_k [ y_ik log h_ik + (1 - y_ik) log(1 - h_ik) ] + (λ/2m) Σ Θ²      h = sigmoid(z)
    softmax   J = -(1/m) Σ_i log h_i[y_i]                                     + (λ/2m) Σ Θ²      h = softmax(z)

m is the number of unmasked examples of the *step*. A microbatch contributes its sum; only the sum is divided, so every
split of a step into microbatches has the same gradient. The penalty belongs to the weights and is added once per step.
Θ: matrices, but no gains, biases or embeddings. All of it from logits z, in fp32 or wider, exact for saturated h.
Knows nothing of models; imports torch, so nothing imports it eagerly.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""Target of a masked example inside torch's cross entropy."""


def logistic_sum(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """-Σ [y log h + (1 - y) log(1 - h)] over unmasked examples and their K outputs: a scalar.

    logits, targets (m, K), targets in [0, 1]; mask (m,) bool, True where an example counts.
    With softplus(z) = log(1 + e^z): -log h = softplus(-z) and -log(1 - h) = z + softplus(-z), finite for any finite z.
    """
    z, y = _wide(logits), targets.to(_wide(logits).dtype)
    # logaddexp, not F.softplus: that one gives up at 20 and is then off by 2e-9, which fp64 would see.
    costs = torch.logaddexp(-z, torch.zeros_like(z)) + (1 - y) * z
    if mask is not None:
        costs = costs.masked_fill(~mask.unsqueeze(-1), 0)
    return costs.sum()


def softmax_sum(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """-Σ log h[y] over unmasked examples: a scalar. logits (m, V); targets (m,) int64; mask (m,) bool, True counts."""
    if mask is not None:
        targets = targets.masked_fill(~mask, IGNORED)
    return F.cross_entropy(_wide(logits), targets, ignore_index=IGNORED, reduction="sum")


def squares(weights: Iterable[Tensor]) -> float:
    """Σ Θ², accumulated in fp64: what a stage reports for J's penalty."""
    return sum(float(weight.detach().double().square().sum()) for weight in weights)


def cost(data_sum: float, m: int, penalty: float = 0.0, weight_squares: float = 0.0) -> float:
    """J from a step's parts: `data_sum` over m examples, and λ = `penalty` on `weight_squares` = Σ Θ²."""
    return data_sum / m + penalty / (2 * m) * weight_squares


def penalty_gradient(weight: Tensor, penalty: float, m: int) -> Tensor:
    """(λ/m) Θ: what a penalised weight's gradient gains, once per step."""
    return weight * (penalty / m)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
