"""Deadlines that come from what an edge has shown."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from koinon.net.deadlines import CEILING, FLOOR, Deadlines, size_class


def taught(seconds: list[float], nbytes: int = 100) -> Deadlines:
    deadlines = Deadlines()
    for value in seconds:
        deadlines.observe("edge", nbytes, value)
    return deadlines


def test_before_data_a_deadline_is_a_floor_and_a_pessimistic_rate() -> None:
    deadlines = Deadlines()
    assert deadlines.of("edge", 0) == FLOOR
    assert 69 < deadlines.of("edge", 4 << 20).value < 70


def test_a_measured_rate_replaces_the_pessimistic_one() -> None:
    deadlines = taught([1.0], nbytes=1 << 20)  # 8.4 Mbit/s
    assert deadlines.of("edge", 2 << 20).value == FLOOR.value + 16.0


def test_a_slow_but_steady_edge_gets_a_deadline_of_its_own() -> None:
    random = Random(1)
    deadlines = taught([30 + random.uniform(-1, 1) for _ in range(50)])
    assert 31 < deadlines.of("edge", 100).value < 40
    assert deadlines.of("another", 0) == FLOOR
    assert deadlines.of("edge", 1 << 20) != deadlines.of("edge", 100)


def test_a_large_body_may_take_eight_times_as_long_as_usual() -> None:
    deadlines = taught([1.0] * 20, nbytes=1 << 20)
    assert deadlines.of("edge", 1 << 20).value == FLOOR.value + 8.0
    assert taught([1.0] * 20).of("edge", 100) == FLOOR


def test_one_stall_changes_nothing() -> None:
    steady = [5.0 + 0.01 * (n % 7) for n in range(63)]
    assert (
        abs(taught([*steady[:30], 60.0, *steady[30:]]).of("edge", 100).value - taught(steady).of("edge", 100).value)
        < 0.1
    )


def test_a_missed_deadline_doubles_the_next_until_an_answer_comes() -> None:
    deadlines = Deadlines()
    waits = []
    for _ in range(5):
        waits.append(deadlines.of("edge", 0).value)
        deadlines.missed("edge", 0)
    assert waits == [2, 4, 8, 16, 16]
    deadlines.observe("edge", 0, 0.1)
    assert deadlines.of("edge", 0) == FLOOR


@given(st.lists(st.floats(0, 1e6), max_size=100), st.integers(0, 1 << 40))
def test_a_deadline_is_never_outside_its_bounds(seconds: list[float], nbytes: int) -> None:
    assert FLOOR <= taught(seconds, nbytes).of("edge", nbytes) <= CEILING


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_larger_sizes_are_in_the_same_or_a_higher_class(a: int, b: int) -> None:
    small, large = sorted((a, b))
    assert 0 <= size_class(small) <= size_class(large)
    assert size_class(4096) == 0
    assert size_class(4 * max(large, 2048)) > size_class(max(large, 2048)) or large < 2048


def test_edges_of_peers_long_gone_are_forgotten() -> None:
    deadlines = Deadlines()
    for number in range(20_000):
        deadlines.observe(number, 1 << 20, 1.0)
    assert len(deadlines._series) <= 8192
    assert len(deadlines._rates) <= 8192
