"""A joiner whose stage steps faster than its weights travel attends a reduce, and nobody waits for it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from koinon.net.hub import Faults
from koinon.run import events as ev
from koinon.run.state import Phase, SeatStatus
from koinon.units import BitsPerSecond, PeerId
from tests.nodes.leagues import Paced, Rehearsal, assert_whole, run_league, spec_of
from tests.nodes.test_download import is_ready, small_chunks  # noqa: F401

STEPS = {"train": {"steps": 30}}
UPLINK, SLOW = BitsPerSecond.mbit(0.1), BitsPerSecond.mbit(0.02)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return run_league(spec_of(1, **STEPS), tmp_path_factory.mktemp("calm"), make_compute=Paced).losses()


async def join_slowly(league: Rehearsal) -> PeerId:
    """One more worker of stage 0, whose chunks take several steps because the members spare their uplinks."""
    await league.ready()
    await league.until(lambda state: state.step >= 1)
    for seat in 0, 1:
        league.workers[0, seat].worker._syncer._offers._uplink = UPLINK
    await league.start(0, 2)
    return league.workers[0, 2].transport.me


def attended(league: Rehearsal) -> list[ev.ReduceOpened]:
    return [event for event in league.events if isinstance(event, ev.ReduceOpened) and event.attendees]


def test_a_joiner_whose_stage_steps_meanwhile_attends_and_is_ready(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    async def scene(league: Rehearsal) -> None:
        await join_slowly(league)
        await league.until(lambda state: is_ready(league, 2) or state.phase is not Phase.TRAINING)
        assert is_ready(league, 2), "it became ready before the run was over"

    league = run_league(spec_of(2, **STEPS), tmp_path, scene, make_compute=Paced)
    assert_whole(league, undisturbed)
    assert attended(league)
    assert league.state.tally.excluded == 0
    assert league.state.tally.reduces_aborted == 0
    joiner = attended(league)[0].attendees[0]
    assert any(isinstance(event, ev.Contributed) and event.member == joiner for event in league.events), "it works"


def test_an_attendee_that_is_late_delays_no_step(tmp_path: Path, undisturbed: dict[int, float]) -> None:
    """Its links became so slow that it never gets a whole update in time: the others do not notice."""
    pace: list[float] = []

    async def scene(league: Rehearsal) -> None:
        joiner = await join_slowly(league)
        await league.until(lambda state: bool(state.seats_of(0, SeatStatus.ATTENDING)))
        for (stage, seat), one in league.workers.items():
            if stage == 0 and seat != 2:
                league.hub.set_faults(one.transport.me, joiner, Faults(rate=SLOW))
        first, began = league.state.step, asyncio.get_running_loop().time()
        await league.until(lambda state: state.step >= first + 4)
        pace.append((asyncio.get_running_loop().time() - began) / 4)

    league = run_league(spec_of(2, **STEPS), tmp_path, scene, make_compute=Paced)
    assert_whole(league, undisturbed)
    assert pace[0] < 2.0, "a step takes about a second"
    assert league.state.tally.reduces_aborted == 0


def test_an_attendee_that_dies_takes_no_attempt_with_it(tmp_path: Path, undisturbed: dict[int, float]) -> None:
    async def scene(league: Rehearsal) -> None:
        await join_slowly(league)
        await league.until(lambda _: bool(attended(league)))
        await league.kill(0, 2)

    league = run_league(spec_of(2, **STEPS), tmp_path, scene, make_compute=Paced)
    assert_whole(league, undisturbed)
    assert league.state.tally.reduces_aborted == 0
