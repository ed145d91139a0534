"""How a stage comes to be: every frozen tensor and every first weight, drawn from one 32-byte secret.

The founding replica of a stage makes them once; all others download. Nobody re-derives them, so equal bits are promised
on one machine only. Each tensor has its own stream, keyed with sha-256(secret | name), so adding one moves no other.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from koinon.model.config import ModelConfig
from koinon.model.layout import TensorSpec, layout
from koinon.model.subspace import HASH_PRIME, orthonormal


def first_weights(config: ModelConfig, index: int, secret: bytes) -> dict[str, Tensor]:
    """The trained tensors of stage `index` before step 0, fp32."""
    return {name: _drawn(spec, secret, name) for name, spec in layout(config, index).items()}


def frozen_tensors(config: ModelConfig, index: int, secret: bytes) -> dict[str, Tensor]:
    """What stage `index` keeps secret and never trains: token table and basis (unless trained), hash multipliers, and
    the fp64 maps of its edges."""
    frozen: dict[str, Tensor] = {}
    if config.has_table(index):
        generator = _generator(secret, "side.salt")
        shape = (config.hashes, config.grams - 1, config.grams)
        frozen["side.salt"] = torch.from_numpy(generator.integers(1, HASH_PRIME, shape))
    if config.form == "dense":
        return frozen
    width = config.boundary_width
    if not config.trained_lifts:
        frozen["side.tokens"] = _normal(secret, "side.tokens", (config.vocab, config.size)) * config.lift_std
        frozen["lift.basis"] = _orthonormal(secret, "lift.basis", config.size, width).float()
    if index > 0:
        frozen["edges.entry"] = _orthonormal(secret, "edges.entry", width, width)
    if index < config.stages - 1:
        frozen["edges.exit"] = _orthonormal(secret, "edges.exit", width, width)
    return frozen


def _drawn(spec: TensorSpec, secret: bytes, name: str) -> Tensor:
    match spec.start:
        case "ones":
            return torch.ones(spec.shape)
        case "zeros":
            return torch.zeros(spec.shape)
        case "normal":
            return _normal(secret, name, spec.shape) * spec.std
        case "orthonormal":
            return _orthonormal(secret, name, *spec.shape).float()


def _orthonormal(secret: bytes, name: str, rows: int, columns: int) -> Tensor:
    return orthonormal(torch.from_numpy(_generator(secret, name).standard_normal((rows, columns)))).contiguous()


def _normal(secret: bytes, name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(_generator(secret, name).standard_normal(shape, np.float32))


def _generator(secret: bytes, name: str) -> np.random.Generator:
    key = hashlib.sha256(secret + b"|" + name.encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key, "<u8")))
