"""Models small enough to differentiate by hand, and a pipeline of stages that speaks only through bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from koinon.model.codec import decode, encode
from koinon.model.config import ModelConfig
from koinon.model.stage import Stage

SMALL = ModelConfig(
    size=24, layers=4, heads=2, kv_heads=2, ffn=20, vocab=19, context=10, stages=3, rank=5, codec="fp32", table=13
)
VARIANTS: dict[str, dict[str, Any]] = {
    "stream": {},
    "grouped": {"kv_heads": 1},
    "trained lifts": {"trained_lifts": True},
    "gated": {"reading": "gated"},
    "deep": {"reading": "deep"},
    "fresh": {"fresh": 2},
    "trigrams and taps": {"grams": 3, "taps": 3},
    "scaled writes": {"write_norm": "scale"},
    "gained writes": {"write_norm": "gain"},
    "no qk norm": {"qk_norm": False},
    "first table": {"table_stages": "first"},
    "writer": {"form": "writer"},
    "writer, scaled, trained": {"form": "writer", "write_norm": "scale", "trained_lifts": True},
    "dense": {"form": "dense"},
    "dense with taps": {"form": "dense", "taps": 2},
    "one stage": {"stages": 1},
}
"""Overrides of SMALL that between them use every option."""


def variant(name: str) -> ModelConfig:
    return replace(SMALL, **VARIANTS[name])


def secret(index: int) -> bytes:
    return bytes([index + 1]) * 32


def stages_of(config: ModelConfig, *, stirred: bool = True) -> list[Stage]:
    """Founded stages; stirred: every weight moved, so that nothing that starts at zero hides a wrong gradient."""
    stages = [Stage.found(config, index, secret(index)) for index in range(config.stages)]
    generator = torch.Generator().manual_seed(5)
    if stirred:
        for stage in stages:
            for weight in stage.trained().values():
                weight.data += 0.2 * torch.randn(weight.shape, generator=generator)
    return stages


def tokens_of(config: ModelConfig, sequences: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(ids, targets), each (sequences, context)."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(config.vocab, (sequences, config.context + 1), generator=generator)
    return text[:, :-1], text[:, 1:]


def through_bytes(stages: list[Stage], ids: Tensor, targets: Tensor, m: int, mask: Tensor | None = None) -> float:
    """One microbatch forth and back through stages that exchange encoded bytes. Gradients are added to `.grad`s."""
    config = stages[0].config
    n, k = ids.numel(), config.boundary_width
    entered: list[Tensor] = []
    left: list[Tensor] = []
    c_in: Tensor | None = None
    for stage in stages[:-1]:
        left.append(stage(ids, c_in))
        c_in = decode(encode(left[-1], config.codec), config.codec, n, k).requires_grad_()
        entered.append(c_in)
    loss = stages[-1].loss_sum(ids, c_in, targets, mask)
    (loss / m).backward()
    for sent, received in zip(reversed(left), reversed(entered), strict=True):
        assert received.grad is not None
        sent.backward(decode(encode(received.grad, config.codec), config.codec, n, k))
    return float(loss.detach())


def in_process(stages: list[Stage], ids: Tensor, targets: Tensor) -> Tensor:
    """The loss sum as one autograd graph without codecs, in whatever precision the stages have."""
    c: Tensor | None = None
    for stage in stages[:-1]:
        c = stage(ids, c)
    return stages[-1].loss_sum(ids, c, targets)


def gradients(stages: list[Stage]) -> dict[str, Tensor]:
    return {
        f"{stage.index}.{name}": weight.grad.clone()
        for stage in stages
        for name, weight in stage.trained().items()
        if weight.grad is not None
    }
