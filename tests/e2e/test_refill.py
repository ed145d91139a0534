"""Real processes: a worker is told to leave, and a stage loses its last worker. The losses do not tell."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from koinon import LocalSwarm
from koinon.run import events as ev
from koinon.run.state import Phase
from tests.processes import losses, spec_of


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    with LocalSwarm(spec_of(1), tmp_path_factory.mktemp("calm")) as swarm:
        return losses(list(swarm.events()))


def test_a_worker_that_is_told_to_end_finishes_what_it_has_begun(tmp_path: Path, undisturbed: dict[int, float]) -> None:
    with LocalSwarm(spec_of(2), tmp_path) as swarm:
        events = []
        for event in swarm.events():
            events.append(event)
            if isinstance(event, ev.StepMeasured) and event.step == 2:
                swarm._loop.call_soon_threadsafe(swarm._league.kill, 0, 0, signal.SIGTERM)
        assert swarm.state.phase is Phase.COMPLETE
    drained = [event.member for event in events if isinstance(event, ev.SeatLeft) and event.drained]
    assert len(drained) == 1
    assert any(isinstance(event, ev.Draining) and event.member == drained[0] for event in events)
    assert not any(isinstance(event, ev.ItemsReleased) and event.member == drained[0] for event in events)
    assert losses(events) == pytest.approx(undisturbed, abs=1e-4)


def test_a_stage_that_loses_its_last_worker_between_snapshots_takes_the_living_league_back(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    with LocalSwarm(spec_of(1, train={"snapshot_every": 2}), tmp_path) as swarm:
        events, killed = [], False
        for event in swarm.events():
            events.append(event)
            if isinstance(event, ev.StageStepped) and (event.stage, event.step) == (0, 4) and not killed:
                killed = swarm.kill(0, 0)  # step 5 is on no disk
        assert swarm.state.phase is Phase.COMPLETE
    assert [event.step for event in events if isinstance(event, ev.RunResumed)] == [4]
    assert losses(events) == pytest.approx(undisturbed, abs=1e-4)
