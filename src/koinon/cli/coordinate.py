"""`koinon coordinate`: a league for workers from anywhere, and the invitation that brings them.

The same league and the same view as `koinon run`; what differs is who fills the seats. Knows nothing of how a run is
drawn.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from rich.console import Console

from koinon.cli.doctor import check_address
from koinon.cli.screens import Screen, screen_for
from koinon.cli.sources import Order
from koinon.cli.stopping import Stopped, Stopping
from koinon.cli.training import TICK, drained, how_it_ended, is_complete, stopping
from koinon.errors import Contradiction
from koinon.local import League
from koinon.net.invitation import Invitation, day, invite
from koinon.net.transport import NodeAddr
from koinon.nodes.control import Progress
from koinon.run.state import SeatStatus
from koinon.units import PeerId, RunId, Seconds

FAREWELL = Seconds(10.0)
"""How long workers elsewhere may take to hear that the run is complete, and say goodbye."""
LOOK = Seconds(5.0)
"""Between two looks at who could introduce newcomers."""


@dataclass(frozen=True, slots=True)
class Hosting:
    """How a league takes workers from elsewhere. `days`: how long its invitations are good."""

    bind: str
    advertise: tuple[str, ...]
    local_workers: int
    days: float


async def coordinate(order: Order, hosting: Hosting, console: Console) -> None:
    """Lead until the run is complete. Raises Stopped after draining, and KoinonError as League does."""
    for address in (hosting.bind, *hosting.advertise):
        check_address(address)
    seats = order.spec.model.stages * order.spec.league.replicas
    if hosting.local_workers > seats:
        raise Contradiction(
            f"--local-workers {hosting.local_workers} are more than the {seats} seats that this run begins with "
            f"(`stages` times `replicas`): give at most {seats}."
        )
    where = quote(str(order.directory))
    if order.resume and is_complete(order.directory):
        console.print(f"The run in {where} is complete: there is nothing to resume.")
        return
    screen = screen_for(order.spec, console)
    with stopping(screen) as stop:
        try:
            await stop.run(_lead(order, hosting, screen, stop, console))
        except Stopped:
            said = how_it_ended(order, screen.board.state)
            console.print(said.replace("koinon run --resume", "koinon coordinate --resume"))
            raise
    console.print(f"Complete. See it with: koinon status {where}")


async def _lead(order: Order, hosting: Hosting, screen: Screen, stop: Stopping, console: Console) -> None:
    host, _, port = hosting.bind.rpartition(":")
    league = League(
        order.spec,
        order.directory,
        resume=order.resume,
        port=int(port),
        host=host,
        advertise=hosting.advertise,
        workers=hosting.local_workers,
        progress=_preparing(console, stop),
    )
    league.listen(screen.hear)
    async with drained(league):
        invitations = Invitations(league, order.directory / "invitation", hosting.days)
        console.print(f"\nInvite with:\n\nkoinon join {invitations.renew().text}\n")
        console.print(f"It is good until {day(invitations.not_after)}, and lies in {order.directory / 'invitation'}.")
        with screen:
            watching = asyncio.create_task(_watch(league, screen, invitations))
            try:
                await league.finished()
                await _farewell(league)
            finally:
                watching.cancel()


def _preparing(console: Console, stop: Stopping) -> Progress:
    """Says what is done with the data, in lines: the live view comes after the invitation."""
    told = ""

    def progress(what: str, _done: int, _total: int) -> None:
        nonlocal told
        stop.check()
        if what != told:
            told = what
            console.print(f"Preparing the data: {what}.")

    return progress


class Invitations:
    """The league's invitation, kept in a file, with members who introduce as soon as there are some."""

    def __init__(self, league: League, path: Path, days: float) -> None:
        self._league, self._path = league, path
        self.not_after = int(time.time() + days * 86400)
        self._introducers: tuple[NodeAddr, ...] | None = None

    def renew(self) -> Invitation:
        """Write the file anew if other members can introduce now."""
        introducers = self._members()
        league = self._league
        invitation = invite(
            league.key,
            run=RunId(league.spec.run_id),
            addresses=league.address.addresses,
            not_after=self.not_after,
            introducers=introducers,
        )
        if introducers != self._introducers:
            self._introducers = introducers
            draft = self._path.with_suffix(".draft")
            draft.write_text(f"{invitation.text}\n", encoding="utf-8")
            draft.replace(self._path)
        return invitation

    def _members(self) -> tuple[NodeAddr, ...]:
        """Those of other machines who have been there longest."""
        state = self._league.state
        ready = (seat for _, seat in sorted(state.seats.items()) if seat.status is SeatStatus.READY)
        others = [s for s in ready if not self._league.is_mine(s.worker) and s.addresses]
        return tuple(NodeAddr(PeerId(seat.worker), seat.addresses[:2]) for seat in others[:4])


async def _watch(league: League, screen: Screen, invitations: Invitations) -> None:
    look_at = 0.0
    while True:
        screen.tick(league.telemetry)
        if time.monotonic() >= look_at:
            look_at = time.monotonic() + LOOK.value
            invitations.renew()
        await asyncio.sleep(TICK.value)


async def _farewell(league: League) -> None:
    """Workers elsewhere leave by themselves when they read that the run is complete."""
    until = time.monotonic() + FAREWELL.value
    while time.monotonic() < until and any(
        seat.status is not SeatStatus.LEFT and not league.is_mine(seat.worker) for seat in league.state.seats.values()
    ):
        await asyncio.sleep(0.1)
