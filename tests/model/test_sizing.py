"""Sizes follow from the config alone, and are those of real stages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from koinon.model import codec
from koinon.model.config import ModelConfig
from koinon.model.sizing import frozen_bytes, graph_bytes, optimizer_bytes, trained_bytes
from koinon.model.stage import Stage
from koinon.nodes.engine import Engine
from koinon.optim.config import OptimConfig
from koinon.optim.update import initial_state

SHAPES: list[dict[str, Any]] = [
    {"size": 64, "context": 64, "stages": 2},
    {"size": 64, "context": 64, "stages": 2, "form": "dense"},
    {"size": 64, "context": 64, "stages": 2, "form": "writer"},
    {"size": 128, "context": 64, "stages": 3, "heads": 4, "kv_heads": 2},
    {"size": 64, "context": 64, "stages": 2, "qk_norm": False},
    {"size": 64, "context": 64, "stages": 2, "reading": "deep", "taps": 4, "grams": 3},
    {"size": 64, "context": 64, "stages": 2, "write_norm": "gain", "trained_lifts": True},
    {"size": 32, "context": 32, "stages": 3, "layers": 4, "table": 0},
]


def stages(shape: dict[str, Any]) -> list[tuple[ModelConfig, int, Stage]]:
    config = ModelConfig.from_dial(**shape)
    return [(config, index, Stage.found(config, index, bytes(32))) for index in range(config.stages)]


def nbytes(tensors: dict[str, Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tensors_take_what_is_said_to_the_byte(shape: dict[str, Any]) -> None:
    for config, index, stage in stages(shape):
        assert trained_bytes(config, index).count == nbytes(stage.trained())
        assert frozen_bytes(config, index).count == nbytes(stage.frozen())
        states = [initial_state(stage.layout[name], weight) for name, weight in stage.trained().items()]
        counters = sum(8 for state in states if "count" in state)
        assert optimizer_bytes(config, index).count == sum(map(nbytes, states)) - counters


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_graph_takes_what_is_said_within_a_fifth(shape: dict[str, Any]) -> None:
    for config, index, stage in stages(shape)[:-1]:
        engine = Engine(config, OptimConfig(), stage, 0, {}, graph_budget=1 << 40)
        ids = np.random.default_rng(0).integers(0, config.vocab, (2, config.context))
        entered = codec.encode(torch.randn(ids.size, config.boundary_width), config.codec) if index else None
        engine.forward((0, 0, 0), 0, ids, entered, train=True)
        assert engine._graph_bytes == pytest.approx(graph_bytes(config, index, 2).count, rel=0.2)
