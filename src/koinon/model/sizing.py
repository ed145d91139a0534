"""What a stage takes in memory, in bytes, from its config alone: tensors exactly, graphs by counting what is saved.

A graph is what autograd keeps of one item's forward for its backward, on a CPU with fused attention; weights are not
counted in it. The count follows `layers` and `subspace` line by line and was within a fifth of every form measured.
Knows no tensors and imports no torch.
"""

from __future__ import annotations

from koinon.model.config import ModelConfig
from koinon.model.layout import layout
from koinon.units import Bytes

_FLOAT, _DOUBLE, _LONG = 4, 8, 8


def trained_bytes(config: ModelConfig, index: int) -> Bytes:
    """The trained tensors of a stage, fp32."""
    return Bytes(_FLOAT * sum(spec.size for spec in layout(config, index).values()))


def optimizer_bytes(config: ModelConfig, index: int) -> Bytes:
    """Optimizer state of all tensors of a stage: one number per weight for Muon, two for AdamW."""
    per = {"muon": 1, "adamw": 2}
    return Bytes(_FLOAT * sum(per[spec.group] * spec.size for spec in layout(config, index).values()))


def frozen_bytes(config: ModelConfig, index: int) -> Bytes:
    """What a stage keeps and never trains; see `founding.frozen_tensors`."""
    salt = _LONG * config.hashes * (config.grams - 1) * config.grams if config.has_table(index) else 0
    if config.form == "dense":
        return Bytes(salt)
    width = config.boundary_width
    lifts = 0 if config.trained_lifts else _FLOAT * config.size * (config.vocab + width)
    edges = (index > 0) + (index < config.stages - 1)
    return Bytes(salt + lifts + edges * _DOUBLE * width * width)


def graph_bytes(config: ModelConfig, index: int, sequences: int) -> Bytes:
    """One item's graph, in full sequences. The last stage's logits are not in it: see `head_bytes`."""
    blocks, width = len(config.cuts()[index]), config.boundary_width
    ends = 2 * config.size + 3 * width
    if config.form == "writer" and index < config.stages - 1:
        ends += 2 * blocks * (width + config.size)  # every write is narrow, and lifted again before it is read
    tokens = sequences * config.context
    return Bytes(_FLOAT * tokens * (blocks * _saved_by_block(config) + ends))


def head_bytes(config: ModelConfig, sequences: int) -> Bytes:
    """What the last stage has in hand while it computes a loss: logits, their softmax and their gradient."""
    return Bytes(3 * _FLOAT * sequences * config.context * config.vocab)


def _saved_by_block(config: ModelConfig) -> int:
    """Numbers per token."""
    d, queries, keys = config.size, config.heads * config.head_dim, config.kv_heads * config.head_dim
    repeated = 2 * queries if keys < queries else 0
    attention = 2 * d + 2 * (queries + keys) + (queries + 2 * keys) + 2 * queries + repeated
    feed_forward = 2 * d + 4 * config.ffn
    return attention + feed_forward
