from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from koinon.data.sampling import Windows, draw, evenly, microbatches, permuted
from koinon.errors import EmptyCorpus

seeds = st.binary(min_size=0, max_size=40)


@given(st.binary(min_size=32, max_size=32), st.integers(1, 300))
def test_a_permutation_takes_every_place_once(key: bytes, size: int) -> None:
    assert sorted(permuted(key, place, size) for place in range(size)) == list(range(size))


@settings(max_examples=40)
@given(seeds, st.integers(1, 20), st.integers(1, 12), st.integers(0, 3), st.integers(0, 400))
def test_every_pass_reads_every_window_once(seed: bytes, context: int, batch: int, sweep: int, extra: int) -> None:
    tokens = context + 1 + extra
    count = Windows.cut(tokens, context).count
    first, last = sweep * count, (sweep + 1) * count
    steps = range(first // batch, -(-last // batch))
    drawn = [sample for step in steps for sample in draw(seed, step, batch, tokens, context)]
    one_pass = sorted(drawn[first - steps.start * batch : last - steps.start * batch])
    assert [sample - one_pass[0] for sample in one_pass] == [context * n for n in range(count)]


@given(seeds, st.integers(0, 10**6), st.integers(1, 64), st.integers(1, 64), st.integers(65, 10**9))
def test_every_window_lies_in_the_store(seed: bytes, step: int, batch: int, context: int, tokens: int) -> None:
    for sample in draw(seed, step, batch, tokens, context):
        assert sample >= 0
        assert sample + context + 1 <= tokens


@given(seeds, st.integers(0, 1000), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_the_size_of_microbatches_does_not_change_the_step(seed: bytes, step: int, batch: int, a: int, b: int) -> None:
    one, other = (microbatches(seed, step, batch, size, 10_000, 16) for size in (a, b))
    assert [s for group in one for s in group] == [s for group in other for s in group]
    assert {len(group) for group in one[:-1]} <= {a}
    assert 1 <= len(one[-1]) <= a


def test_the_draw_is_the_same_on_every_machine() -> None:
    """Pinned: a change here changes what every run in progress reads."""
    assert draw(b"seed", 0, 6, 10_000, 64) == (1005, 3693, 557, 3373, 8941, 7021)
    assert draw(b"seed", 1_000_000, 6, 10_000, 64) == (9742, 4686, 8014, 4942, 6030, 5774)
    assert draw(b"seed", 3, 4, 2**40, 2048) == (1039699806557, 319253498205, 817781344605, 352236716381)


def test_another_seed_or_pass_reads_in_another_order() -> None:
    count = Windows.cut(10_000, 16).count
    one, other = draw(b"a", 0, count, 10_000, 16), draw(b"b", 0, count, 10_000, 16)
    later = draw(b"a", 1, count, 10_000, 16)
    assert sum(x == y for x, y in zip(one, other, strict=True)) < count / 20
    assert sum(x // 16 == y // 16 for x, y in zip(one, later, strict=True)) < count / 20


def test_early_windows_are_spread_over_the_store() -> None:
    """A quarter of a pass falls into each quarter of the store about equally: 156 expected in each, sd below 11."""
    tokens, context = 40_001, 16
    quarter = draw(b"spread", 0, 625, tokens, context)
    counts = [sum(lo <= s < lo + 10_000 for s in quarter) for lo in range(0, 40_000, 10_000)]
    assert all(100 < count < 212 for count in counts)


@given(st.integers(1, 100), st.integers(1, 30), st.integers(31, 5000))
def test_evaluation_windows_do_not_overlap(sequences: int, context: int, tokens: int) -> None:
    starts = evenly(sequences, tokens, context)
    assert len(starts) == min(sequences, (tokens - 1) // context)
    assert all(b - a >= context for a, b in itertools.pairwise(starts))
    assert starts[-1] + context + 1 <= tokens


def test_a_store_shorter_than_a_sequence_says_what_to_do() -> None:
    with pytest.raises(EmptyCorpus, match="needs 65"):
        draw(b"", 0, 1, 64, 64)
    assert draw(b"", 0, 2, 65, 64) == (0, 0)
