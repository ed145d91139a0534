"""`koinon standby`: keep a copy of a run's log, and coordinate when nobody does.

Knows nothing of how a standby decides.
"""

from __future__ import annotations

import asyncio
import signal
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from koinon.errors import UserError
from koinon.net.transport import NodeAddr
from koinon.nodes.controlling import ControlOptions, coordinate_or_stand_by
from koinon.nodes.rundir import RunDir
from koinon.run.spec import RunSpec
from koinon.run.termfile import FileTermStore
from koinon.units import RunId

if TYPE_CHECKING:
    from rich.console import Console


def options_for(run: RunDir, own: Path | None, bind: str) -> ControlOptions:
    """Whom to follow is what the run's term store says. Raises NotARun, UserError, TermStoreCorrupt."""
    run.require()
    spec = RunSpec.load(run.spec)
    store = FileTermStore(run.path / "terms", RunId(spec.run_id))
    term = store.read().current
    if term is None:
        raise UserError(
            f"The run in {run.path} has no terms, so nobody can succeed its coordinator. Start it with standbys: from "
            f'Python, LocalSwarm("{spec.name}", "{run.path}", standbys=1).'
        )
    free = next(number for number in count() if not run.standby(number).log.exists())
    return ControlOptions(
        directory=str(own or run.standby(free).path),
        run=spec.run_id,
        terms=str(store.path),
        coordinator=term.holder,
        coordinator_addresses=term.addresses,
        data=str(run.data),
        bind=bind,
    )


async def stand_by(directory: Path, own: Path | None, bind: str, console: Console) -> None:
    """Until the run has ended or Ctrl-C. Raises KoinonError: Fenced, if this node coordinated and was replaced."""
    options = options_for(RunDir(directory), own, bind)
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for how in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(how, stop.set)

    def say(address: NodeAddr) -> None:
        console.print(f"Standing by for {options.coordinator[:10]} in {options.directory}, at {address.addresses[0]}.")

    await coordinate_or_stand_by(options, stop, say)
