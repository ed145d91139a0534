"""Every trained tensor of every form has the gradient that J's definition gives it, across all boundaries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from koinon.cost import penalty_gradient
from koinon.model import layers
from koinon.model.stage import Stage
from tests.model.small import VARIANTS, in_process, stages_of, tokens_of, variant

STEP, PENALTY, PROBES = 1e-5, 0.3, 6
# At 1e-4 the differences of one variant are off by 1e-5, at 1e-5 by 1e-7: the error of a central difference, STEP^2.


def cost_of(stages: list[Stage], ids: Tensor, targets: Tensor) -> float:
    m = targets.numel()
    with torch.no_grad():
        data = in_process(stages, ids, targets) / m
        weights = [w for s in stages for name, w in s.trained().items() if s.penalised(name)]
        return float(data + PENALTY / (2 * m) * sum(w.square().sum() for w in weights))


def pipeline_gradients(stages: list[Stage], ids: Tensor, targets: Tensor) -> None:
    """Stage by stage as machines do it: detach at each boundary, hand the gradient back, add the penalty once."""
    m, c, crossings = targets.numel(), None, []
    for stage in stages[:-1]:
        sent = stage(ids, c)
        c = sent.detach().requires_grad_()
        crossings.append((sent, c))
    (stages[-1].loss_sum(ids, c, targets) / m).backward()
    for sent, received in reversed(crossings):
        sent.backward(received.grad)
    for stage in stages:
        for name, weight in stage.trained().items():
            assert weight.grad is not None, name
            if stage.penalised(name):
                weight.grad += penalty_gradient(weight.detach(), PENALTY, m)


def error_of(weight: Tensor, stages: list[Stage], ids: Tensor, targets: Tensor) -> float:
    """‖numeric - gradient‖ / (‖numeric‖ + ‖gradient‖) at a few entries, those with a gradient first."""
    assert weight.grad is not None
    flat, gradient = weight.data.view(-1), weight.grad.reshape(-1)
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(flat.numel(), generator=generator)
    at = order[gradient[order].abs().argsort(descending=True, stable=True)[: 10 * PROBES]][::10]
    numeric = []
    for index in at:
        kept = flat[index].clone()
        flat[index] = kept + STEP
        high = cost_of(stages, ids, targets)
        flat[index] = kept - STEP
        numeric.append((high - cost_of(stages, ids, targets)) / (2 * STEP))
        flat[index] = kept
    found, expected = torch.tensor(numeric, dtype=torch.float64), gradient[at]
    return float((found - expected).norm() / (found.norm() + expected.norm()))


def worst_error(name: str) -> dict[str, float]:
    config = variant(name)
    stages = [stage.double() for stage in stages_of(config)]
    ids, targets = tokens_of(config)
    pipeline_gradients(stages, ids, targets)
    return {
        f"{stage.index}.{name}": error_of(weight, stages, ids, targets)
        for stage in stages
        for name, weight in stage.trained().items()
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_agree_with_central_differences_in_every_tensor(name: str) -> None:
    errors = worst_error(name)
    assert max(errors.values()) < 2e-7, {k: v for k, v in errors.items() if v >= 2e-7}


def test_a_flipped_sign_in_the_norms_backward_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    backward = layers._RmsNorm.backward

    def flipped(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        x, gain = backward(ctx, *gradients)
        return -x, gain

    monkeypatch.setattr(layers._RmsNorm, "backward", staticmethod(flipped))
    assert max(worst_error("stream").values()) > 1e-2


def test_a_flipped_sign_at_one_boundary_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    enter = Stage._enter

    def flipped(self: Stage, ids: Tensor, c_in: Tensor | None) -> Tensor:
        a = enter(self, ids, c_in)
        return 2 * a.detach() - a if self.index == 1 and a.requires_grad else a

    monkeypatch.setattr(Stage, "_enter", flipped)
    assert worst_error("stream")["0.embedding"] > 1e-2
