"""One tensor's optimizer step, as a pure function: the owner of a tensor computes it, its second computes it again.

Nothing is changed in place: the caller keeps the old weight and state until the step is committed. Muon updates block
matrices, AdamW (arXiv:1711.05101) the rest. Knows no stages, only a tensor's spec.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from koinon.cost import penalty_gradient
from koinon.model.layout import TensorSpec
from koinon.optim.config import OptimConfig
from koinon.optim.muon import direction
from koinon.optim.schedule import lr_scale

State = dict[str, Tensor]


def initial_state(spec: TensorSpec, weight: Tensor) -> State:
    """Muon: `momentum`. AdamW: `first`, `second` and the number of updates, `count` (int64)."""
    match spec.group:
        case "muon":
            return {"momentum": torch.zeros_like(weight)}
        case "adamw":
            count = torch.zeros((), dtype=torch.int64)
            return {"first": torch.zeros_like(weight), "second": torch.zeros_like(weight), "count": count}


def cost_gradient(spec: TensorSpec, weight: Tensor, gradient: Tensor, *, config: OptimConfig, tokens: int) -> Tensor:
    """dJ/dΘ from the reduced gradient of J's data term: adds (λ/m)Θ to a penalised tensor. Once per step, not per
    replica or microbatch."""
    if not (config.l2 and spec.penalised):
        return gradient
    return gradient + penalty_gradient(weight, config.l2, tokens)


def square_norm(gradient: Tensor) -> float:
    """Σ g², accumulated in fp64: what owners exchange to learn their stage's norm."""
    return float(torch.linalg.vector_norm(gradient.detach(), dtype=torch.float64).square())


def clip_scale(total_norm: float, clip: float, stages: int) -> float:
    """What to multiply a stage's gradient by so that its norm is at most clip / sqrt(stages).

    If every stage obeys, the whole model's norm is at most `clip`, and no norm has to cross a boundary.
    """
    limit = clip / math.sqrt(stages)
    return min(1.0, limit / total_norm) if total_norm > 0 else 1.0


@torch.no_grad()
def updated(
    spec: TensorSpec,
    weight: Tensor,
    gradient: Tensor,
    state: Mapping[str, Tensor],
    *,
    config: OptimConfig,
    step: int,
    scale: float = 1.0,
) -> tuple[Tensor, State]:
    """(new weight, new state) after `step`, counted from 0. gradient: dJ/dΘ (see `cost_gradient`); scale: `clip_scale`.

    A pure function on one machine: on another the last bits differ, so results are compared within 1e-4 and one side's
    bytes are used by all.
    """
    share = lr_scale(config, step)
    gradient = gradient if scale == 1.0 else gradient * scale
    match spec.group:
        case "muon":
            rate = config.muon_lr * share
            delta, new = _muon(spec, gradient, state, config)
        case "adamw":
            rate = config.adamw_lr * share
            delta, new = _adamw(gradient, state, config)
    shrunk = weight * (1 - rate * config.weight_decay) if spec.penalised and config.weight_decay else weight
    return torch.sub(shrunk, delta, alpha=rate), new


def _muon(spec: TensorSpec, gradient: Tensor, state: Mapping[str, Tensor], config: OptimConfig) -> tuple[Tensor, State]:
    momentum = torch.lerp(state["momentum"], gradient, 1 - config.momentum)
    return direction(torch.lerp(gradient, momentum, config.momentum), spec.parts), {"momentum": momentum}


def _adamw(gradient: Tensor, state: Mapping[str, Tensor], config: OptimConfig) -> tuple[Tensor, State]:
    (one, two), count = config.betas, int(state["count"]) + 1
    first = torch.lerp(state["first"], gradient, 1 - one)
    second = (state["second"] * two).addcmul_(gradient, gradient, value=1 - two)
    root = second.sqrt().div_(math.sqrt(1 - two**count)).add_(config.eps)
    delta = (first / root).div_(1 - one**count)
    return delta, {"first": first, "second": second, "count": torch.tensor(count)}
