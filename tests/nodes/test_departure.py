"""Whoever leaves politely costs nothing: its folded items are committed, its optimizer state is handed over."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from koinon.run import events as ev
from koinon.run.state import SeatStatus
from tests.nodes.leagues import Paced, Rehearsal, assert_whole, run_league, spec_of


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return run_league(spec_of(1), tmp_path_factory.mktemp("calm"), make_compute=Paced).losses()


async def leave(league: Rehearsal, stage: int, seat: int) -> int:
    """Tell a worker to end, as SIGTERM does, and wait until it has; its member number."""
    one = league.workers.pop((stage, seat))
    member = one.worker._bench.member
    one.worker.end()
    async with asyncio.timeout(60.0):
        await one.task
    one.transport.kill()
    return member


def departures(league: Rehearsal, member: int) -> list[ev.Event]:
    return [e for e in league.events if isinstance(e, ev.Draining | ev.SeatLeft) and e.member == member]


def assert_nothing_lost(league: Rehearsal, member: int) -> None:
    draining, left = departures(league, member)
    assert isinstance(draining, ev.Draining)
    assert isinstance(left, ev.SeatLeft) and left.drained
    after = league.events[league.events.index(draining) :]
    assert not any(isinstance(e, ev.ItemsReleased) and e.member == member for e in after), "what it folded counts"
    assert not any(isinstance(e, ev.MomentumLost) for e in league.events)
    assert league.state.tally.vanished == 0


@pytest.mark.parametrize("moment", [0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9])
@pytest.mark.parametrize("seat", [0, 1, 2])
def test_a_member_that_leaves_at_any_moment_loses_no_item(
    tmp_path: Path, undisturbed: dict[int, float], seat: int, moment: float
) -> None:
    """Seats 0 and 1 own most, and second each other; whoever stays takes over."""
    left: list[int] = []

    async def scene(league: Rehearsal) -> None:
        await league.until(lambda state: state.step == 1)
        await asyncio.sleep(moment)
        left.append(await leave(league, 0, seat))

    league = run_league(spec_of(3), tmp_path, scene, make_compute=Paced)
    assert_whole(league, undisturbed)
    assert_nothing_lost(league, left[0])


def test_owner_and_second_leave_one_after_the_other(tmp_path: Path, undisturbed: dict[int, float]) -> None:
    left: list[int] = []

    async def scene(league: Rehearsal) -> None:
        await league.until(lambda state: state.step == 2)
        left.extend(await asyncio.gather(leave(league, 0, 0), leave(league, 0, 1)))

    league = run_league(spec_of(3), tmp_path, scene, make_compute=Paced)
    assert_whole(league, undisturbed)
    for member in left:
        assert_nothing_lost(league, member)


def test_the_only_member_leaves_with_its_step_taken_and_comes_back(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    left: list[int] = []

    async def scene(league: Rehearsal) -> None:
        await league.until(lambda state: state.step == 1)
        await asyncio.sleep(0.4)
        left.append(await leave(league, 0, 0))
        assert league.state.pauses
        assert league.state.stages[0].step >= 2, "what it had folded is committed"
        await asyncio.sleep(300.0)
        await league.start(0, 0)

    league = run_league(spec_of(1), tmp_path, scene, make_compute=Paced)
    assert_whole(league, undisturbed)
    assert_nothing_lost(league, left[0])


def test_one_of_a_pair_of_one_account_hands_over_what_only_it_holds(
    tmp_path: Path, undisturbed: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all replicas are one account's, no tensor has a second."""
    from koinon.optim import ownership

    alone: Any = lambda sizes, members, **_: ownership.owners(sizes, members, accounts=dict.fromkeys(members, "one"))  # noqa: E731
    monkeypatch.setattr("koinon.nodes.reducer.owners", alone)
    left: list[int] = []

    async def scene(league: Rehearsal) -> None:
        await league.until(lambda state: state.step == 2)
        left.append(await leave(league, 0, 0))

    league = run_league(spec_of(2), tmp_path, scene, make_compute=Paced)
    assert_whole(league, undisturbed)
    assert_nothing_lost(league, left[0])


def test_a_member_that_dies_while_it_drains_costs_its_items_of_the_step_and_no_more(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    async def scene(league: Rehearsal) -> None:
        await league.until(lambda state: state.step == 1)
        await asyncio.sleep(0.3)
        league.workers[0, 0].worker.end()
        await league.until(lambda state: bool(state.seats_of(0, SeatStatus.DRAINING)))
        await league.kill(0, 0)

    assert_whole(run_league(spec_of(2), tmp_path, scene, make_compute=Paced), undisturbed)


def test_a_step_that_is_never_taken_keeps_nobody(tmp_path: Path, undisturbed: dict[int, float]) -> None:
    """The other stage is empty: no item of the step is finished until somebody comes."""

    async def scene(league: Rehearsal) -> None:
        await league.until(lambda state: state.step == 1)
        await asyncio.sleep(0.3)
        await league.kill(1, 0)
        await leave(league, 0, 0)
        for stage in 0, 1:
            await league.start(stage, 0)

    assert_whole(run_league(spec_of(1), tmp_path, scene, make_compute=Paced), undisturbed)


def test_told_twice_it_goes_at_once(tmp_path: Path, undisturbed: dict[int, float]) -> None:
    async def scene(league: Rehearsal) -> None:
        await league.until(lambda state: state.step == 1)
        await asyncio.sleep(0.3)
        one = league.workers[0, 0]
        one.worker.end()
        one.worker.end()
        await asyncio.sleep(0.02)
        assert one.task.done() or one.worker._ended.is_set()

    assert_whole(run_league(spec_of(2), tmp_path, scene, make_compute=Paced), undisturbed)
