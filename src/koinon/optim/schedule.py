"""The learning rate over a run, as a share of its peak: a pure function of the step."""

from __future__ import annotations

import math

from koinon.optim.config import OptimConfig


def lr_scale(config: OptimConfig, step: int) -> float:
    """Share of the peak rate at `step`, from 0: a linear rise over the warm-up, then down to the floor, where it stays.

    cosine: half a cosine; linear: a line; wsd: flat, then a line over the last `decay` of the steps (arXiv:2404.06395).
    """
    warm = max(1, round(config.warmup * config.steps)) if config.warmup else 0
    if step < warm:
        return (step + 1) / warm
    if step >= config.steps:
        return config.floor
    start = max(warm, round((1 - config.decay) * config.steps)) if config.schedule == "wsd" else warm
    fallen = max(0, step - start) / max(1, config.steps - start)
    left = (1 + math.cos(math.pi * fallen)) / 2 if config.schedule == "cosine" else 1 - fallen
    return config.floor + (1 - config.floor) * left
