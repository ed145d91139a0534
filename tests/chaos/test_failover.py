"""The process that coordinates is killed with kill -9; another goes on. Real processes, real files, real sockets.

The same at every moment of a step, over the twin, is in tests/nodes/test_failover.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from koinon.local import LocalSwarm
from koinon.nodes.rundir import RunDir
from koinon.run import events as ev
from koinon.run.reader import LogReader
from koinon.run.state import Phase, fold
from tests.processes import MICROBATCHES, STAGES, STEPS, losses, spec_of


@pytest.mark.slow
def test_a_killed_coordinator_is_succeeded_and_nothing_that_was_shown_is_lost(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    directory, shown = RunDir(tmp_path / "here"), list[ev.Event]()
    with LocalSwarm(spec_of(1), directory.path, standbys=1) as swarm:
        for event in swarm.events():
            shown.append(event)
            if isinstance(event, ev.StepMeasured) and event.step == 2:
                swarm.kill_coordinator()
        assert swarm.state.phase is Phase.COMPLETE
        state = swarm.state
    assert losses(shown) == pytest.approx(undisturbed, abs=1e-4)
    assert [event.term for event in shown if isinstance(event, ev.TermBegan)] == [2]
    assert state.tally.vanished == state.tally.items_dropped == 0, "members keep their seats"
    for stage in range(STAGES):
        credit = [c.items for account, c in state.credit.items() if account.startswith(f"local-{stage}-")]
        assert sum(credit) == STEPS * MICROBATCHES, "each item is paid once"
    assert shown == events_in(directory.standby(0))[: len(shown)], "nothing that was shown is lost"
    assert fold(events_in(directory)).term <= 2, "the killed one's directory follows, and takes no term after the end"


def events_in(directory: RunDir) -> list[ev.Event]:
    with LogReader(directory.log, run=spec_of(1).run_id, decode=ev.decode) as reader:
        return reader.poll()
