"""A chart has the size asked for, and shows each point where it lies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koinon.cli.curve import Line, Mark, chart

numbers = st.floats(-1e6, 1e6)
points = st.lists(st.tuples(st.floats(0, 1e6), numbers), max_size=30).map(lambda ps: tuple(sorted(ps)))


@given(st.lists(points, max_size=3), st.integers(0, 90), st.integers(0, 30), st.floats(0, 1e6))
def test_a_chart_fills_exactly_its_room_or_is_left_out(
    lines: list[tuple[tuple[float, float], ...]], width: int, height: int, x_end: float
) -> None:
    rows = chart([Line(ps, "cyan") for ps in lines], width=width, height=height, x_end=x_end, x_label="step")
    assert rows == [] or len(rows) == height
    assert all(row.cell_len <= width for row in rows)
    if width >= 40 and height >= 4:
        assert rows


def dots(text: str) -> list[tuple[int, int]]:
    """(row, column) of every character that holds dots."""
    return [(r, c) for r, row in enumerate(text.splitlines()) for c, char in enumerate(row) if "⠀" < char <= "⣿"]


def test_a_falling_line_goes_from_the_top_left_to_the_bottom_right() -> None:
    rows = chart([Line(((0, 5.0), (100, 1.0)), "cyan")], width=50, height=12, x_end=100)
    held = dots("\n".join(row.plain for row in rows))
    gutter = rows[0].plain.index("┤") + 1
    assert held[0] == (0, gutter)
    assert held[-1] == (9, 49)
    assert [row for row, _ in held] == sorted(row for row, _ in held)
    assert rows[0].plain.startswith("5.00")
    assert rows[9].plain.startswith("1.00")


def test_the_axis_reaches_to_the_end_of_the_run_from_the_start() -> None:
    rows = chart([Line(((0, 5.0), (10, 4.0)), "cyan")], width=50, height=12, x_end=100, x_label="step")
    assert max(column for _, column in dots("\n".join(row.plain for row in rows))) < 15
    assert rows[-1].plain.endswith("step 100")


def test_a_mark_lies_on_the_axis_below_its_step() -> None:
    rows = chart([Line(((0, 1.0), (100, 2.0)), "cyan")], width=50, height=8, x_end=100, marks=[Mark(50, "✕", "red")])
    gutter = rows[0].plain.index("┤") + 1
    assert rows[-2].plain.index("✕") - gutter == pytest.approx((50 - gutter) / 2, abs=1)


def test_points_with_a_sign_are_not_joined() -> None:
    rows = chart([Line(((0, 1.0), (100, 2.0)), "yellow", "◆")], width=50, height=8, x_end=100)
    text = "\n".join(row.plain for row in rows)
    assert text.count("◆") == 2
    assert dots(text) == []


def test_noise_on_a_plateau_stays_small() -> None:
    rows = chart([Line(((0, 2.0), (1, 2.001), (2, 1.999)), "cyan")], width=50, height=12, x_end=2)
    assert len({row for row, _ in dots("\n".join(row.plain for row in rows))}) <= 2
