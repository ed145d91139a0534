"""Gradients on their way to an owner: exact or with nothing forgotten, one order of summing, no bad bytes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from koinon.errors import FrameMalformed, NonFiniteLoss
from koinon.optim.reduce import Compressed, Identity, ReduceCodec, summed


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_identity_is_exact() -> None:
    g = normal(5, 7)
    data, residual = Identity().encode(g, None)
    assert torch.equal(Identity().decode(data, (5, 7)), g)
    assert residual is None


@given(st.integers(1, 60), st.floats(0.01, 1), st.integers(0, 1000))
def test_what_is_not_sent_stays_in_the_residual(size: int, share: float, seed: int) -> None:
    codec, g, before = Compressed(share), normal(size, seed=seed), normal(size, seed=seed + 1)
    data, residual = codec.encode(g, before)
    sent = codec.decode(data, (size,))
    assert residual is not None
    torch.testing.assert_close(sent + residual, g + before)
    assert len(data) == 6 * codec.kept(size)
    unsent = (g + before)[sent == 0].abs()
    assert not len(unsent) or not (sent != 0).any() or unsent.max() <= (g + before)[sent != 0].abs().min()


def test_over_many_steps_everything_arrives() -> None:
    codec, residual, total = Compressed(0.1), None, torch.zeros(40)
    for step in range(200):
        data, residual = codec.encode(normal(40, seed=step % 7), residual)
        total += codec.decode(data, (40,))
    expected = sum((normal(40, seed=step % 7) for step in range(200)), start=torch.zeros(40))
    assert residual is not None
    torch.testing.assert_close(total + residual, expected, rtol=1e-3, atol=1e-3)
    assert float(residual.norm()) < 0.5 * float(expected.norm())


def test_a_failed_attempt_takes_nothing_with_it() -> None:
    g, residual = normal(30), normal(30, seed=1)
    kept = residual.clone()
    first = Compressed().encode(g, residual)
    second = Compressed().encode(g, residual)
    assert torch.equal(residual, kept)
    assert first[0] == second[0]


def test_the_same_order_gives_the_same_bits_and_any_order_nearly_the_same() -> None:
    parts = [normal(50, seed=s) * 10.0**s for s in range(4)]
    kept = [p.clone() for p in parts]
    assert torch.equal(summed(parts), summed(parts))
    assert all(torch.equal(a, b) for a, b in zip(parts, kept, strict=True))
    for order in itertools.permutations(parts):
        torch.testing.assert_close(summed(order), summed(parts))
    with pytest.raises(ValueError, match="at least one"):
        summed([])


@pytest.mark.parametrize("codec", [Identity(), Compressed(0.2)], ids=["identity", "compressed"])
def test_bad_bytes_are_refused_and_bad_numbers_never_sent(codec: ReduceCodec) -> None:
    data, _ = codec.encode(normal(10), None)
    for wrong in (b"", data[:-1], data + b"\0\0"):
        with pytest.raises(FrameMalformed):
            codec.decode(wrong, (10,))
    with pytest.raises(FrameMalformed, match="NaN"):
        codec.decode(data[:-2] + b"\xff\xff", (10,))
    with pytest.raises(NonFiniteLoss):
        codec.encode(torch.tensor([1.0, torch.inf] + [0.0] * 8), None)


@pytest.mark.parametrize("positions", [(-1, 3), (3, 10), (4, 4), (5, 2)])
def test_positions_outside_or_out_of_order_are_refused(positions: tuple[int, int]) -> None:
    head = b"".join(at.to_bytes(4, "little", signed=True) for at in positions)
    with pytest.raises(FrameMalformed, match="ascend"):
        Compressed(0.2).decode(head + bytes(4), (10,))
