"""How many lanes: as many as make a path faster."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from koinon.net.stripes import WIDTHS, Stripes, widened

BODY = 1 << 20


def carry(stripes: Stripes, goodput: Callable[[int], float], transfers: int) -> list[int]:
    """Transfers over a path whose goodput (bit/s) depends on the width; the widths that were used."""
    used = []
    for _ in range(transfers):
        used.append(stripes.width)
        stripes.observe(stripes.width, BODY, 8 * BODY / goodput(stripes.width))
    return used


def test_a_lossy_path_climbs_to_the_widest() -> None:
    stripes = Stripes()
    carry(stripes, lambda width: 2e6 * width, 40)
    assert stripes.width == WIDTHS[-1]


def test_a_path_that_more_lanes_do_not_help_comes_back_to_one() -> None:
    stripes = Stripes()
    used = carry(stripes, lambda _width: 80e6, 60)
    assert max(used) <= 4
    assert stripes.width == 1


def test_a_fast_path_is_left_alone() -> None:
    assert set(carry(Stripes(), lambda _width: 1e9, 50)) == {1}


@pytest.mark.parametrize("full", [4, 8, 16])
def test_a_path_that_fills_up_settles_where_it_is_full(full: int) -> None:
    stripes = Stripes()
    carry(stripes, lambda width: 2e6 * min(width, full), 60)
    assert stripes.width == full


def test_a_settled_width_is_doubted_when_the_path_changes() -> None:
    stripes = Stripes()
    carry(stripes, lambda _width: 80e6, 20)
    assert stripes.width == 1
    carry(stripes, lambda width: 2e6 * width, 200)
    assert stripes.width == WIDTHS[-1]
    carry(stripes, lambda _width: 80e6, 2000)
    assert stripes.width == 1


def test_transfers_off_the_ladder_teach_nothing() -> None:
    stripes = Stripes()
    for _ in range(50):
        stripes.observe(3, BODY, 1.0)
    assert stripes.width == 1
    assert stripes.goodput is None


def test_a_path_known_to_be_lossy_begins_wide() -> None:
    stripes = Stripes()
    assert stripes.begin(BODY, lossy=False) == 2
    assert stripes.begin(BODY, lossy=True) == 8
    carry(stripes, lambda width: 2e6 * width, 10)
    assert stripes.width == WIDTHS[-1]


def test_a_very_large_first_body_does_not_wait_for_lessons() -> None:
    stripes = Stripes()
    assert stripes.begin(8 * BODY, lossy=False) == 4
    carry(stripes, lambda _width: 1e9, 5)
    assert stripes.begin(8 * BODY, lossy=False) == 1, "a fast path needs none of it"
    assert stripes.is_settled


def test_a_settled_width_is_not_guessed_at_again() -> None:
    stripes = Stripes()
    carry(stripes, lambda width: 2e6 * min(width, 2), 30)
    assert stripes.begin(8 * BODY, lossy=True) == stripes.width == 2


def test_a_body_that_takes_long_on_a_lossy_path_is_widened_under_way_and_that_is_learnt() -> None:
    assert [widened(4, seconds) for seconds in (0.0, 0.4, 0.6, 1.2, 60.0)] == [4, 4, 8, 16, 24]
    stripes = Stripes()
    stripes.observe(16, BODY, 1.0)
    assert stripes.width == 16
