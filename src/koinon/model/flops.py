"""What a work item costs, in whole floating-point operations; a multiply-add counts two.

Counted: matrix products and attention over the full square of positions, once forward and, for the gradients that are
needed, once or twice backward. Not counted: element-wise work, lookups, and recomputation of any kind, so a utilisation
made of these figures never flatters a machine that computes twice. Equals torch's FlopCounterMode on unfused attention.
Knows no tensors and imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from koinon.units import Flops

if TYPE_CHECKING:
    from koinon.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class ItemFlops:
    """One work item's cost."""

    forward: Flops
    backward: Flops

    @property
    def total(self) -> Flops:
        return self.forward + self.backward


def item_flops(config: ModelConfig, index: int, sequences: int, length: int) -> ItemFlops:
    """Cost of one item of `sequences` x `length` tokens in stage `index`, codecs excluded."""
    tokens = sequences * length
    trained, frozen = stage_macs(config, index, length)
    # Backward: a trained matrix needs two products (its own gradient, its input's), a frozen one only its input's.
    return ItemFlops(Flops(2 * tokens * (trained + frozen)), Flops(2 * tokens * (2 * trained + frozen)))


def token_flops(config: ModelConfig, length: int | None = None) -> Flops:
    """Forward and backward of one token through the whole model, in sequences of `length` (default: the context)."""
    length = length or config.context
    per_stage = (item_flops(config, index, 1, length).total.count for index in range(config.stages))
    return Flops(sum(per_stage) // length)


def stage_macs(config: ModelConfig, index: int, length: int) -> tuple[int, int]:
    """Multiply-adds per token of a stage's forward: in products whose both sides are trained, and in those with a
    frozen matrix. Attention counts among the first: both of its operands take a gradient."""
    first, last = index == 0, index == config.stages - 1
    layers = len(config.cuts()[index])
    narrow = config.form == "writer" and not last
    trained = layers * layer_macs(config, length, narrow=narrow)
    frozen = 0
    if last:
        trained += head_macs(config)
    if config.form == "dense":
        return trained, frozen
    width = config.boundary_width
    lifts = (2 * layers if narrow else 1) * width * config.size
    trained, frozen = (trained + lifts, frozen) if config.trained_lifts else (trained, frozen + lifts)
    frozen += ((not first) + (not last)) * width * width
    if config.form == "stream" and not last:
        trained += exit_macs(config)
    return trained, frozen


def layer_macs(config: ModelConfig, length: int, *, narrow: bool = False) -> int:
    """One block, one token: projections, feed-forward and attention; `narrow` writes are as wide as the boundary."""
    written = config.boundary_width if narrow else config.size
    read = config.size * (config.heads + 2 * config.kv_heads) * config.head_dim + 2 * config.size * config.ffn
    write = written * (config.size + config.ffn)
    return read + write + 2 * length * config.size


def head_macs(config: ModelConfig) -> int:
    return config.size * config.vocab


def exit_macs(config: ModelConfig) -> int:
    """The trained projection onto the boundary."""
    one = config.size * config.boundary_width
    match config.reading:
        case "linear":
            return one
        case "gated":
            return 2 * one
        case "deep":
            return one + DEEP * (one + config.boundary_width**2)


DEEP = 4
"""Hidden units of a deep exit, per boundary coefficient."""
