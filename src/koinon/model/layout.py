"""Which trained tensors a stage has: names, shapes, and how each starts and is updated.

The one place that knows; the stage builds its parameters from it, the optimizer reads its groups, ownership its sizes.
Matrices are stored as (out, in). Knows no values and imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from koinon.errors import Contradiction
from koinon.model.config import ModelConfig
from koinon.model.flops import DEEP

Group = Literal["muon", "adamw"]
Start = Literal["normal", "ones", "zeros", "orthonormal"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One trained tensor. `parts`: rows of each matrix that is fused into it; Muon orthogonalises them one by one."""

    shape: tuple[int, ...]
    group: Group = "adamw"
    penalised: bool = False
    """Its squares count in J's penalty, and decoupled decay shrinks it. Gains and tables of input symbols: no."""
    start: Start = "normal"
    std: float = 0.0
    parts: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def layout(config: ModelConfig, index: int) -> dict[str, TensorSpec]:
    """Trained tensors of stage `index`, in the order of `Stage.trained()`."""
    return dict(_tensors(config, index))


def trained_count(config: ModelConfig) -> int:
    """Trained numbers in the whole model. Frozen lifts and maps are not counted."""
    return sum(spec.size for index in range(config.stages) for spec in layout(config, index).values())


def match_parameters(config: ModelConfig, target_count: int, *, tolerance: float = 0.005) -> ModelConfig:
    """The same model with the feed-forward width that brings `trained_count` within `tolerance` of the target.

    Raises Contradiction if no width does.
    """
    one, two = (trained_count(replace(config, ffn=ffn)) for ffn in (1, 2))
    ffn = max(1, 1 + round((target_count - one) / (two - one)))
    matched = replace(config, ffn=ffn)
    if abs(trained_count(matched) - target_count) > tolerance * target_count:
        raise Contradiction(
            f"No feed-forward width brings this model to {target_count:,} parameters: with `ffn` {ffn} it has "
            f"{trained_count(matched):,}. Change `size`, `layers` or `table`."
        )
    return matched


def _tensors(config: ModelConfig, index: int) -> Iterator[tuple[str, TensorSpec]]:
    last = index == config.stages - 1
    yield from _inputs(config, index)
    for block in range(len(config.cuts()[index])):
        for name, spec in _block(config, narrow=config.form == "writer" and not last):
            yield f"blocks.{block}.{name}", spec
    if last:
        yield "head.gain", _gain(config.size)
        std = 0.5 / math.sqrt(config.size)
        yield "head.weight", TensorSpec((config.vocab, config.size), penalised=True, std=std)
    elif config.form == "stream":
        yield from _exit(config)


def _inputs(config: ModelConfig, index: int) -> Iterator[tuple[str, TensorSpec]]:
    width, dense = config.boundary_width, config.form == "dense"
    if index == 0:
        yield "embedding", TensorSpec((config.vocab, width), std=1.0 if dense else 0.5)
    if config.trained_lifts:
        yield "side.tokens", TensorSpec((config.vocab, config.size), std=config.lift_std)
        yield "lift.basis", TensorSpec((config.size, width), penalised=True, start="orthonormal")
    if config.has_table(index):
        for gram in range(2, config.grams + 1):
            yield f"side.grams{gram}", TensorSpec((config.table, config.size), std=0.1)
    if config.taps:
        yield "side.taps", TensorSpec((config.taps, config.size), start="zeros")


def _block(config: ModelConfig, *, narrow: bool) -> Iterator[tuple[str, TensorSpec]]:
    d, heads, keys = config.size, config.heads * config.head_dim, config.kv_heads * config.head_dim
    written = config.boundary_width if narrow else d
    # A narrow write is lifted by orthonormal columns, so each number of it must be larger to move the stream as far.
    write_std = 0.02 / math.sqrt(2 * config.layers) * math.sqrt(d / written)
    yield "attention_gain", _gain(d)
    yield "qkv", _matrix(heads + 2 * keys, d, 0.02, parts=(heads, keys, keys))
    yield "attention_out", _matrix(written, heads, write_std)
    if config.write_norm == "gain":
        yield "attention_out_gain", _gain(written)
    yield "ffn_gain", _gain(d)
    yield "gate_up", _matrix(2 * config.ffn, d, 0.02, parts=(config.ffn, config.ffn))
    yield "down", _matrix(written, config.ffn, write_std)
    if config.write_norm == "gain":
        yield "down_gain", _gain(written)


def _exit(config: ModelConfig) -> Iterator[tuple[str, TensorSpec]]:
    """Updated by AdamW, not by Muon: everything that crosses goes through the projection, and updates of Muon's size in
    all its directions are noise on the boundary (1.554 against 1.548 nats after 384 steps, bench.compression)."""
    d, width = config.size, config.boundary_width
    yield "exit.projection", _plain(width, d, 0.02)
    match config.reading:
        case "linear":
            return
        case "gated":
            yield "exit.gate", replace(_plain(width, d, 0.0), start="zeros")
        case "deep":
            yield "exit.up", _plain(DEEP * width, d, 0.02)
            yield "exit.down", replace(_plain(width, DEEP * width, 0.0), start="zeros")


def _matrix(rows: int, columns: int, std: float, *, parts: tuple[int, ...] = ()) -> TensorSpec:
    return TensorSpec((rows, columns), "muon", penalised=True, std=std, parts=parts)


def _plain(rows: int, columns: int, std: float) -> TensorSpec:
    return replace(_matrix(rows, columns, std), group="adamw")


def _gain(width: int) -> TensorSpec:
    return TensorSpec((width,), start="ones")
