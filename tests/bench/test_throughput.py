"""What the turns come to, and that all peers are given the same work."""

from __future__ import annotations

import pytest

from bench.peers.work import SIZES, Outcome, Work
from bench.throughput import figures
from koinon.model.layout import trained_count


def run(tokens_per_cpu_second: float, recomputed: float = 0.0) -> Outcome:
    return Outcome(tokens=1000, cpu=1000 / tokens_per_cpu_second, wall=1.0, loss=3.0, recomputed=recomputed)


def test_a_ratio_is_taken_turn_by_turn() -> None:
    turns = {
        "league": [run(80), run(40), run(90)],
        "plain": [run(100), run(50), run(100)],  # the second turn was on a machine at half speed
        "pipeline": [run(70), run(35), run(70)],
    }
    found = {figure.name: figure for figure in figures("1M", turns)}
    assert found["league_1M"].value == pytest.approx(0.8)
    assert found["league_1M_spread"].value == pytest.approx([0.8, 0.9])
    assert found["pipeline_1M"].value == pytest.approx(0.7)
    assert found["against_pipeline_1M"].holds


def test_recomputation_in_any_turn_misses_the_target() -> None:
    turns = {"league": [run(90), run(90, recomputed=0.1)], "plain": [run(100)] * 2, "pipeline": [run(70)] * 2}
    found = {figure.name: figure for figure in figures("10M", turns)}
    assert not found["recomputed_10M"].holds


@pytest.mark.parametrize(("size", "millions"), [("1M", 1.1), ("10M", 10.7)])
def test_sizes_are_what_their_names_say_and_the_dense_twin_is_as_large(size: str, millions: float) -> None:
    assert size in SIZES
    spec = Work(size=size, warmup=1, steps=1).spec
    ours, dense = trained_count(spec.model), trained_count(spec.model.dense())
    assert dense == pytest.approx(millions * 1e6, rel=0.05)
    assert ours == pytest.approx(dense, rel=0.05)


def test_the_evaluation_at_the_end_lies_outside_of_what_is_measured() -> None:
    spec = Work(size="1M", warmup=2, steps=5).spec
    assert spec.train.steps > 2 + 5
    assert spec.train.eval_every == 0
