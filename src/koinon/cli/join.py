"""`koinon join` and `koinon leave`: this machine as a worker of a run that somebody else coordinates.

Checks come first, then a worker process, which is watched and started again, and which waits in line where no seat is
free. Knows nothing of how a check is made or a worker works.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from rich.console import Console

from koinon.cli.checklist import Checklist
from koinon.cli.doctor import way_of
from koinon.cli.joining import JoinScreen, join_screen
from koinon.cli.stopping import Stopped, Stopping
from koinon.errors import PeerError, StateError
from koinon.net.invitation import Invitation, read
from koinon.nodes.doctor import Examination, Way
from koinon.nodes.findings import Verdict
from koinon.nodes.process import WorkerOptions
from koinon.nodes.report import Report
from koinon.nodes.tenancy import Ended, Tenancy, Tenant, freed
from koinon.run.state import Phase
from koinon.units import Seconds

JOINED = Path("joined")
"""Where the seats lie that nobody has named a directory for."""
CRASHES_ALLOWED = 5
"""Times in a row that the worker's process may end before it has worked."""
ASK_AGAIN = Seconds(2.0), Seconds(30.0)
"""First and longest pause between two knocks at a run that stands still."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What `koinon join` was asked to do."""

    text: str
    directory: Path | None
    account: str | None
    bind: str
    advertise: tuple[str, ...]
    threads: int
    rehearses: int | None = None
    """A stage, founded from the spec's seed, so that one machine can repeat the run: for tests."""


async def join_run(wish: Wish, console: Console) -> None:
    """Until the run has ended, or the user leaves. Raises Stopped then, else what the checks or the run say."""
    given = read(wish.text)
    tenancy = Tenancy(wish.directory or JOINED / given.run[:12])
    with tenancy.claimed():
        tenancy.keep(given)
        way = way_of(tenancy.key(), tenancy.path, wish.bind, wish.advertise, wish.threads)
        where = quote(str(tenancy.path))
        with Stopping(
            lambda: console.print("Leaving: the others take over what was begun here."), lambda: None
        ) as stop:
            try:
                await stop.run(_Joining(wish, given, tenancy, way, console).run())
            except Stopped:
                console.print(f"Left. Come back to the same seat with: koinon join {where}/invitation --dir {where}")
                raise
    console.print("The run is complete.")


def leave_run(directory: Path, console: Console) -> None:
    """Tell the worker of a directory to leave. Raises UserError."""
    if Tenancy(directory).leave():
        console.print(f"The worker in {directory} has left.")
    else:
        console.print(f"Nobody is at work in {directory}.")


class _Joining:
    def __init__(self, wish: Wish, given: Invitation, tenancy: Tenancy, way: Way, console: Console) -> None:
        self._wish, self._given, self._tenancy, self._way, self._console = wish, given, tenancy, way, console
        self._crashes = 0

    async def run(self) -> None:
        """Returns when the run is complete."""
        examination = await self._checked()
        learned = examination.learned
        assert learned.spec is not None
        screen = join_screen(learned.spec, self._console)
        if learned.waits and await self._room(examination, screen):
            return
        while not await self._work(examination, screen):
            if await self._room(examination, screen):
                return

    async def _checked(self) -> Examination:
        """Raises MachineUnfit with the first check that fails."""
        with Checklist(self._console) as shown:
            examination = Examination(self._wish.text, self._way, shown.progress)
            async for finding in examination.walk(computes=self._wish.rehearses is None):
                last = finding
                if finding.verdict is not Verdict.BAD:
                    shown.show(finding)
        if last.verdict is Verdict.BAD:
            raise last.as_error()
        return examination

    async def _work(self, examination: Examination, screen: JoinScreen) -> bool:
        """One worker process from start to end; whether the run is complete."""
        options = await self._options(examination)
        await freed(options.bind)
        tenant = Tenant(options, lambda report: hear(report))

        def hear(report: Report) -> None:
            screen.hear(report)
            if report.state == "working":
                self._crashes = 0
            if report.phase == Phase.COMPLETE:
                tenant.leave()

        with screen:
            ended = await tenant.run()
        return await self._judge(ended, screen)

    async def _judge(self, ended: Ended, screen: JoinScreen) -> bool:
        """Whether the run is complete; else a seat is to be asked for again. Raises StateError if that is useless."""
        last = ended.last
        if last.phase == Phase.COMPLETE:
            return True
        if last.phase == Phase.FAILED:
            raise StateError(f"The run has failed: {last.reason}")
        if last.error and not last.is_refused:
            raise StateError(last.error)
        if last.is_refused:
            screen.tell(f"The coordinator said no: {last.error}")
        elif last.phase == Phase.STOPPED:
            screen.tell(f"The run was stopped ({last.reason}); waiting until it goes on. Ctrl-C leaves.")
            return False
        else:
            how = "was unseated" if ended.status == 0 else f"ended ({ended.status})"
            screen.tell(f"The worker {how}; asking for the seat again.")
        self._crashes += 1
        if self._crashes > CRASHES_ALLOWED:
            raise StateError(
                f"The worker ended {self._crashes} times before it had worked; {self._tenancy.path / 'worker.log'} "
                "says why."
            )
        await asyncio.sleep(0.2 * 2**self._crashes)
        return False

    async def _room(self, examination: Examination, screen: JoinScreen) -> bool:
        """Wait until the run goes on, asking politely; True if it is complete."""
        pause, told = ASK_AGAIN[0].value, ""
        while True:
            try:
                opened = await examination.knock()
            except (PeerError, OSError) as error:
                why = f"The coordinator does not answer ({error})"
            else:
                if opened.phase == Phase.COMPLETE:
                    return True
                if opened.phase == Phase.FAILED:
                    raise StateError(f"The run has failed: {opened.reason}")
                if opened.phase == Phase.STOPPED:
                    why = f"The run is stopped: {opened.reason}"
                else:
                    return False  # if the league is full, the worker waits in its line
            if why != told:
                screen.tell(f"{why.rstrip('.')}. Asking again from time to time; Ctrl-C leaves.")
                told = why
            await asyncio.sleep(pause)
            pause = min(1.5 * pause, ASK_AGAIN[1].value)

    async def _options(self, examination: Examination) -> WorkerOptions:
        learned, wish = examination.learned, self._wish
        assert learned.opened is not None
        assert learned.spec is not None
        host, _, port = wish.bind.rpartition(":")
        secret = None
        if wish.rehearses is not None:
            from koinon.nodes.control import stage_secret

            secret = stage_secret(learned.spec, wish.rehearses).hex()
        return WorkerOptions(
            directory=str(self._tenancy.path),
            run=self._given.run,
            coordinator=self._given.coordinator,
            coordinator_addresses=await examination.coordinator(),
            # One account serves one stage, so machines without a named owner are each their own.
            account=wish.account or f"node-{self._way.key.peer_id[:12]}",
            stage=wish.rehearses,
            secret=secret,
            bind=f"{host}:{learned.port}" if port == "0" else wish.bind,
            threads=wish.threads,
            advertise=wish.advertise,
            whereabouts=learned.opened.whereabouts,
        )


__all__ = ["Wish", "join_run", "leave_run"]
