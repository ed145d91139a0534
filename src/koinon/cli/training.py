"""A league on this machine, driven from a terminal: shown while it trains, drained when the user stops it.

Knows nothing of how a run is drawn.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from shlex import quote

from rich.console import Console

from koinon.cli.history import History
from koinon.cli.screens import Screen, screen_for
from koinon.cli.sources import Order
from koinon.cli.stopping import Stopped, Stopping
from koinon.local import League
from koinon.nodes.rundir import RunDir
from koinon.run.state import Phase, RunState
from koinon.units import Seconds

TICK = Seconds(0.5)
"""Between two pictures. The process that draws also leads the league, so it draws as seldom as still looks alive."""


async def train(order: Order, console: Console, port: int) -> None:
    """Train until the run is complete. Raises Stopped after draining, and KoinonError as League does."""
    where = quote(str(order.directory))
    if order.resume and is_complete(order.directory):
        console.print(f"The run in {where} is complete: there is nothing to resume.")
        return
    screen = screen_for(order.spec, console)
    with stopping(screen) as stop:
        try:
            await stop.run(_train(order, port, screen, stop))
        except Stopped:
            console.print(how_it_ended(order, screen.board.state))
            raise
    console.print(f'Complete. Continue a text with: koinon sample {where} "def "')


async def _train(order: Order, port: int, screen: Screen, stop: Stopping) -> None:
    league = League(
        order.spec,
        order.directory,
        resume=order.resume,
        replicas=order.replicas,
        port=port,
        progress=watched(screen, stop),
    )
    async with shown(league, screen), drained(league):
        await league.finished()


@asynccontextmanager
async def drained(league: League) -> AsyncIterator[None]:
    """The league is up inside; cancelled, it says in its log that the user did it."""
    async with league:
        try:
            yield
        except asyncio.CancelledError:
            await league.close("the user stopped it")
            raise


@asynccontextmanager
async def shown(league: League, screen: Screen) -> AsyncIterator[None]:
    """Inside, the screen shows the league, from before it is up until after it is down."""
    league.listen(screen.hear)
    with screen:
        ticking = asyncio.create_task(_tick(league, screen))
        try:
            yield
        finally:
            ticking.cancel()


async def _tick(league: League, screen: Screen) -> None:
    while True:
        # Before the log's first event there is no league to ask.
        screen.tick(league.telemetry if screen.board.state.run else {})
        await asyncio.sleep(TICK.value)


def stopping(screen: Screen) -> Stopping:
    """Signals while a screen shows a run."""
    asked = "Stopping: what is committed is kept. Once more ends at once."
    return Stopping(partial(screen.tell, asked), screen.leave)


def watched(screen: Screen, stop: Stopping) -> Callable[[str, int, int], None]:
    """Shows how far the data is; ends its preparation, which runs in a thread, when the user stops."""

    def progress(what: str, done: int, total: int) -> None:
        stop.check()
        screen.prepare(what, done, total)

    return progress


def is_complete(directory: Path) -> bool:
    """Whether the run in a directory has taken its last step."""
    history = History(directory)
    for _ in history.poll():
        pass
    return history.state.phase is Phase.COMPLETE


def how_it_ended(order: Order, state: RunState) -> str:
    """What a user who stopped a run needs to know."""
    where = quote(str(order.directory))
    if not RunDir(order.directory).log.exists():
        return "Stopped before the run had begun. The same command starts it again."
    if state.phase is Phase.COMPLETE:
        return f"Stopped. The run in {where} is complete."
    return f"Stopped at step {state.step} of {order.spec.train.steps}. Go on with: koinon run --resume {where}"
