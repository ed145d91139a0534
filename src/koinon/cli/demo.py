"""`koinon demo`: a small league trains, loses a worker in front of the user, and is compared with one process.

Knows nothing of how a league works: it uses what every caller of `League` can.
"""

from __future__ import annotations

import shutil
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

from rich.console import Console

from koinon.cli import comparison
from koinon.cli.board import Board
from koinon.cli.comparison import OneProcess
from koinon.cli.history import History
from koinon.cli.picture import save_picture
from koinon.cli.sampling import Sampling, stream
from koinon.cli.screens import Screen, screen_for
from koinon.cli.sentences import Tone
from koinon.cli.sources import Order, free_directory
from koinon.cli.stopping import Stopped, Stopping
from koinon.cli.training import drained, how_it_ended, shown, stopping, watched
from koinon.errors import UserError
from koinon.local import League
from koinon.nodes.rundir import RunDir
from koinon.run import events as ev
from koinon.run.spec import RunSpec
from koinon.run.state import RunState
from koinon.units import Seconds

PROMPT = "def "
VICTIM = (1, 0)
"""Stage and seat of the worker that is killed: in the middle, where both neighbours notice."""
LONGEST = Seconds(220)
"""The comparison ends then, wherever it is."""
SHORTEST_COMPARISON = Seconds(20)


@dataclass
class Script:
    """What happens at which step, and what was seen."""

    spec: RunSpec
    league: League
    screen: Screen
    single: OneProcess
    picture: Path | None
    losses: dict[int, float] = field(default_factory=dict)
    heldout: dict[int, float] = field(default_factory=dict)

    def hear(self, event: ev.Event, _state: RunState) -> None:
        """Follows the training."""
        match event:
            case ev.Evaluated(step=step, loss=loss):
                self.heldout[step] = loss
            case ev.StepMeasured(step=step, loss=loss):
                self.losses[step] = loss
                self.single.begin()
                if step == self.spec.train.steps // 2:
                    self._kill()
                if step == self.spec.train.steps * 3 // 4 and self.picture is not None:
                    save_picture(self.screen.board, time.time(), self.picture)
            case _:
                pass

    def _kill(self) -> None:
        stage, seat = VICTIM
        self.screen.tell(f"Half-way: now the demo kills a worker (kill -9, stage {stage}, seat {seat}).", Tone.BAD)
        self.league.kill(stage, seat)


async def run_demo(
    spec: RunSpec, directory: Path, console: Console, *, fresh: bool = False, picture: Path | None = None
) -> None:
    """The whole demonstration, with at least two stages. Raises Stopped after draining; KoinonError as League does."""
    if fresh:
        remove_run(directory)
    order = Order(spec, free_directory(directory), False, None)
    screen = screen_for(order.spec, console)
    with stopping(screen) as stop:
        try:
            await stop.run(_demo(order, console, screen, stop, picture))
        except Stopped:
            console.print(how_it_ended(order, screen.board.state))
            raise
    console.print(what_next(order.directory))


async def _demo(order: Order, console: Console, screen: Screen, stop: Stopping, picture: Path | None) -> None:
    began = time.monotonic()
    league = League(order.spec, order.directory, progress=watched(screen, stop))
    async with OneProcess(order.directory) as single:
        script = Script(order.spec, league, screen, single, picture)
        async with AsyncExitStack() as showing:
            await showing.enter_async_context(shown(league, screen))
            league.listen(script.hear)
            async with drained(league):
                await league.finished()
                await showing.aclose()
                console.print(what_happened(screen.board, script.heldout))
                await stream(league, PROMPT, Sampling(tokens=240), console)
        left = LONGEST.value - (time.monotonic() - began)
        await _compare(console, script, Seconds(max(left, SHORTEST_COMPARISON.value)))


async def _compare(console: Console, script: Script, patience: Seconds) -> None:
    steps = script.spec.train.steps
    console.print(f"\nThe same {steps} steps in one process that holds the whole model, same seed:\n")
    if console.is_terminal:
        with console.status(f"at most {patience} for what it has not done yet"):
            await script.single.finished(patience)
    else:
        await script.single.finished(patience)
    console.print(comparison.table(script.losses, script.single.losses))
    dropped = script.screen.board.state.tally.items_dropped
    console.print(f"\n{comparison.verdict(script.losses, script.single.losses, dropped)}")


def what_happened(board: Board, heldout: dict[int, float]) -> str:
    """The training in a few lines."""
    first, last = min(heldout), max(heldout)
    tally = board.state.tally
    lines = [f"\nHeld-out loss: {heldout[first]:.3f} before, {heldout[last]:.3f} after {last} steps."]
    if board.recoveries:
        lines.append(
            f"A worker was killed half-way. A fresh process had its seat {board.recoveries[0]:.1f} s later. In all, "
            f"{tally.items_released} work items were given to others and {tally.items_dropped} were dropped."
        )
    lines.append(f"\nWhat the league writes, each token through {board.spec.model.stages} processes:\n")
    return "\n".join(lines)


def what_next(directory: Path) -> str:
    """Commands to go on with."""
    where = quote(str(directory))
    return (
        f"\nNext:\n"
        f"  koinon status {where}             how it stands, and what each worker earned\n"
        f"  koinon log {where}                everything that happened\n"
        f'  koinon sample {where} "class "    more text, with one worker for each stage\n'
        f"  koinon run small                    a larger league; koinon recipes lists more"
    )


def remove_run(directory: Path) -> None:
    """Delete a run that nobody is working on. Raises UserError if something else lies there."""
    if not directory.exists():
        return
    if not RunDir(directory).log.exists():
        raise UserError(
            f"{directory} holds no run, so --fresh does not remove it. Remove it yourself, or name another."
        )
    if History(directory).is_being_written():
        raise UserError(f"The run in {directory} is at work, so --fresh does not remove it. Stop it first.")
    shutil.rmtree(directory)
