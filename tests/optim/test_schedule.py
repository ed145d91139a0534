"""Rates over a run, and optimizer settings that contradict each other."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koinon.errors import Contradiction
from koinon.optim.config import OptimConfig
from koinon.optim.schedule import lr_scale

CONFIGS = st.builds(
    OptimConfig,
    steps=st.integers(1, 300),
    warmup=st.floats(0, 0.5),
    floor=st.floats(0, 1),
    decay=st.floats(0, 0.5),
    schedule=st.sampled_from(["cosine", "linear", "wsd"]),
)


@given(CONFIGS)
def test_a_rate_rises_to_its_peak_and_then_only_falls_to_the_floor(config: OptimConfig) -> None:
    shares = [lr_scale(config, step) for step in range(config.steps + 5)]
    peak = shares.index(max(shares))
    assert shares[: peak + 1] == sorted(shares[: peak + 1])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
    assert all(0 < share <= 1 + 1e-12 or config.floor == 0 for share in shares)
    assert shares[config.steps :] == pytest.approx([config.floor] * 5)


def test_the_shapes_at_known_points() -> None:
    for schedule, halfway in (("cosine", 0.525), ("linear", 0.525), ("wsd", 1.0)):
        config = OptimConfig(steps=100, warmup=0.1, floor=0.05, schedule=schedule)
        assert lr_scale(config, 0) == pytest.approx(0.1)
        assert lr_scale(config, 9) == lr_scale(config, 10) == pytest.approx(1.0)
        assert lr_scale(config, 55) == pytest.approx(halfway)
    wsd = OptimConfig(steps=100, schedule="wsd")
    assert lr_scale(wsd, 80) == 1
    assert lr_scale(wsd, 90) == pytest.approx(0.525)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weight_decay": 0.1, "l2": 0.1}, "set one of them to 0"),
        ({"muon_lr": 0.0}, "`muon_lr`"),
        ({"adamw_lr": float("nan")}, "`adamw_lr`"),
        ({"weight_decay": -0.1}, "0 or more"),
        ({"momentum": 1.0}, "below 1"),
        ({"betas": (0.9, 1.0)}, "two numbers"),
        ({"warmup": 1.5}, "share between"),
        ({"steps": 0}, "at least 1"),
        ({"clip": 0.0}, "positive"),
        ({"schedule": "step"}, "cosine, linear, wsd"),
        ({"schedule": "wsd", "warmup": 0.6, "decay": 0.6}, "overlap"),
    ],
)
def test_settings_that_cannot_hold_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(Contradiction, match=words):
        OptimConfig(**settings)
