"""A stage: what it computes does not depend on where the model is cut, framed or batched, and secrets stay put."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from koinon.errors import Contradiction, FrameMalformed, SnapshotCorrupt, TokenOutOfRange
from koinon.model.layout import layout
from koinon.model.monolith import Microbatch, Monolith
from koinon.model.snapshot import root
from koinon.model.stage import Memory, Stage
from koinon.model.subspace import orthonormal
from tests.model.small import (
    SMALL,
    VARIANTS,
    gradients,
    in_process,
    secret,
    stages_of,
    through_bytes,
    tokens_of,
    variant,
)


def turn(k: int, seed: int) -> Tensor:
    return orthonormal(torch.randn(k, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("name", ["stream", "writer", "dense"])
def test_a_pipeline_over_bytes_equals_the_monolith_with_the_same_codec(name: str, codec: str) -> None:
    config = replace(variant(name), codec=codec)
    ids, targets = tokens_of(config, 3)
    monolith = Monolith(config, [secret(i) for i in range(config.stages)])
    (monolith.loss_sum(ids, targets) / ids.numel()).backward()
    stages = stages_of(config, stirred=False)
    loss = through_bytes(stages, ids, targets, ids.numel())
    assert loss == float(monolith.loss_sum(ids, targets).detach())
    ours, theirs = gradients(stages), gradients(monolith.stages)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", VARIANTS)
def test_secret_frames_do_not_change_loss_or_gradients(name: str) -> None:
    config = variant(name)
    ids, targets = tokens_of(config)
    plain, framed = stages_of(config), stages_of(config)
    if config.form != "dense":
        for before, after in pairwise(framed):
            q = turn(config.boundary_width, before.index)
            before.edges, after.edges = before.edges.exited(q), after.edges.entered(q)
    losses = [through_bytes(stages, ids, targets, ids.numel()) for stages in (plain, framed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    ours, theirs = gradients(framed), gradients(plain)
    assert max(relative(ours[key], theirs[key]) for key in ours) < 1e-5


def test_the_codec_loses_what_it_says_and_no_more() -> None:
    ids, targets = tokens_of(SMALL)
    losses = {}
    for codec in ("fp32", "bf16", "int8", "int4"):
        config = replace(SMALL, codec=codec)
        losses[codec] = through_bytes(stages_of(config), ids, targets, ids.numel()) / ids.numel()
    errors = {codec: abs(loss - losses["fp32"]) for codec, loss in losses.items()}
    assert 0 < errors["bf16"] < 1e-2
    assert 0 < errors["int8"] < 2e-2
    assert 0 < errors["int4"] < 3e-1


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_any_split_into_microbatches_gives_the_same_gradient_with_masks(parts: int) -> None:
    ids, targets = tokens_of(SMALL, 7)
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    m = int(mask.sum())
    sizes = {1: [7], 2: [2, 5], 7: [1] * 7}[parts]
    stages, whole = stages_of(SMALL), stages_of(SMALL)
    expected = through_bytes(whole, ids, targets, m, mask)
    pieces = zip(ids.split(sizes), targets.split(sizes), mask.split(sizes), strict=True)
    total = sum(through_bytes(stages, i, t, m, k) for i, t, k in pieces)
    assert total == pytest.approx(expected, rel=1e-6)
    ours, theirs = gradients(stages), gradients(whole)
    assert max(relative(ours[key], theirs[key]) for key in ours) < 1e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_generating_token_by_token_equals_the_whole_sequence(name: str) -> None:
    config = variant(name)
    stages = stages_of(config)
    ids, _ = tokens_of(config)
    with torch.no_grad():
        c: Tensor | None = None
        for stage in stages:
            c = stage(ids, c)
    assert c is not None
    memories, pieces = [Memory() for _ in stages], []
    for piece in ids.split([4, 1, 1, 3, 1], 1):
        c_piece: Tensor | None = None
        for stage, memory in zip(stages, memories, strict=True):
            c_piece = stage.extend(piece, c_piece, memory)
        assert c_piece is not None
        pieces.append(c_piece)
    torch.testing.assert_close(torch.cat(pieces, 1), c, rtol=1e-4, atol=1e-5)


def test_a_token_never_sees_a_later_one() -> None:
    for name in VARIANTS:
        config = variant(name)
        stages = stages_of(config)
        ids, _ = tokens_of(config, 1)
        changed = ids.clone()
        changed[0, 6] = (ids[0, 6] + 1) % config.vocab
        outs = []
        for text in (ids, changed):
            c: Tensor | None = None
            for stage in stages:
                c = stage(text, c)
            assert c is not None
            outs.append(c.detach())
        assert torch.equal(outs[0][:, :6], outs[1][:, :6]), name
        assert not torch.equal(outs[0][:, 6], outs[1][:, 6]), name


def test_sequences_of_a_batch_do_not_see_each_other() -> None:
    config = variant("trigrams and taps")
    stages = stages_of(config)
    ids, targets = tokens_of(config, 3)
    with torch.no_grad():
        together = in_process(stages, ids, targets)
        alone = sum(in_process(stages, ids[i : i + 1], targets[i : i + 1]) for i in range(3))
    assert float(together) == pytest.approx(float(alone), rel=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_trained_tensors_are_those_of_the_layout_in_its_order(name: str) -> None:
    config = variant(name)
    for stage in stages_of(config, stirred=False):
        specs = layout(config, stage.index)
        assert [*stage.trained()] == [*specs]
        assert all(tuple(w.shape) == specs[n].shape for n, w in stage.trained().items())
        assert {id(p) for p in stage.parameters()} == {id(p) for p in stage.trained().values()}
        assert not stage.trained().keys() & stage.frozen().keys()
        assert all(not tensor.requires_grad for tensor in stage.frozen().values())


def test_a_replica_restored_from_bytes_computes_the_same_bits() -> None:
    founder = stages_of(SMALL)[1]
    copy = Stage.restore(SMALL, 1, founder.frozen(), {n: w.detach().clone() for n, w in founder.trained().items()})
    ids, _ = tokens_of(SMALL)
    c = torch.randn(ids.numel(), 5, generator=torch.Generator().manual_seed(2))
    assert torch.equal(founder(ids, c), copy(ids, c))
    assert root(founder.frozen()) == root(copy.frozen())
    assert root(founder.trained()) == root(copy.trained())


def test_founding_is_repeatable_and_every_secret_makes_another_stage() -> None:
    one, again, other = (Stage.found(SMALL, 1, s) for s in (secret(1), secret(1), secret(2)))
    assert root(one.trained()) == root(again.trained()) != root(other.trained())
    assert root(one.frozen()) == root(again.frozen()) != root(other.frozen())


def test_loading_points_at_the_new_weights_and_leaves_the_old_ones() -> None:
    stage = stages_of(SMALL)[0]
    old = {name: weight.data for name, weight in stage.trained().items()}
    before = root(old)
    new = {name: weight + 1 for name, weight in old.items()}
    stage.load(new)
    assert root(stage.trained()) == root(new) != before
    assert root(old) == before
    assert all(weight.data_ptr() == new[name].data_ptr() for name, weight in stage.trained().items())
    stage.load(old)
    assert root(stage.trained()) == before


@pytest.mark.parametrize("damage", ["missing", "extra", "misshapen"])
def test_weights_that_do_not_fit_are_refused(damage: str) -> None:
    stage = stages_of(SMALL)[0]
    weights = {name: weight.detach() for name, weight in stage.trained().items()}
    match damage:
        case "missing":
            del weights["embedding"]
        case "extra":
            weights["head.gain"] = torch.ones(24)
        case _:
            weights["embedding"] = weights["embedding"][:-1]
    with pytest.raises(SnapshotCorrupt, match=r"embedding|head\.gain"):
        stage.load(weights)


def test_ids_beyond_what_halves_can_count_stay_exact() -> None:
    config = replace(SMALL, vocab=70_000)
    stages = stages_of(config)
    ids = torch.tensor([[2047, 2048, 2049, 2050, 4097, 65_535, 65_536, 65_537, 69_999, 0]])
    tokens = stages[1].frozen()["side.tokens"]
    table = stages[1].trained()["side.grams2"]
    rows = torch.stack([table[stages[1].side.buckets(ids, 2, hash_)] for hash_ in range(config.hashes)], -1).sum(-1)
    assert torch.equal(stages[1].side(ids), (tokens[ids] + rows).detach())
    with torch.no_grad():
        sums = [float(in_process(stages, ids, targets)) for targets in (ids, ids + (ids == 2049).long())]
    assert sums[0] != sums[1]


def test_bigrams_that_share_a_row_differ_in_others() -> None:
    """13 rows for 361 bigrams: one hash cannot tell most of them apart, three together nearly all."""
    ids = torch.cartesian_prod(torch.arange(19), torch.arange(19))
    side = stages_of(replace(SMALL, hashes=3))[1].side
    found = [side.buckets(ids, 2, hash_)[:, 1] for hash_ in range(3)]
    assert len(set(found[0].tolist())) <= 13
    assert len(set(zip(*(rows.tolist() for rows in found), strict=True))) > 300


@pytest.mark.parametrize("bad", [-1, 19])
def test_an_id_outside_the_vocabulary_is_refused(bad: int) -> None:
    with pytest.raises(TokenOutOfRange, match="between 0 and 18"):
        stages_of(SMALL)[0](torch.tensor([[1, bad]]))


def test_a_sequence_beyond_the_context_is_refused_at_once_or_token_by_token() -> None:
    stage, memory = stages_of(SMALL)[0], Memory()
    with pytest.raises(Contradiction, match="11 tokens"):
        stage(torch.zeros(1, 11, dtype=torch.int64))
    stage.extend(torch.zeros(1, 10, dtype=torch.int64), None, memory)
    with pytest.raises(Contradiction, match="11 tokens"):
        stage.extend(torch.zeros(1, 1, dtype=torch.int64), None, memory)


def test_ten_thousand_changes_of_frame_do_not_drift() -> None:
    stages = stages_of(SMALL)
    before, after = stages[0].edges, stages[1].edges
    assert before.exit is not None
    assert after.entry is not None
    link = before.exit @ after.entry
    for seed in range(10_000):
        q = turn(5, seed)
        before, after = before.exited(q), after.entered(q)
    assert before.exit is not None
    assert after.entry is not None
    assert float((before.exit @ after.entry - link).abs().max()) < 1e-12


def test_only_an_orthogonal_matrix_can_change_a_frame() -> None:
    edges = stages_of(SMALL)[1].edges
    for bad in (2 * turn(5, 0), turn(4, 0), turn(5, 0).float(), torch.full((5, 5), torch.nan, dtype=torch.float64)):
        with pytest.raises(FrameMalformed, match="orthogonal"):
            edges.exited(bad)


def test_lifts_have_orthonormal_columns_in_the_precision_they_are_kept_in() -> None:
    config = replace(SMALL, size=256, heads=8, kv_heads=8, rank=32)
    for stage in stages_of(config, stirred=False):
        basis = stage.frozen()["lift.basis"]
        assert basis.dtype == torch.float32
        assert float((basis.T @ basis - torch.eye(32)).abs().max()) < 1e-6


def test_evaluation_is_the_loss_without_a_graph() -> None:
    stages = stages_of(SMALL)
    ids, targets = tokens_of(SMALL)
    c = stages[1](ids, stages[0](ids))
    assert stages[2].evaluate(ids, c, targets) == float(stages[2].loss_sum(ids, c, targets).detach())
    assert Microbatch(ids, targets).tokens == ids.numel()
