"""The reduce under everything that can go wrong with it: slow links, dead owners, other arithmetic, lies.

Real nodes over the in-memory twin, in virtual time. What must hold: one root per stage and step, and the losses of an
undisturbed run.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from koinon.net.hub import Faults
from koinon.units import BitsPerSecond
from tests.nodes.leagues import Paced, assert_whole, run_league, spec_of
from tests.twin import TwinLeague


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return run_league(spec_of(1), tmp_path_factory.mktemp("calm"), make_compute=Paced).losses()


def test_a_reduce_over_a_link_that_is_slower_than_every_deadline_so_far_ends(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    """It takes 15 s, and the first deadline is 5: without patience every attempt would be given up for ever."""

    async def throttle(league: TwinLeague) -> None:
        await league.ready()
        here, there = (league.workers[0, seat].transport.me for seat in (0, 1))
        for pair in (here, there), (there, here):
            league.hub.set_faults(*pair, Faults(rate=BitsPerSecond(20_000)))

    league = run_league(spec_of(2), tmp_path, throttle, make_compute=Paced)
    assert_whole(league, undisturbed)
    assert league.state.tally.reduces_aborted >= 1, "the link was not slow enough to tell"
