"""Training a whole small model: it learns, secrets never move, frames never matter, and the clip is per stage."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from koinon.errors import NonFiniteLoss
from koinon.model.config import ModelConfig
from koinon.model.monolith import Microbatch, Monolith
from koinon.model.snapshot import root
from koinon.model.subspace import orthonormal
from koinon.optim import muon
from koinon.optim.config import OptimConfig
from koinon.optim.whole import WholeOptimizer
from tests.model.small import SMALL, secret, tokens_of, variant

OPTIM = OptimConfig(steps=50)


def model(config: ModelConfig) -> Monolith:
    return Monolith(config, [secret(i) for i in range(config.stages)])


def trained(config: ModelConfig, steps: int, optim: OptimConfig = OPTIM, *, morph: bool = False) -> Monolith:
    whole = model(config)
    optimizer = WholeOptimizer(optim, whole.stages)
    for step in range(steps):
        if morph:
            turn_all(whole, step)
        whole.train_step([Microbatch(*tokens_of(config, 2, seed=2 * step + half)) for half in (0, 1)], optimizer)
    return whole


def turn_all(whole: Monolith, seed: int) -> None:
    k = whole.config.boundary_width
    q = orthonormal(torch.randn(k, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    for before, after in zip(whole.stages, whole.stages[1:], strict=False):
        before.edges, after.edges = before.edges.exited(q), after.edges.entered(q)


def difference(a: Monolith, b: Monolith) -> float:
    pairs = [
        (w, other.trained()[name])
        for one, other in zip(a.stages, b.stages, strict=True)
        for name, w in one.trained().items()
    ]
    return max(float(((x - y).norm() / y.norm().clamp_min(1e-6)).detach()) for x, y in pairs)


@pytest.mark.parametrize("name", ["stream", "writer", "dense", "deep", "trained lifts"])
def test_a_model_learns_a_repeating_text(name: str) -> None:
    config = replace(variant(name), codec="int8" if name != "dense" else "fp32")
    whole, optimizer = model(config), None
    optimizer = WholeOptimizer(replace(OPTIM, steps=60), whole.stages)
    ids = torch.arange(4 * 11).view(4, 11) % 7
    batch = Microbatch(ids[:, :-1], ids[:, 1:])
    losses = [whole.train_step([batch], optimizer) for _ in range(60)]
    assert losses[0] > 2.5
    assert losses[-1] < 0.2
    assert whole.evaluate([batch]) < 0.2


def test_a_hundred_steps_leave_lifts_maps_and_hashes_untouched() -> None:
    config = replace(SMALL, codec="int8")
    before = [root(stage.frozen()) for stage in model(config).stages]
    whole = trained(config, 100, replace(OPTIM, steps=100, weight_decay=0.1))
    assert [root(stage.frozen()) for stage in whole.stages] == before
    assert difference(whole, model(config)) > 0.1


def test_writes_of_the_writer_form_stay_in_the_span_of_its_basis() -> None:
    config = variant("writer")
    whole = trained(config, 50)
    stage, (ids, _) = whole.stages[1], tokens_of(config)
    frozen = stage.frozen()
    basis = frozen["lift.basis"]
    with torch.no_grad():
        side = stage.side(ids)
        a = torch.randn(*ids.shape, 5, generator=torch.Generator().manual_seed(0))
        for block in stage.blocks:
            a = a + block.attention(side + stage.lift(a))
            a = a + block.ffn(side + stage.lift(a))
        added = stage.lift(a)
    outside = added - added @ basis @ basis.T
    assert float(outside.norm() / added.norm()) < 1e-5


def test_frames_that_change_every_step_change_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    assert difference(trained(SMALL, 20, morph=True), trained(SMALL, 20)) < 1e-4
    exact = muon.orthogonalised
    monkeypatch.setattr(muon, "orthogonalised", lambda m: exact(m.bfloat16()))
    assert difference(trained(SMALL, 20, morph=True), trained(SMALL, 20)) > 1e-3, "the test could not see it"


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_a_steps_split_into_microbatches_does_not_matter(parts: int) -> None:
    ids, targets = tokens_of(SMALL, 5)
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    split, joint = model(SMALL), model(SMALL)
    pieces = [Microbatch(*p) for p in zip(*(x.tensor_split(parts) for x in (ids, targets, mask)), strict=True)]
    losses = [
        whole.train_step(batches, WholeOptimizer(replace(OPTIM, l2=0.5), whole.stages))
        for whole, batches in ((split, pieces), (joint, [Microbatch(ids, targets, mask)]))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert difference(split, joint) < 1e-5


def test_each_stage_is_clipped_by_itself() -> None:
    whole = model(SMALL)
    seen: list[list[float]] = []
    optimizer = WholeOptimizer(replace(OPTIM, clip=1e-3), whole.stages)
    ids, targets = tokens_of(SMALL)
    (whole.loss_sum(ids, targets) / ids.numel()).backward()
    gradients: list[dict[str, Tensor]] = [
        {n: w.grad.clone() for n, w in s.trained().items() if w.grad is not None} for s in whole.stages
    ]
    seen.append(optimizer.step(ids.numel()))
    for stage, norm, found, states in zip(whole.stages, seen[0], gradients, optimizer.states, strict=True):
        assert norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in found.values())), rel=1e-5)
        scale = 1e-3 / math.sqrt(3) / norm
        for name, gradient in found.items():
            if stage.group(name) == "muon":
                torch.testing.assert_close(states[name]["momentum"], 0.05 * scale * gradient)
        assert all(weight.grad is None for weight in stage.trained().values())


def test_a_gradient_that_is_no_number_stops_the_step_before_any_weight_changes() -> None:
    whole = model(SMALL)
    optimizer = WholeOptimizer(OPTIM, whole.stages[:1])
    before = root(whole.stages[0].trained())
    ids, targets = tokens_of(SMALL)
    (whole.loss_sum(ids, targets) * torch.nan).backward()
    with pytest.raises(NonFiniteLoss, match="Start a new run with a lower `muon_lr`"):
        optimizer.step(ids.numel())
    assert root(whole.stages[0].trained()) == before
