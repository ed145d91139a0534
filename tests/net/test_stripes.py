"""How many lanes: as many as make a path faster."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from koinon.net.stripes import WIDTHS, Stripes

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
