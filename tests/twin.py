"""A whole league in one event loop over the in-memory twin: real nodes, real arithmetic, no socket and no process.

Workers can be killed (they vanish without a word), started anew in the same seat, and cut off. Under `run_virtual` the
clock is virtual and a test of minutes takes seconds.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from koinon.data import DataConfig, prepare
from koinon.net.hub import Faults, Hub
from koinon.net.identity import NodeKey
from koinon.net.memory import MemoryTransport
from koinon.net.transport import NodeAddr, Transport
from koinon.nodes.compute import Compute, InlineCompute
from koinon.nodes.control import Control, create, reopen, resume_point, sampling_seed, stage_secret
from koinon.nodes.doorkeeper import Doorkeeper
from koinon.nodes.faults import Point, Reach
from koinon.nodes.inventory import _check
from koinon.nodes.process import STATE_LIMIT
from koinon.nodes.rundir import RunDir
from koinon.nodes.standby import Standby
from koinon.nodes.switchboard import Switchboard
from koinon.nodes.worker import Worker
from koinon.run import events as ev
from koinon.run.spec import RunSpec
from koinon.run.state import Phase, RunState, SeatStatus
from koinon.run.termfile import FileTermStore
from koinon.run.terms import Book
from koinon.units import PeerId, RunId


@functools.cache
def _prepared(config: DataConfig) -> Path:
    """The data, prepared once for all leagues of a test session."""
    folder = Path(tempfile.mkdtemp(prefix="koinon-data-"))
    atexit.register(shutil.rmtree, folder)
    prepare(config, folder)
    return folder


@dataclass
class TwinWorker:
    worker: Worker
    transport: MemoryTransport
    task: asyncio.Task[None]
    compute: Compute


@dataclass
class TwinStandby:
    standby: Standby
    transport: MemoryTransport
    task: asyncio.Task[None]


def clocked_store(path: Path, run: str) -> FileTermStore:
    """In a file, by the loop's clock."""
    return FileTermStore(path, RunId(run), clock=asyncio.get_running_loop().time)


@dataclass
class TwinLeague:
    """`async with TwinLeague(spec, path) as league: await league.trained()`."""

    spec: RunSpec
    path: Path
    faults: Faults = field(default_factory=Faults)
    seed: int = 0
    resume: bool = False
    plan: dict[tuple[int, int], set[tuple[Point, int]]] = field(default_factory=dict)
    """(stage, seat) -> points and the steps from which on its first process vanishes there."""
    restarts: bool = True
    make_compute: type[InlineCompute] = InlineCompute
    events: list[ev.Event] = field(default_factory=list)
    deaths: list[asyncio.Future[None]] = field(default_factory=list)
    workers: dict[tuple[int, int], TwinWorker] = field(default_factory=dict)
    standbys: int = 0
    make_store: Callable[[Path, str], FileTermStore] = clocked_store
    succeeded: list[float] = field(default_factory=list)
    """When a standby took over."""
    heirs: dict[int, TwinStandby] = field(default_factory=dict)
    """By number; those that have taken over are in `control` instead, or were."""

    @property
    def state(self) -> RunState:
        return self.control.coordinator.state

    def store(self) -> FileTermStore | None:
        """A new handle on the term store, as each process has its own."""
        return self.make_store(self.path / "terms", self.spec.run_id) if self.standbys else None

    def book(self) -> Book:
        """What the term store says now; nothing where there is none."""
        store = self.store()
        return Book(RunId(self.spec.run_id)) if store is None else store.read()

    async def __aenter__(self) -> TwinLeague:
        self.hub = Hub(self.seed, self.faults)
        self.directory = RunDir(self.path)
        if not self.resume:
            shutil.copytree(_prepared(self.spec.data), self.directory.data)
        run = reopen(self.directory) if self.resume else create(self.spec, self.directory, lambda *_: None)
        self.door = Doorkeeper(run.key.peer_id, RunId(run.spec.run_id))
        transport = MemoryTransport(self.hub, run.key, gate=self.door.admit)
        self.control = control = Control(run, transport, Switchboard(STATE_LIMIT), terms=self.store())
        self.door.watch(lambda: control.coordinator.state, transport.hang_up, self.book)
        self.control.follower.listen(lambda event, _state: self.events.append(event))
        if self.resume:
            self.control.resume(resume_point(run.state, self.snapshots(run.state)))
        self.address = await self.control.start()
        for number in range(self.standbys):
            await self.stand_by(number)
        for seat in range(self.spec.league.replicas):
            for stage in range(self.spec.model.stages):
                await self.start(stage, seat)
        return self

    async def __aexit__(self, *_: object) -> None:
        for number in list(self.heirs):
            await self.kill_standby(number)
        await self.control.drain("the test is over")
        for stage, seat in list(self.workers):
            await self.kill(stage, seat, tell=False)
        await self.control.close()

    def snapshots(self, state: RunState) -> dict[int, dict[int, str]]:
        order = [
            (str(folder), stage, {str(v.step): v.root for v in state.stages[stage].versions})
            for (stage, _), folder in self.directory.seats().items()
        ]
        found: dict[int, dict[int, str]] = {}
        for stage, step, root in _check(order):
            found.setdefault(stage, {})[step] = root
        return found

    async def start(self, stage: int, seat: int) -> None:
        folder = self.directory.seat(stage, seat)
        folder.mkdir(parents=True, exist_ok=True)
        key = NodeKey.load_or_create(folder / "key")
        door, terms = Doorkeeper(self.address.peer, RunId(self.control.run_.spec.run_id)), self.store()
        transport = MemoryTransport(self.hub, key, gate=door.admit)
        board, compute = Switchboard(STATE_LIMIT), self.make_compute()
        worker = Worker(
            transport,
            board,
            key,
            compute,
            coordinator=self.address.peer,
            run=self.control.run_.spec.run_id,
            directory=folder,
            account=f"local-{stage}-{seat}",
            stage=stage,
            secret=stage_secret(self.spec, stage),
            reach=self._reach(stage, seat, self.plan.pop((stage, seat), set())),
            terms=terms,
        )
        door.watch(lambda: worker.state, transport.hang_up, self.book)
        mine = await transport.start(board.services())
        transport.learn(NodeAddr(self.address.peer, self.address.addresses))
        task = asyncio.create_task(worker.run(mine.addresses))
        self.workers[stage, seat] = TwinWorker(worker, transport, task, compute)

    def hub_address(self, node: Transport) -> NodeAddr:
        """Where a node of this league can be dialled."""
        where = next(address for address, member in self.hub.members.items() if member.me == node.me)
        return NodeAddr(node.me, (where,))

    def _reach(self, stage: int, seat: int, planned: set[tuple[Point, int]]) -> Reach:
        def reach(point: Point, step: int) -> None:
            if not any(point is at and step >= since for at, since in planned):
                return
            planned.clear()
            self.workers[stage, seat].transport.kill()  # from here on nothing it says is heard
            self.deaths.append(asyncio.ensure_future(self._die(stage, seat)))

        return reach

    async def _die(self, stage: int, seat: int) -> None:
        await self.kill(stage, seat)
        if self.restarts:
            await asyncio.sleep(0.3)
            await self.start(stage, seat)

    async def kill(self, stage: int, seat: int, *, tell: bool = True) -> None:
        """SIGKILL: gone in the middle of whatever it does. `tell`: its host notices, as a process's parent would."""
        victim = self.workers.pop((stage, seat))
        victim.transport.kill()
        victim.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await victim.task
        if tell:
            self.control.coordinator.vanished(victim.transport.me, "killed")

    # --- standbys

    async def stand_by(self, number: int, folder: Path | None = None, coordinator: PeerId | None = None) -> None:
        """Start a standby, in a directory of its own or in one that is there."""
        directory = RunDir(folder or self.path / f"standby-{number}")
        key = NodeKey.load_or_create(directory.key)
        door = Doorkeeper(coordinator or self.address.peer, RunId(self.spec.run_id))
        transport, board = MemoryTransport(self.hub, key, gate=door.admit), Switchboard(STATE_LIMIT)
        mine = await transport.start(board.services())
        transport.learn(NodeAddr(self.address.peer, self.address.addresses))
        standby = Standby(
            transport,
            board,
            key,
            coordinator=coordinator or self.address.peer,
            run=self.spec.run_id,
            directory=directory,
            terms=self.store(),
            data=self.directory.data,
        )
        door.watch(lambda: standby.state, transport.hang_up, self.book)
        standby.follower.listen(lambda _event, _state: None)
        task = asyncio.create_task(self._stand_by(number, standby, mine.addresses))
        self.heirs[number] = TwinStandby(standby, transport, task)

    async def _stand_by(self, number: int, standby: Standby, addresses: tuple[str, ...]) -> None:
        control = await standby.run(addresses)
        if control is None:
            return
        self.heirs.pop(number)
        self.control = control
        self.address = NodeAddr(standby._transport.me, addresses)
        self.events.clear()
        self.events.extend(control.run_.log.events())
        control.follower.listen(self._note)
        self.succeeded.append(asyncio.get_running_loop().time())

    def _note(self, event: ev.Event, state: RunState) -> None:
        self.events.append(event)

    async def kill_coordinator(self) -> Control:
        """SIGKILL of the control process. Its log stays on the disk."""
        gone = self.control
        gone.transport.kill()
        for task in gone._tasks:
            task.cancel()
        for task in list(gone.trainer._tasks):
            task.cancel()
        gone.coordinator._publisher.close()
        await asyncio.gather(*gone._tasks, return_exceptions=True)
        gone.run_.log.close()
        return gone

    async def kill_standby(self, number: int) -> None:
        victim = self.heirs.pop(number)
        victim.transport.kill()
        victim.task.cancel()
        await asyncio.gather(victim.task, return_exceptions=True)
        victim.standby.close()

    async def until(self, holds) -> None:
        while not holds(self.state):
            for one in self.workers.values():
                if one.task.done():
                    one.task.result()
            await asyncio.sleep(0.01)

    async def ready(self) -> None:
        """Until every seat is ready."""
        wanted = self.spec.league.replicas
        await self.until(lambda s: all(len(s.seats_of(st.index, SeatStatus.READY)) >= wanted for st in s.stages))

    async def trained(self) -> RunState:
        """Until the run has ended, whoever coordinates it then."""
        while self.standbys and self.state.phase is Phase.TRAINING:
            for heir in self.heirs.values():
                if heir.task.done():
                    heir.task.result()
            await asyncio.sleep(0.05)
        await self.control.ended()
        return self.state

    def losses(self) -> dict[int, float]:
        return {e.step: e.loss for e in self.events if isinstance(e, ev.StepMeasured)}


__all__ = ["TwinLeague", "TwinWorker", "sampling_seed"]
