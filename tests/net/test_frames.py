"""Bytes from strangers: only frame errors come out of them, and memory stays bounded."""

from __future__ import annotations

from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from koinon.errors import FrameError, FrameMalformed, FrameTooLarge
from koinon.net.desk import VERBS, Drop
from koinon.net.frames import MAX_HEADER, FrameReader, Header, NBytes, TensorMeta, Wire, body_size, flat
from koinon.net.transport import Hello

LIMIT = 4096


class Tensor(Header, frozen=True):
    """A header with every kind of field that ours have."""

    key: tuple[str, int, int]
    tensor: TensorMeta
    note: str | None = None
    hash: bytes = b""
    nbytes: NBytes = 0


class Word(Header, frozen=True):
    word: str
    nbytes: NBytes = 0


WIRE = Wire(Tensor, Word) | VERBS | Wire(Hello)
VALID = [
    Word("hello", 3),
    Tensor(("run", 1, 2), TensorMeta(dtype="float32", shape=(2, 3), nbytes=24), "note", b"\0" * 32, 24),
    Drop("not here"),
    Hello(run="r", boot="b"),
]


def drain(data: bytes, cuts: list[int]) -> tuple[list[tuple[Any, bytes]], FrameReader]:
    """Everything that a careful reader makes of these bytes, fed in pieces."""
    reader, frames, waiting = FrameReader(), [], None
    for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        reader.feed(data[start:end])
        while True:
            if waiting is None:
                waiting = reader.header(WIRE)
                if waiting is None:
                    break
                if body_size(waiting) > LIMIT:
                    raise FrameTooLarge("over the limit")
                reader.expect(body_size(waiting))
            body = reader.body()
            if body is None:
                break
            frames.append((waiting, bytes(body)))
            waiting = None
        assert reader.held <= len(data) + LIMIT
    return frames, reader


words = st.builds(Word, st.text(max_size=50), st.just(0))
tensors = st.builds(
    Tensor,
    st.tuples(st.text(max_size=9), st.integers(0, 9), st.integers(0, 9)),
    st.builds(lambda n: TensorMeta(dtype="uint8", shape=(n,), nbytes=n), st.integers(1, 99)),
    st.none() | st.text(max_size=5),
    st.binary(max_size=32),
    st.just(0),
)


@given(st.lists(st.tuples(words | tensors, st.binary(max_size=300)), max_size=5), st.data())
def test_frames_survive_any_cutting(frames: list[tuple[Any, bytes]], data: st.DataObject) -> None:
    sized = [(msgspec.structs.replace(header, nbytes=len(body)), body) for header, body in frames]
    encoded = b"".join(bytes(part) for header, body in sized for part in WIRE.encode(header, body))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(encoded)), max_size=20)))
    decoded, reader = drain(encoded, cuts)
    assert decoded == sized
    assert reader.held == 0


@settings(max_examples=1000, deadline=None)
@given(seed=st.integers(0, 2**64 - 1))
def test_whatever_comes_only_frame_errors_come_out(seed: int) -> None:
    """100,000 inputs, 100 of each example's seed: noise, noise behind a plausible length, valid frames with damage."""
    random, refused = Random(seed), 0
    valid = [b"".join(bytes(p) for p in WIRE.encode(header, bytes(body_size(header)))) for header in VALID]
    for number in range(100):
        match number % 3:
            case 0:
                data = random.randbytes(random.randrange(60))
            case 1:
                noise = random.randbytes(random.randrange(60))
                data = len(noise).to_bytes(4, "big") + noise
            case _:
                data = damaged(random, random.choice(valid))
        try:
            _, reader = drain(data, [])
        except FrameError:
            refused += 1
        else:
            assert reader.held <= len(data) + LIMIT
    assert refused > 25


def damaged(random: Random, frame: bytes) -> bytes:
    spoilt = bytearray(frame)
    for _ in range(random.randrange(1, 4)):
        match random.randrange(3):
            case 0 if spoilt:
                spoilt[random.randrange(len(spoilt))] = random.randrange(256)
            case 1:
                spoilt.insert(random.randrange(len(spoilt) + 1), random.randrange(256))
            case _:
                del spoilt[random.randrange(len(spoilt) + 1) :]
    return bytes(spoilt)


@settings(max_examples=2000)
@given(st.binary(max_size=200))
def test_a_header_decodes_to_one_of_its_wire_or_is_refused(data: bytes) -> None:
    try:
        header = WIRE.decode_header(data)
    except FrameError:
        return
    assert isinstance(header, WIRE.types)
    assert 0 <= body_size(header) <= 1 << 40


@pytest.mark.parametrize("announced", [MAX_HEADER + 1, 2 << 30, (1 << 32) - 1])
def test_a_huge_header_is_refused_before_anything_is_kept(announced: int) -> None:
    reader = FrameReader()
    reader.feed(announced.to_bytes(4, "big"))
    with pytest.raises(FrameTooLarge):
        reader.header(WIRE)
    assert reader.held == 4


def test_a_header_may_announce_a_huge_body_without_costing_memory() -> None:
    reader = FrameReader()
    reader.feed(WIRE.head(Word("x", 2 << 30)))
    header = reader.header(WIRE)
    assert header is not None
    assert body_size(header) == 2 << 30
    assert reader.held == 0


def test_deep_nesting_is_refused() -> None:
    deep = b"\x91" * (MAX_HEADER - 1) + b"\xc0"
    with pytest.raises(FrameMalformed):
        WIRE.decode_header(deep)


def test_a_negative_or_absurd_size_is_refused() -> None:
    class Loose(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, array_like=True):
        nbytes: int

    wire = Wire(Loose)
    for nbytes in (-1, 1 << 50):
        with pytest.raises(FrameTooLarge):
            wire.decode_header(msgspec.msgpack.encode(Loose(nbytes)))


def test_unknown_fields_and_foreign_headers_are_refused() -> None:
    with pytest.raises(FrameMalformed):
        WIRE.decode_header(msgspec.msgpack.encode(["Word", "x", 0, "more"]))
    with pytest.raises(FrameMalformed):
        Wire(Word).decode_header(VERBS.head(Drop("x"))[4:])


def test_only_closed_tagged_arrays_are_wire_headers() -> None:
    class Open(msgspec.Struct, tag=True, array_like=True):
        word: str

    class Untagged(msgspec.Struct, forbid_unknown_fields=True, array_like=True):
        word: str

    for kind in (Open, Untagged):
        with pytest.raises(TypeError, match="not a wire header"):
            Wire(kind)


def test_the_body_must_be_as_long_as_its_header_says() -> None:
    with pytest.raises(ValueError, match="says 3 bytes, the body has 2"):
        WIRE.encode(Word("x", 3), b"ab")


def test_a_header_over_the_limit_is_not_sent() -> None:
    with pytest.raises(FrameTooLarge):
        WIRE.head(Word("x" * MAX_HEADER))


def test_a_body_is_counted_in_bytes_not_elements() -> None:
    numpy = pytest.importorskip("numpy")
    view = flat(numpy.arange(6, dtype=numpy.float32).reshape(2, 3))
    assert len(view) == 24
    with pytest.raises(TypeError):
        flat(numpy.arange(6)[::2])


@pytest.mark.parametrize(
    ("meta", "error"),
    [
        (TensorMeta(dtype="object", shape=(1,), nbytes=1), FrameMalformed),
        (TensorMeta(dtype="float32", shape=(), nbytes=4), FrameMalformed),
        (TensorMeta(dtype="float32", shape=(1, 1, 1, 1, 1), nbytes=4), FrameMalformed),
        (TensorMeta(dtype="float32", shape=(2, 0), nbytes=0), FrameMalformed),
        (TensorMeta(dtype="float32", shape=(-2, -2), nbytes=16), FrameMalformed),
        (TensorMeta(dtype="float32", shape=(2, 2), nbytes=15), FrameMalformed),
        (TensorMeta(dtype="float32", shape=(1 << 20, 1 << 20), nbytes=4), FrameTooLarge),
        (TensorMeta(dtype="float32", shape=(1 << 20, 1 << 20), codec="top-k", nbytes=4), FrameTooLarge),
        (TensorMeta(dtype="float32", shape=(2,), codec="top-k", nbytes=LIMIT + 1), FrameTooLarge),
    ],
)
def test_a_tensor_that_is_none_is_refused(meta: TensorMeta, error: type[FrameError]) -> None:
    with pytest.raises(error):
        meta.check(LIMIT)


@given(st.lists(st.integers(1, 8), min_size=1, max_size=4), st.sampled_from(["float32", "bfloat16", "int8"]))
def test_a_plain_tensor_that_fits_is_accepted(shape: list[int], dtype: str) -> None:
    size = {"float32": 4, "bfloat16": 2, "int8": 1}[dtype]
    nbytes = size
    for dimension in shape:
        nbytes *= dimension
    meta = TensorMeta(dtype=dtype, shape=tuple(shape), nbytes=nbytes)
    meta.check(nbytes)
    with pytest.raises(FrameTooLarge):
        meta.check(nbytes - 1)
