"""The parts of `bench.compression`: rows are found again, ends are true trainings, wires cost what they say."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.compression_sweep import plan
from bench.compression_sweep.corpora import docstrings
from bench.compression_sweep.page import picture, text
from bench.compression_sweep.picture import Curve, Panel, drawn, ticks
from bench.compression_sweep.rows import Row, Rows, gaps
from bench.compression_sweep.training import End, Training
from bench.compression_sweep.wires import Int8, LowRank, TopK
from koinon.data import DataConfig, Dataset, prepare
from koinon.model.config import ModelConfig
from koinon.model.layout import trained_count


def row(loss: float, digest: str = "ours", corpus: str = "code", seed: int = 0, steps: int = 10) -> Row:
    return Row(
        variant="v", digest=digest, corpus=corpus, seed=seed, steps=steps, tokens=0, loss=loss, bytes=8.0, parameters=1,
        muon_lr=0.1, adamw_lr=0.1, model={}, cpu_seconds=1.0, commit="c", cpu="m",
    )  # fmt: skip


class TestRows:
    def test_what_was_measured_is_there_in_the_next_session(self, tmp_path: Path) -> None:
        Rows(tmp_path / "rows.jsonl").add(row(1.5))
        assert Rows(tmp_path / "rows.jsonl").missing("ours", "code", 0, (10, 20)) == [20]

    def test_a_line_cut_short_by_a_crash_is_measured_again(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        Rows(path).add(row(1.5))
        path.write_text(path.read_text() + '{"variant": "v", "dig')
        assert [found.loss for found in Rows(path)] == [1.5]

    def test_another_setting_is_another_measurement(self) -> None:
        base = plan.TWIN
        others = [replace(base, adamw_lr=0.5), replace(base, wire="int8"), replace(base, model=plan.CANDIDATE.model)]
        assert len({variant.digest(8) for variant in (base, *others)} | {base.digest(4)}) == 5
        assert replace(base, name="another").digest(8) == base.digest(8)

    def test_a_gap_compares_like_with_like(self, tmp_path: Path) -> None:
        rows = Rows(tmp_path / "rows.jsonl")
        for found in (row(1.1), row(1.0, "twin"), row(2.4, seed=1), row(2.0, "twin", seed=1)):
            rows.add(found)
        rows.add(row(9.0, seed=2))  # its twin is missing
        (gap,) = gaps(rows, "ours", "twin")
        assert gap.shares == pytest.approx((0.1, 0.2))
        assert gap.mean == pytest.approx(0.15)
        assert gap.losses == pytest.approx((1.75, 1.5))


class TestTraining:
    @pytest.fixture
    def dataset(self, tmp_path: Path) -> Dataset:
        text = tmp_path / "text.jsonl"
        text.write_text("\n".join(json.dumps({"text": f"one and {i} make {i + 1}. " * 20}) for i in range(80)))
        return prepare(DataConfig(source=str(text)), tmp_path / "data")

    def training(self, dataset: Dataset, **changes: object) -> Training:
        model = ModelConfig.from_dial(16, layers=2, stages=2, vocab=256, context=16, table=32, codec="int4", rank=4)
        return replace(Training(model, 1e-2, 4e-3, dataset, seed=0), **changes)

    def test_an_end_on_the_way_changes_no_later_end(self, dataset: Dataset) -> None:
        training = self.training(dataset)
        (alone,) = training.ends([50])
        early, late = training.ends([50, 25])
        (early_alone,) = training.ends([25])
        assert (late.steps, late.loss) == (50, alone.loss)
        assert (early.steps, early.loss) == (25, early_alone.loss)
        assert early.loss > late.loss

    def test_the_seed_and_the_wire_matter(self, dataset: Dataset) -> None:
        def loss(training: Training) -> float:
            return next(training.ends([25])).loss

        base = self.training(dataset)
        assert len({loss(base), loss(replace(base, seed=1)), loss(replace(base, wire=TopK(1)))}) == 3

    def test_an_end_tells_its_own_cost(self, dataset: Dataset) -> None:
        ends: list[End] = list(self.training(dataset).ends([25, 50]))
        assert 0 < ends[0].cpu < ends[1].cpu


class TestPlan:
    def test_the_candidate_sends_64_times_less(self) -> None:
        assert plan.bytes_of(plan.TWIN, 1024) >= 64 * plan.bytes_of(plan.CANDIDATE, 1024)

    def test_both_sides_of_every_pair_have_as_many_parameters_and_the_same_tables(self) -> None:
        for ours, theirs in [(plan.CANDIDATE, plan.TWIN), *plan.tried()]:
            target = trained_count(theirs.model)
            assert trained_count(ours.model) == pytest.approx(target, rel=0.005)
            assert all(
                getattr(ours.model, field) == getattr(theirs.model, field)
                for field in ("layers", "stages", "table", "grams", "taps", "table_stages")
            )

    def test_what_shapes_boundaries_alone_shares_the_twin(self) -> None:
        assert plan.dense("another", rank=2, codec="int4", reading="deep").digest(8) == plan.TWIN.digest(8)

    def test_no_training_is_planned_twice(self) -> None:
        planned = [(job.variant.digest(8), job.corpus, job.seed) for job in plan.jobs()]
        assert len(planned) == len(set(planned))


class TestPage:
    def test_it_says_what_is_missing_and_shows_what_is_there(self, tmp_path: Path) -> None:
        rows = Rows(tmp_path / "rows.jsonl")
        for steps in plan.HORIZONS[:2]:
            rows.add(row(2.02, plan.CANDIDATE.digest(plan.BATCH), steps=steps))
            rows.add(row(2.00, plan.TWIN.digest(plan.BATCH), steps=steps))
        page = text(rows)
        assert "| code | 0.13M | 2.0200 | 2.0000 | +1.00% | +1.00% |" in page
        assert "(16 of 18 cells" in page
        assert "code 1.31M seed 0" in page
        assert ET.fromstring(picture(rows)) is not None


class TestWires:
    @given(st.integers(0, 2**31), st.integers(1, 8))
    def test_top_k_keeps_the_largest_and_nothing_else(self, seed: int, kept: int) -> None:
        x = torch.randn(5, 16, generator=torch.Generator().manual_seed(seed))
        sent = TopK(kept)(x)
        assert (sent != 0).sum(-1).tolist() == [kept] * 5
        assert (x - sent)[sent != 0].abs().max() < 0.01 * x.abs().max()
        assert bool((x[sent == 0].view(5, -1).abs().amax(-1) <= sent.abs().amax(-1) * 1.01).all())

    def test_low_rank_is_the_best_of_its_rank(self) -> None:
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
        error = float((x - LowRank(4)(x)).norm())
        best = float(torch.linalg.svdvals(x)[4:].norm())
        assert best <= error < 1.01 * best

    def test_each_costs_what_its_receiver_needs(self) -> None:
        assert TopK(2).bytes_per_token(128, 1024) == 6  # two values, two positions
        assert Int8().bytes_per_token(128, 1024) == 130  # one scale
        assert LowRank(4).bytes_per_token(128, 1024) == 6 + 1  # 4 int8, a scale, and 4 x 128 bf16 for 1024 rows


def test_docstrings_are_taken_whole_and_short_ones_left() -> None:
    long = "What it is. " * 10
    source = f'"""{long}"""\ndef f():\n    """{long}\n\n    Second.\n    """\nclass C:\n    """Short."""\n'
    module, function = docstrings(source.encode())
    assert module.strip() == long.strip()
    assert function.endswith("\n\nSecond.")
    assert docstrings(b"def broken(") == []


class TestPicture:
    @given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3))
    def test_ticks_are_few_and_inside(self, low: float, span: float) -> None:
        found = ticks(low, low + span)
        assert 2 <= len(found) <= 7
        assert all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) for tick in found)

    def test_every_curve_is_drawn_inside_the_picture(self) -> None:
        curve = Curve("a < b", [(1.0, -2.0), (10.0, 3.0)], [(-2.5, -1.0), (2.0, 4.0)])
        root = ET.fromstring(drawn([Panel("one", "x", "y", [curve], target=1.0), Panel("two", "x", "y", [curve])]))
        circles = [shape for shape in root.iter() if shape.tag.endswith("circle")]
        assert len(circles) == 4
        assert all(0 < float(c.get("cx", "")) < 380 and 0 < float(c.get("cy", "")) < 300 for c in circles)
