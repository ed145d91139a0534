"""Seats are taken, lost and taken again, and the run goes on with the same losses."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from koinon.nodes.faults import Point
from koinon.nodes.publisher import Publisher
from koinon.run import events as ev
from koinon.units import PeerId
from tests.nodes.leagues import Paced, Rehearsal, assert_whole, run_league, spec_of


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return run_league(spec_of(1), tmp_path_factory.mktemp("calm"), make_compute=Paced).losses()


def test_a_process_that_starts_anew_before_anybody_noticed_its_end_takes_one_seat(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    """Whoever reads that the old seat is void hangs up on that key, and so on the very answer to the new wish."""

    async def restart(league: Rehearsal) -> None:
        await league.ready()
        await asyncio.sleep(1.0)
        await league.kill(0, 0, tell=False)
        await league.start(0, 0)

    league = run_league(spec_of(1), tmp_path, restart, make_compute=Paced)
    assert_whole(league, undisturbed)
    assert sum(isinstance(e, ev.Seated) for e in league.events) == 3, "two at first, one anew"


def test_a_worker_that_never_reads_of_its_seat_asks_for_another(
    tmp_path: Path, undisturbed: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where its seat became void between its wish to be sent the log and the first record."""
    deaf: set[PeerId] = set()
    add = Publisher.add

    def forgetful(publisher: Publisher, peer: PeerId, first: int, **_more: bool) -> None:
        if peer in deaf or peer == publisher._transport.me:
            add(publisher, peer, first)
        deaf.add(peer)

    monkeypatch.setattr(Publisher, "add", forgetful)
    assert_whole(run_league(spec_of(1), tmp_path, make_compute=Paced), undisturbed)


@pytest.mark.parametrize("there", [Point.HELD, Point.COMMIT, Point.COMMITTED])
@pytest.mark.parametrize("here", [Point.BACKWARD, Point.FOLDED, Point.REDUCE, Point.HELD])
def test_two_stages_die_while_only_one_of_them_has_taken_the_step(
    tmp_path: Path, undisturbed: dict[int, float], here: Point, there: Point
) -> None:
    """Stage 0 needs gradients of step 2 from a stage 1 that has forgotten them and has weights of step 3."""
    plan = {(0, 0): {(here, 2)}, (1, 0): {(there, 2)}}
    league = run_league(spec_of(1), tmp_path, make_compute=Paced, plan=plan)
    assert len(league.deaths) == 2
    assert_whole(league, undisturbed)


def test_a_member_that_fetched_its_weights_can_execute_items_of_the_step_before(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    """Everybody else who ever had the weights of step 2 is gone by the time that stage 0 needs them."""
    plan = {(0, 0): {(Point.REDUCE, 2)}, (0, 1): {(Point.REDUCE, 2)}, (1, 0): {(Point.COMMITTED, 2)}}

    async def come_back_one_by_one(league: Rehearsal) -> None:
        await league.until(lambda _: len(league.workers) == 1)
        for snapshot in league.directory.seat(1, 0).glob("*.safetensors"):
            snapshot.unlink()
        await league.start(1, 0)
        await league.until(lambda state: len(state.ready(1)) == 2)
        await league.kill(1, 1)
        for seat in 0, 1:
            await league.start(0, seat)

    league = run_league(spec_of(2), tmp_path, come_back_one_by_one, make_compute=Paced, plan=plan, restarts=False)
    assert_whole(league, undisturbed)


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("moment", [0.01, 0.05, 0.1, 0.15])
def test_whoever_was_to_found_a_stage_may_die_at_it(
    tmp_path: Path, undisturbed: dict[int, float], moment: float, replicas: int
) -> None:
    """The others wait for it; and it comes back as one who finds others waiting."""

    async def kill_the_founders(league: Rehearsal) -> None:
        await asyncio.sleep(moment)
        for stage in 0, 1:
            await league.kill(stage, 0)
            await league.start(stage, 0)

    league = run_league(spec_of(replicas), tmp_path, kill_the_founders, make_compute=Paced)
    assert_whole(league, undisturbed)
    assert league.ended_at < 60.0
