"""One tensor's update equals torch's optimizers, changes nothing in place, and hardly feels its input's last bit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from koinon.model.layout import TensorSpec
from koinon.optim import muon
from koinon.optim.config import OptimConfig
from koinon.optim.update import clip_scale, cost_gradient, initial_state, square_norm, updated

FLAT = OptimConfig(warmup=0.0, floor=1.0)
"""A constant rate."""
MUON = TensorSpec((12, 7), "muon", penalised=True)
ADAMW = TensorSpec((12, 7), "adamw")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def steps(spec: TensorSpec, config: OptimConfig, count: int = 20, noise: float = 0.0) -> Tensor:
    weight = normal(*spec.shape)
    state = initial_state(spec, weight)
    for step in range(count):
        gradient = normal(*spec.shape, seed=step + 1) * (1 + noise * normal(*spec.shape, seed=1000 + step))
        weight, state = updated(spec, weight, gradient, state, config=config, step=step)
    return weight


def torchs(optimizer: type[torch.optim.Optimizer], count: int = 20, **settings: Any) -> Tensor:
    weight = torch.nn.Parameter(normal(12, 7))
    reference = optimizer([weight], **settings)
    for step in range(count):
        weight.grad = normal(12, 7, seed=step + 1)
        reference.step()
    return weight.detach()


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adamw_is_torchs(decay: float) -> None:
    ours = steps(replace(ADAMW, penalised=True), replace(FLAT, weight_decay=decay))
    theirs = torchs(torch.optim.AdamW, lr=4e-3, betas=(0.9, 0.95), weight_decay=decay)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_muon_is_torchs_but_for_the_iterations_precision(decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = steps(MUON, replace(FLAT, weight_decay=decay))
    settings = {"lr": 1e-2, "weight_decay": decay, "adjust_lr_fn": "match_rms_adamw"}
    rounded = torchs(torch.optim.Muon, **settings)
    assert 1e-4 < float((ours - rounded).norm() / rounded.norm()) < 2e-2
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", lambda g, *_: muon.orthogonalised(g))
    torch.testing.assert_close(ours, torchs(torch.optim.Muon, **settings), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 8), (8, 40), (16, 16), (1, 5), (5, 1)])
def test_orthogonalising_keeps_directions_and_evens_out_sizes(shape: tuple[int, int]) -> None:
    g = normal(*shape)
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    found = u.T @ muon.orthogonalised(g) @ v.T
    sizes = found.diagonal()
    assert (sizes > 0.6).all()
    assert (sizes < 1.3).all()
    assert float((found - torch.diag(sizes)).abs().max()) < 1e-4


def test_fused_matrices_are_orthogonalised_one_by_one() -> None:
    g, parts = normal(16, 6), (8, 4, 4)
    alone = [0.2 * math.sqrt(max(p, 6)) * muon.orthogonalised(m) for p, m in zip(parts, g.split(parts), strict=True)]
    torch.testing.assert_close(muon.direction(g, parts), torch.cat(alone))
    assert not torch.allclose(muon.direction(g, parts), muon.direction(g), atol=1e-2)


def test_a_rotated_basis_rotates_the_update() -> None:
    g, q = normal(64, 16), torch.linalg.qr(normal(16, 16, seed=3))[0]
    ours = muon.orthogonalised(g @ q) - muon.orthogonalised(g) @ q
    rounded = muon.orthogonalised((g @ q).bfloat16()) - muon.orthogonalised(g.bfloat16()) @ q
    assert float(ours.norm()) < 1e-4 < 1e-3 < float(rounded.norm())


@pytest.mark.parametrize("spec", [MUON, ADAMW], ids=["muon", "adamw"])
def test_a_second_on_other_arithmetic_agrees_with_the_owner(spec: TensorSpec) -> None:
    """Gradients summed in another order differ by 1e-7; the check's tolerance is 1e-4, and a small lie is outside."""
    owner, second = steps(spec, FLAT), steps(spec, FLAT, noise=1e-7)
    assert float((owner - second).norm() / owner.norm()) < 1e-5
    lie = steps(spec, FLAT, noise=1e-1)
    assert float((owner - lie).norm() / owner.norm()) > 1e-4


def test_threads_change_no_more_than_the_last_bits() -> None:
    spec = TensorSpec((512, 192), "muon")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(steps(spec, FLAT, count=2))
    finally:
        torch.set_num_threads(before)
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-5


@pytest.mark.parametrize("spec", [MUON, ADAMW], ids=["muon", "adamw"])
def test_nothing_is_changed_in_place(spec: TensorSpec) -> None:
    weight, gradient = normal(12, 7), normal(12, 7, seed=1)
    state = initial_state(spec, weight)
    _, state = updated(spec, weight, gradient, state, config=FLAT, step=0)
    given = [weight, gradient, *state.values()]
    copies = [tensor.clone() for tensor in given]
    new, new_state = updated(spec, weight, gradient, state, config=FLAT, step=1, scale=0.5)
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))
    owned = {tensor.data_ptr() for tensor in given}
    assert not owned & {new.data_ptr(), *(t.data_ptr() for t in new_state.values())}
    assert not new.requires_grad


def test_the_second_moment_is_never_negative() -> None:
    weight = normal(12, 7)
    state = initial_state(ADAMW, weight)
    for step in range(50):
        weight, state = updated(
            ADAMW, weight, normal(12, 7, seed=step) * 10.0 ** -(step % 30), state, config=FLAT, step=step
        )
        assert (state["second"] >= 0).all()


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20), st.floats(1e-3, 1e3))
def test_if_every_stage_clips_the_whole_norm_obeys(norms: list[float], clip: float) -> None:
    clipped = [norm * clip_scale(norm, clip, len(norms)) for norm in norms]
    assert math.hypot(*clipped) <= clip * (1 + 1e-9)
    assert all(a == b for a, b in zip(clipped, norms, strict=True) if b <= clip / math.sqrt(len(norms)))


@pytest.mark.parametrize("replicas", [1, 3])
def test_the_penaltys_gradient_is_added_once_however_many_replicas(replicas: int) -> None:
    weight, whole = normal(12, 7), normal(12, 7, seed=1)
    reduced = sum((whole / replicas for _ in range(replicas)), start=torch.zeros(12, 7))
    config = replace(FLAT, l2=0.4)
    found = cost_gradient(MUON, weight, reduced, config=config, tokens=10)
    torch.testing.assert_close(found, whole + 0.04 * weight)
    assert cost_gradient(ADAMW, weight, whole, config=config, tokens=10) is whole


def test_square_norms_of_large_tensors_are_summed_in_fp64() -> None:
    g = torch.full((1000, 1000), 1e-3)
    assert square_norm(g) == pytest.approx(float(g[0, 0].double() ** 2) * 1e6, rel=1e-10)
