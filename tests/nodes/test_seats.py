"""Seats are taken, lost and taken again, and the run goes on with the same losses."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from koinon.run import events as ev
from tests.nodes.leagues import Paced, assert_whole, run_league, spec_of
from tests.twin import TwinLeague


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return run_league(spec_of(1), tmp_path_factory.mktemp("calm"), make_compute=Paced).losses()


def test_a_process_that_starts_anew_before_anybody_noticed_its_end_takes_one_seat(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    """Whoever reads that the old seat is void hangs up on that key, and so on the very answer to the new wish."""

    async def restart(league: TwinLeague) -> None:
        await league.ready()
        await asyncio.sleep(1.0)
        await league.kill(0, 0, tell=False)
        await league.start(0, 0)

    league = run_league(spec_of(1), tmp_path, restart, make_compute=Paced)
    assert_whole(league, undisturbed)
    assert sum(isinstance(e, ev.Seated) for e in league.events) == 3, "two at first, one anew"
