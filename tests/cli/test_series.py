"""A series is short however long the run, and a pace shows a stall."""

from __future__ import annotations

from math import fsum

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koinon.cli.series import LIMIT, REMEMBERED, Pace, Series


def series(values: list[float]) -> Series:
    made = Series()
    for x, y in enumerate(values):
        made = made.add(x, y)
    return made


@given(st.lists(st.floats(-100, 100), max_size=50))
def test_a_short_series_is_every_value(values: list[float]) -> None:
    assert list(series(values)) == list(enumerate(values))


@given(st.integers(1, 6 * LIMIT))
def test_a_long_series_keeps_few_points_and_every_value_counts_once(length: int) -> None:
    made = series([float(x % 7) for x in range(length)])
    assert len(made.points) <= LIMIT
    assert sum(point.count for point in made.points) == length
    assert fsum(p.y * p.count for p in made.points) == pytest.approx(sum(x % 7 for x in range(length)))
    assert [p.x for p in made.points] == sorted({p.x for p in made.points})


@given(st.integers(0, 40), st.integers(0, 45))
def test_what_a_resume_voids_is_gone(length: int, step: int) -> None:
    assert [x for x, _ in series([1.0] * length).before(step)] == list(range(min(length, step)))


def pace(times: list[float], amount: float = 100.0) -> Pace:
    made = Pace()
    for at in times:
        made = made.add(at, amount)
    return made


def test_nothing_is_known_of_a_pace_before_the_second_amount() -> None:
    assert pace([]).per_second(5.0) == 0
    assert pace([1.0]).per_second(5.0) == 0


@given(st.floats(0.1, 100), st.integers(2, 50), st.floats(0, 1))
def test_a_steady_pace_is_amount_over_interval(interval: float, count: int, late: float) -> None:
    times = [i * interval for i in range(count)]
    assert pace(times).per_second(times[-1] + late * interval) == pytest.approx(100 / interval)


@given(st.floats(1.01, 1000))
def test_an_overdue_amount_lowers_the_pace(overdue: float) -> None:
    assert pace([0.0, 1.0, 2.0]).per_second(2.0 + overdue) < 100
    assert pace([0.0, 1.0, 2.0]).per_second(2.0 + 1e6) < 0.01


def test_a_pace_follows_a_change_of_speed() -> None:
    times = [float(t) for t in range(10)] + [9 + 0.1 * i for i in range(1, REMEMBERED + 1)]
    assert pace(times).per_second(times[-1]) == pytest.approx(1000)
