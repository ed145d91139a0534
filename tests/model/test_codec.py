"""Wire codecs: errors within their bound in both roundings, no clipping, small gradients survive, bad bytes do not."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from koinon.errors import FrameMalformed, NonFiniteLoss
from koinon.model.codec import LARGEST, decode, encode, nbytes, passed
from koinon.model.config import Codec

CODECS = get_args(Codec)


@st.composite
def rows(draw: st.DrawFn) -> Tensor:
    """(n, k) numbers whose rows differ wildly in size, some rows zero, some entries the row's largest."""
    n, k = draw(st.integers(0, 6)), draw(st.integers(1, 17))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    scale = torch.tensor(draw(st.lists(st.integers(-44, 37), min_size=n, max_size=n)), dtype=torch.float64)
    c = (torch.rand((n, k), generator=generator, dtype=torch.float64) * 2 - 1) * 10 ** scale[:, None]
    c[torch.rand(n, generator=generator) < 0.2] = 0
    return c.float()


def dither(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scales(data: bytes, n: int) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, "<u2", n).astype(np.int32) << 16).view(torch.float32)[:, None]


@given(rows(), st.sampled_from(CODECS))
def test_lengths_are_as_promised_and_passing_equals_encoding_and_decoding(c: Tensor, codec: Codec) -> None:
    data = encode(c, codec)
    assert len(data) == nbytes(codec, *c.shape)
    assert torch.equal(decode(data, codec, *c.shape), passed(c, codec))
    noisy = encode(c, codec, dither=dither())
    assert torch.equal(decode(noisy, codec, *c.shape), passed(c, codec, dither=dither()))


@given(rows())
def test_fp32_is_exact_and_bf16_within_its_half_ulp(c: Tensor) -> None:
    assert torch.equal(decode(encode(c, "fp32"), "fp32", *c.shape), c)
    error = (decode(encode(c, "bf16"), "bf16", *c.shape) - c).abs()
    assert (error <= c.abs() * 2**-8 + 2.0**-133).all()


@given(rows(), st.sampled_from(["int8", "int4"]), st.booleans())
def test_integers_err_by_half_a_scale_or_a_whole_one_when_stochastic(c: Tensor, codec: Codec, random: bool) -> None:
    data = encode(c, codec, dither=dither() if random else None)
    scale, error = scales(data, len(c)), (decode(data, codec, *c.shape).double() - c).abs()
    assert (error <= scale.double() * (1 if random else 0.5) * (1 + 1e-6)).all()
    top = c.abs().amax(-1, keepdim=True).double()
    assert (scale.double() * LARGEST[codec] >= top * (1 - 1e-7)).all(), "the largest entry must not be clipped"
    assert (scale.double() <= top / LARGEST[codec] * (1 + 2**-6) + 2.0**-126).all(), "no coarser than it has to be"


def test_a_gradient_of_a_billionth_survives_int8() -> None:
    g = torch.randn(64, 16, generator=dither()) * 1e-9
    back = decode(encode(g, "int8"), "int8", 64, 16)
    assert float((back - g).norm() / g.norm()) < 0.01


def test_stochastic_rounding_is_right_in_the_mean_where_nearest_is_not() -> None:
    c = torch.full((20_000, 2), 0.3)
    c[:, 0] = 7.0
    mean = decode(encode(c, "int4", dither=dither()), "int4", *c.shape)[:, 1].mean()
    assert float(mean) == pytest.approx(0.3, abs=0.02)
    assert float(decode(encode(c, "int4"), "int4", *c.shape)[:, 1].mean()) == 0


def test_the_same_dither_repeats_the_same_bytes() -> None:
    c = torch.randn(9, 5, generator=dither())
    assert encode(c, "int8", dither=dither(1)) == encode(c, "int8", dither=dither(1))
    assert encode(c, "int8", dither=dither(1)) != encode(c, "int8", dither=dither(2))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 3.4e38])
def test_what_is_not_a_number_never_crosses(codec: Codec, bad: float) -> None:
    c = torch.ones(3, 4)
    c[1, 2] = bad
    if codec == "fp32" and bad == 3.4e38:
        assert torch.equal(decode(encode(c, codec), codec, 3, 4), c)
    else:
        with pytest.raises(NonFiniteLoss):
            encode(c, codec)


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_of_the_wrong_length_are_refused(codec: Codec) -> None:
    data = encode(torch.ones(3, 5), codec)
    for wrong in (b"", data[:-1], data + b"\0"):
        with pytest.raises(FrameMalformed, match="bytes"):
            decode(wrong, codec, 3, 5)
    with pytest.raises(FrameMalformed):
        decode(data, codec, 4, 5)


@pytest.mark.parametrize("codec", CODECS)
@given(data=st.binary(min_size=200, max_size=200))
def test_any_bytes_of_the_right_length_are_refused_or_finite(codec: Codec, data: bytes) -> None:
    data = data[: nbytes(codec, 3, 5)]
    try:
        assert torch.isfinite(decode(data, codec, 3, 5)).all()
    except FrameMalformed:
        assert codec == "fp32" or not torch.isfinite(_as_bf16(data, codec)).all() or _as_bf16(data, codec).min() < 0


def _as_bf16(data: bytes, codec: Codec) -> Tensor:
    found = scales(data, 15 if codec == "bf16" else 3)
    limit = 3.4e38 if codec == "bf16" else 3.3e38 / LARGEST[codec]
    return torch.where(found.abs() > limit, torch.inf, found)


@pytest.mark.parametrize("codec", CODECS)
def test_negative_and_infinite_scales_are_refused(codec: Codec) -> None:
    data = bytearray(encode(torch.ones(3, 4), codec))
    for top in (b"\xff\xff", b"\x80\x7f", b"\x80\xff"):  # NaN, infinity, its negative, as the high half of a number
        data[2:4] = top
        with pytest.raises(FrameMalformed):
            decode(data, codec, 3, 4)
