"""A successor admits, seats and refills like the coordinator before it; its key is believed from its term on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from koinon.run import events as ev
from koinon.run.state import SeatStatus
from tests.nodes.leagues import Paced, Rehearsal, assert_whole, run_league, spec_of

FULL = spec_of(2, league={"max_workers": 4})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return run_league(spec_of(1), tmp_path_factory.mktemp("calm"), make_compute=Paced).losses()


async def succession(league: Rehearsal) -> None:
    await league.kill_coordinator()
    while not league.succeeded:
        await asyncio.sleep(0.05)


def test_places_in_line_outlive_a_succession_and_the_successor_calls_whoever_is_first(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    seated: list[str] = []

    async def act(league: Rehearsal) -> None:
        await league.ready()
        for seat in 2, 3:
            await league.start(0, seat)
        await league.until(lambda state: len(state.line) == 2)
        await asyncio.sleep(0.1)  # until the standby has them
        before = {name: ticket.number for name, ticket in league.state.line.tickets.items()}
        await succession(league)
        assert {name: ticket.number for name, ticket in league.state.line.tickets.items()} == before
        first = next(iter(league.state.line.tickets))
        league.restarts = False
        await league.kill(0, 0)
        await league.until(lambda state: state.member_of(first) is not None)
        await league.until(lambda state: len(state.line) == 1)
        seated.append(first)

    league = run_league(FULL, tmp_path, act, make_compute=Paced, standbys=1)
    assert seated
    assert_whole(league, undisturbed)


def test_a_newcomer_is_seated_by_the_successor_and_believed_by_those_who_knew_the_one_before(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    ready: list[int] = []

    async def act(league: Rehearsal) -> None:
        await league.ready()
        await succession(league)
        for stage in 0, 1:
            await league.start(stage, 1)
        newcomers = [league.workers[stage, 1].transport.me for stage in (0, 1)]
        for worker in newcomers:
            await league.until(
                lambda state, worker=worker: (
                    (seat := state.member_of(worker)) is not None and seat.status is SeatStatus.READY
                )
            )
            ready.append(1)
            shown = next(w for w in league.workers.values() if w.transport.me == worker).transport.hello.shown
            assert shown is not None and shown.term == 2

    league = run_league(spec_of(1, train={"steps": 8}), tmp_path, act, make_compute=Paced, standbys=1)
    assert ready == [1, 1]
    assert {step: loss for step, loss in league.losses().items() if step < 4}.keys() == undisturbed.keys()


def test_a_newcomer_that_was_told_of_the_coordinator_that_is_gone_finds_its_successor(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    async def act(league: Rehearsal) -> None:
        await league.ready()
        gone = league.address
        await succession(league)
        now, league.address = league.address, gone
        await league.start(0, 1)
        league.address = now
        worker = league.workers[0, 1].transport.me
        await league.until(lambda state: state.member_of(worker) is not None)

    assert_whole(run_league(spec_of(1), tmp_path, act, make_compute=Paced, standbys=1), undisturbed)


def test_a_league_goes_back_together_under_a_later_term(tmp_path: Path, undisturbed: dict[int, float]) -> None:
    async def act(league: Rehearsal) -> None:
        await league.until(lambda state: state.step >= 1)
        await succession(league)
        await league.until(lambda state: state.stages[1].step == 3)
        await league.kill(1, 0)
        (league.directory.seat(1, 0) / "step-00000003.safetensors").unlink()
        await league.start(1, 0)

    league = run_league(spec_of(1), tmp_path, act, make_compute=Paced, standbys=1)
    assert [(event.step, event.term) for event in league.events if isinstance(event, ev.RunResumed)] == [(2, 2)]
    assert_whole(league, undisturbed)


def test_a_league_that_went_back_is_succeeded(tmp_path: Path, undisturbed: dict[int, float]) -> None:
    async def act(league: Rehearsal) -> None:
        await league.until(lambda state: state.stages[1].step == 3)
        await league.kill(1, 0)
        (league.directory.seat(1, 0) / "step-00000003.safetensors").unlink()
        await league.start(1, 0)
        await league.until(lambda state: state.tally.resumes == 1)
        await succession(league)

    league = run_league(spec_of(1), tmp_path, act, make_compute=Paced, standbys=1)
    assert league.state.tally.successions == 1
    assert_whole(league, undisturbed)
