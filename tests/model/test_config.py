"""The one dial, contradictions, and how layers are cut into stages."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koinon.errors import Contradiction, StagesDoNotDivide, UnknownKey
from koinon.model.config import Codec, ModelConfig, balanced, row_bytes
from koinon.model.layout import layout, match_parameters, trained_count
from tests.model.small import SMALL, VARIANTS, variant


@given(st.integers(1, 160))
def test_every_width_in_steps_of_32_makes_a_model(width: int) -> None:
    config = ModelConfig.from_dial(32 * width)
    assert config.head_dim in (32, 64)
    assert 2.4 < config.ffn / config.size < 2.8
    assert config.layers >= 2 * config.stages
    assert all(len(cut) >= 1 for cut in config.cuts())


def test_the_dials_landmarks() -> None:
    shapes = {d: ModelConfig.from_dial(d, stages=1) for d in (128, 320, 1024, 4096)}
    assert {d: c.layers for d, c in shapes.items()} == {128: 4, 320: 8, 1024: 12, 4096: 32}
    assert (shapes[4096].heads, shapes[4096].kv_heads, shapes[4096].rank) == (64, 16, 256)
    assert (shapes[128].heads, shapes[128].ffn, shapes[128].rank) == (4, 344, 8)


def test_a_field_beside_the_dial_is_set_and_rules_follow_it() -> None:
    config = ModelConfig.from_dial(128, stages=6, heads=2, codec="int4")
    assert (config.layers, config.heads, config.kv_heads, config.codec) == (12, 2, 2, "int4")


def test_an_unknown_field_names_its_nearest() -> None:
    with pytest.raises(UnknownKey, match="did you mean `vocab`"):
        ModelConfig.from_dial(128, vocabulary=300)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 5}, "multiple of `heads`"),
        ({"heads": 8}, "turn pairs"),
        ({"heads": 4, "kv_heads": 3}, "multiple of `kv_heads`"),
        ({"rank": 25}, 'set `form` to "dense"'),
        ({"rank": 20, "fresh": 5}, "more than `size`"),
        ({"form": "wide"}, "choose one of stream, writer, dense"),
        ({"codec": "fp16"}, "choose one of"),
        ({"size": 0}, "at least 2"),
        ({"layers": 4.0}, "whole number"),
        ({"stages": True}, "whole number"),
        ({"lift_std": 0.0}, "positive number"),
        ({"rope_base": float("nan")}, "positive number"),
        ({"form": "writer", "write_norm": "gain"}, "leaves the subspace"),
        ({"form": "writer", "reading": "gated"}, "stream's projection"),
        ({"form": "dense", "fresh": 1}, "stream's projection"),
        ({"form": "dense", "trained_lifts": True}, "no lifts"),
        ({"grams": 3, "table": 0}, "needs `table`"),
        ({"hashes": 0}, "at least 1"),
        ({"gradient_rounding": "stochastic"}, "integer `codec`"),
        ({"taps": 1}, "choose 0, or 2"),
        ({"taps": 11}, "choose 0, or 2"),
    ],
)
def test_contradictions_are_refused_with_what_to_do(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(Contradiction, match=words):
        replace(SMALL, **changes)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(StagesDoNotDivide, match="at most 4"):
        replace(SMALL, stages=5)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(1, 9))
def test_a_cut_is_the_best_of_all_cuts(costs: list[int], parts: int) -> None:
    if parts > len(costs):
        with pytest.raises(StagesDoNotDivide):
            balanced(tuple(costs), parts)
        return
    cuts = balanced(tuple(costs), parts)
    assert [layer for cut in cuts for layer in cut] == list(range(len(costs)))
    assert len(cuts) == parts
    assert all(cuts)
    assert max(sum(costs[i] for i in cut) for cut in cuts) == _least_dearest(costs, parts)


def _least_dearest(costs: list[int], parts: int) -> int:
    if parts == 1:
        return sum(costs)
    heads = range(1, len(costs) - parts + 2)
    return min(max(sum(costs[:n]), _least_dearest(costs[n:], parts - 1)) for n in heads)


def test_a_heavy_head_leaves_fewer_layers_to_the_last_stage() -> None:
    config = ModelConfig.from_dial(128, layers=12, stages=4, vocab=8192)
    lengths = [len(cut) for cut in config.cuts()]
    assert (sorted(lengths), lengths[-1]) == ([1, 3, 4, 4], 1)
    even = [len(cut) for cut in ModelConfig.from_dial(128, layers=8, stages=4, vocab=256).cuts()]
    assert even == [2, 2, 2, 2]
    assert all(a.stop == b.start for a, b in pairwise(config.cuts()))


@pytest.mark.parametrize(("codec", "expected"), [("fp32", 20), ("bf16", 10), ("int8", 7), ("int4", 5)])
def test_bytes_of_a_token(codec: Codec, expected: int) -> None:
    assert row_bytes(codec, 5) == replace(SMALL, codec=codec).bytes_per_token == expected


def test_the_dense_counterpart_sends_the_whole_stream_exactly() -> None:
    for name in VARIANTS:
        dense = variant(name).dense()
        assert (dense.boundary_width, dense.codec, dense.cuts()) == (24, "fp32", variant(name).cuts())


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_match_within_half_a_percent(name: str) -> None:
    wide = {"size": 128, "heads": 4, "kv_heads": 4, "ffn": 344, "layers": 8, "vocab": 256, "table": 512}
    dense = replace(SMALL, **wide, form="dense")
    changes = VARIANTS[name]
    if "kv_heads" in changes:
        changes = changes | {"kv_heads": 2}
    matched = match_parameters(replace(SMALL, **(wide | changes)), trained_count(dense))
    assert abs(trained_count(matched) - trained_count(dense)) <= 0.005 * trained_count(dense)


def test_a_count_that_no_width_reaches_is_refused() -> None:
    with pytest.raises(Contradiction, match="No feed-forward width"):
        match_parameters(SMALL, 100)


def test_only_matrices_of_blocks_and_projections_are_orthogonalised() -> None:
    for name in VARIANTS:
        config = variant(name)
        for index in range(config.stages):
            for tensor, spec in layout(config, index).items():
                if spec.group == "muon":
                    assert tensor.startswith(("blocks.", "exit.")), tensor
                    assert len(spec.shape) == 2
                    assert not spec.parts or sum(spec.parts) == spec.shape[0]
                spared = spec.shape[0] in (config.vocab, config.table) and not tensor.startswith("head")
                assert spec.penalised == (len(spec.shape) == 2 and not spared and tensor != "side.taps"), tensor


def test_config_layout_and_prices_come_up_without_torch() -> None:
    modules = "koinon.model.layout, koinon.optim.schedule, koinon.optim.ownership"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
