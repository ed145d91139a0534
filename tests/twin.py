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
from koinon.nodes.switchboard import Switchboard
from koinon.nodes.worker import Worker
from koinon.run import events as ev
from koinon.run.spec import RunSpec
from koinon.run.state import RunState, SeatStatus
from koinon.units import RunId


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

    @property
    def state(self) -> RunState:
        return self.control.coordinator.state

    async def __aenter__(self) -> TwinLeague:
        self.hub = Hub(self.seed, self.faults)
        self.directory = RunDir(self.path)
        if not self.resume:
            shutil.copytree(_prepared(self.spec.data), self.directory.data)
        run = reopen(self.directory) if self.resume else create(self.spec, self.directory, lambda *_: None)
        door = Doorkeeper(run.key.peer_id, RunId(run.spec.run_id))
        transport = MemoryTransport(self.hub, run.key, gate=door.admit)
        self.control = Control(run, transport, board := Switchboard(STATE_LIMIT))
        door.watch(lambda: self.state, transport.hang_up)
        del board
        self.control.follower.listen(lambda event, _state: self.events.append(event))
        if self.resume:
            self.control.resume(resume_point(run.state, self.snapshots(run.state)))
        self.address = await self.control.start()
        for seat in range(self.spec.league.replicas):
            for stage in range(self.spec.model.stages):
                await self.start(stage, seat)
        return self

    async def __aexit__(self, *_: object) -> None:
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
        door = Doorkeeper(self.address.peer, RunId(self.control.run_.spec.run_id))
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
        )
        door.watch(lambda: worker.state, transport.hang_up)
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
        await self.control.ended()
        return self.state

    def losses(self) -> dict[int, float]:
        return {e.step: e.loss for e in self.events if isinstance(e, ev.StepMeasured)}


__all__ = ["TwinLeague", "TwinWorker", "sampling_seed"]
