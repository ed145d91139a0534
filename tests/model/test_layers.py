"""A block's parts against their definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from koinon.model.founding import first_weights
from koinon.model.layers import Block, Rotation, rms_norm, rotated
from tests.model.small import SMALL, secret


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("has_gain", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_norm_and_its_gradient_are_torchs(has_gain: bool, dtype: torch.dtype) -> None:
    x, g = normal(3, 5, 8, dtype=dtype), normal(3, 5, 8, seed=1, dtype=dtype)
    gain = normal(8, seed=2, dtype=dtype) if has_gain else None
    results = []
    for norm in (rms_norm, lambda x, gain: F.rms_norm(x, (8,), gain, eps=1e-6)):
        live = x.clone().requires_grad_()
        w = None if gain is None else gain.clone().requires_grad_()
        y = norm(live, w)
        y.backward(g)
        results.append([y.detach(), live.grad, None if w is None else w.grad])
    for ours, theirs in zip(*results, strict=True):
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs)


def test_the_norm_of_zeros_is_zero() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    y = rms_norm(x)
    y.sum().backward()
    assert not y.any()
    assert torch.isfinite(x.grad).all()


def test_rotation_keeps_lengths_and_products_depend_on_distance_alone() -> None:
    rotation = Rotation(SMALL)
    q, k = normal(1, 1, 1, 12).expand(1, 10, 1, 12), normal(1, 1, 1, 12, seed=1).expand(1, 10, 1, 12)
    rq, rk = (rotated(x, rotation.turns(0, 10, x))[0, :, 0] for x in (q, k))
    torch.testing.assert_close(rq.norm(dim=-1), q[0, :, 0].norm(dim=-1))
    products = rq @ rk.T
    for distance in range(10):
        diagonal = products.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-5)
    assert float((products.diagonal(0)[0] - products.diagonal(-3)[0]).abs()) > 1e-3


def test_a_later_start_rotates_as_its_place_in_the_sequence() -> None:
    rotation, x = Rotation(SMALL), normal(2, 10, 3, 12)
    whole = rotated(x, rotation.turns(0, 10, x))
    torch.testing.assert_close(rotated(x[:, 4:7], rotation.turns(4, 3, x)), whole[:, 4:7])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_query_attention_is_attention_with_shared_keys(kv_heads: int) -> None:
    config = replace(SMALL, heads=4, kv_heads=kv_heads, qk_norm=True)
    weights = first_weights(config, 1, secret(0))
    block = Block(
        config, Rotation(config), {n.removeprefix("blocks.0."): w for n, w in weights.items() if "blocks.0" in n}
    )
    x = normal(2, 10, 24)
    q, k, v = (F.linear(rms_norm(x) * block.attention_gain, block.qkv)).split([24, 6 * kv_heads, 6 * kv_heads], -1)
    turns = Rotation(config).turns(0, 10, x)
    heads = []
    for head in range(4):
        own, shared = slice(6 * head, 6 * head + 6), slice(6 * (head * kv_heads // 4), 6 * (head * kv_heads // 4) + 6)
        a, b = (rotated(rms_norm(y)[:, :, None], turns)[:, :, 0] for y in (q[..., own], k[..., shared]))
        scores = (a @ b.transpose(1, 2)) / 6**0.5
        scores = scores.masked_fill(torch.ones(10, 10).triu(1).bool(), -torch.inf)
        heads.append(torch.softmax(scores, -1) @ v[..., shared])
    expected = F.linear(torch.cat(heads, -1), block.attention_out)
    torch.testing.assert_close(block.attention(x), expected, rtol=1e-4, atol=1e-6)
