"""J(θ): its values, its gradient by finite differences, saturated outputs, masks, and splits that change nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from koinon.cost import cost, logistic_sum, penalty_gradient, softmax_sum, squares


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_logistic_cost_is_the_sum_in_its_definition() -> None:
    z, y = normal(5, 3), (normal(5, 3, seed=1) > 0).double()
    h = torch.sigmoid(z)
    expected = -(y * h.log() + (1 - y) * (1 - h).log()).sum()
    assert float(logistic_sum(z, y)) == pytest.approx(float(expected), rel=1e-12)


def test_softmax_cost_is_the_sum_in_its_definition() -> None:
    z, y = normal(6, 4), torch.tensor([0, 3, 2, 1, 0, 2])
    expected = -torch.softmax(z, -1).log()[torch.arange(6), y].sum()
    assert float(softmax_sum(z, y)) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("size", [20.5, 90.0, 1e4, 1e30])
def test_saturated_outputs_stay_finite_and_exact(size: float) -> None:
    z = torch.tensor([[size], [-size]], requires_grad=True)
    wrong = logistic_sum(z, torch.tensor([[0.0], [1.0]]))
    wrong.backward()
    assert float(wrong.detach()) == pytest.approx(2 * size, rel=1e-6)
    assert z.grad is not None
    assert z.grad.flatten().tolist() == pytest.approx([1.0, -1.0])
    assert float(logistic_sum(z.detach(), torch.tensor([[1.0], [0.0]]))) == pytest.approx(0, abs=1e-8)
    two = torch.tensor([[size, -size]])
    assert float(softmax_sum(two, torch.tensor([1]))) == pytest.approx(2 * size, rel=1e-6)
    assert float(softmax_sum(two, torch.tensor([0]))) == 0


def test_half_precision_logits_are_summed_in_fp32() -> None:
    logits, targets = normal(4, 8).bfloat16(), torch.tensor([1, 2, 3, 4])
    assert softmax_sum(logits, targets).dtype == torch.float32
    assert logistic_sum(logits, (normal(4, 8) > 0).bfloat16()).dtype == torch.float32


def test_output_error_is_h_minus_y_over_m_in_both_forms() -> None:
    m = 7
    z = normal(m, 4).requires_grad_()
    y = torch.nn.functional.one_hot(torch.arange(m) % 4, 4).double()
    (grad,) = torch.autograd.grad(logistic_sum(z, y) / m, z)
    torch.testing.assert_close(grad, (torch.sigmoid(z) - y) / m)
    (grad,) = torch.autograd.grad(softmax_sum(z, torch.arange(m) % 4) / m, z)
    torch.testing.assert_close(grad, (torch.softmax(z, -1) - y) / m)


@pytest.mark.parametrize("form", ["logistic", "softmax"])
@pytest.mark.parametrize("penalty", [0.0, 0.7])
def test_gradient_of_a_two_layer_network_agrees_with_central_differences(form: str, penalty: float) -> None:
    m, weights = 9, [normal(5, 6, seed=1), normal(4, 5, seed=2)]
    x, y = normal(m, 6), torch.arange(m) % 4

    def j(weights: list[Tensor]) -> Tensor:
        z = torch.tanh(x @ weights[0].T) @ weights[1].T
        one_hot = torch.nn.functional.one_hot(y, 4).double()
        data = logistic_sum(z, one_hot) if form == "logistic" else softmax_sum(z, y)
        return data / m + penalty / (2 * m) * sum(w.square().sum() for w in weights)

    live = [w.clone().requires_grad_() for w in weights]
    gradients = torch.autograd.grad(j(live), live)
    numeric = [torch.zeros_like(w) for w in weights]
    for weight, slot in zip(weights, numeric, strict=True):
        for at in range(weight.numel()):
            flat = weight.view(-1)
            kept, step = float(flat[at]), 1e-4
            flat[at] = kept + step
            high = j(weights)
            flat[at] = kept - step
            slot.view(-1)[at] = (high - j(weights)) / (2 * step)
            flat[at] = kept
    for found, expected in zip(numeric, gradients, strict=True):
        assert float((found - expected).norm() / (found.norm() + expected.norm())) < 1e-8


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(0, 2**16))
def test_any_split_into_microbatches_has_the_same_cost_and_gradient(lengths: list[int], seed: int) -> None:
    n = sum(lengths)
    logits, targets = normal(n, 5, seed=seed), torch.arange(n) % 5
    mask = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.7
    mask[0] = True
    m = int(mask.sum())
    whole = logits.clone().requires_grad_()
    (softmax_sum(whole, targets, mask) / m).backward()
    parts = logits.clone().requires_grad_()
    total = 0.0
    for piece in torch.arange(n).split(lengths):
        loss = softmax_sum(parts[piece], targets[piece], mask[piece]) / m
        loss.backward()
        total += float(loss.detach())
    assert whole.grad is not None
    assert parts.grad is not None
    assert total == pytest.approx(float(softmax_sum(logits, targets, mask)) / m)
    torch.testing.assert_close(parts.grad, whole.grad)
    assert not whole.grad[~mask].any()


def test_masked_examples_count_neither_in_the_sum_nor_in_the_gradient() -> None:
    z, y = normal(4, 3), (normal(4, 3, seed=1) > 0).double()
    mask = torch.tensor([True, False, True, False])
    assert float(logistic_sum(z, y, mask)) == pytest.approx(float(logistic_sum(z[mask], y[mask])))


def test_j_and_its_penalty_come_from_parts_that_stages_report() -> None:
    weights = [normal(3, 4), normal(2, 2)]
    total = squares(weights)
    assert total == pytest.approx(math.fsum(float(x) ** 2 for w in weights for x in w.flatten()))
    assert cost(10.0, 5, 0.3, total) == pytest.approx(2 + 0.3 / 10 * total)
    torch.testing.assert_close(penalty_gradient(weights[0], 0.3, 5), weights[0] * 0.06)
