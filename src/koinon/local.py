"""The whole league on one machine, from Python.

    from koinon import LocalSwarm

    with LocalSwarm("demo", "runs/mine") as swarm:
        for event in swarm.events():
            print(event)
        print(swarm.sample("def ", tokens=40))

One control process (this one, which loads no torch) and one process per seat, forked from a zygote. A worker that ends
is replaced by a fresh process in the same seat. `League` is the asyncio form of the same thing.
Knows nothing of terminals.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import signal
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from koinon.data.tokenizer import END
from koinon.errors import KoinonError, StateError, UserError
from koinon.net.identity import NodeKey
from koinon.net.transport import NodeAddr
from koinon.nodes.control import (
    Control,
    OpenRun,
    Progress,
    create,
    reopen,
    resume_point,
    resume_point_elsewhere,
    stage_secret,
)
from koinon.nodes.controls import Controls
from koinon.nodes.doorkeeper import Doorkeeper
from koinon.nodes.host import Host
from koinon.nodes.messages import Telemetry
from koinon.nodes.onlooker import Onlooker
from koinon.nodes.process import STATE_LIMIT, WorkerOptions
from koinon.nodes.rundir import RunDir
from koinon.nodes.switchboard import Switchboard
from koinon.run import events as ev
from koinon.run.events import Member
from koinon.run.spec import RunSpec, recipes
from koinon.run.state import Phase, RunState, SeatStatus
from koinon.units import PeerId, RunId

T = TypeVar("T")
_Kind = tuple[tuple[str, str], ...]
"""Environment variables of a process, beside ours."""
CRASHES_ALLOWED = 5
"""Times in a row that a seat's process may end without having been ready, before the run fails."""


def _quiet(_what: str, _done: int, _total: int) -> None:
    """No progress is shown."""


class Seat:
    """A seat that this machine fills."""

    def __init__(self, number: int, stage: int, seat: int, folder: Path) -> None:
        self.number, self.stage, self.seat, self.folder = number, stage, seat, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.worker: PeerId = NodeKey.load_or_create(folder / "key").peer_id
        self.crashes = 0
        self.wanted = True


class League:
    """A league on this machine, for callers that run an event loop. Use as an async context manager.

    spec: a RunSpec, a path to one, or the name of a recipe. directory: where the run lies or shall lie.
    resume: go on with the run in `directory`; its own spec is used. trains: False only serves samples.
    standbys: processes that stand by to coordinate. With any, the coordinator is a process of its own, too, and may
    be killed (`kill_coordinator`); this one only looks on, knows no telemetry and draws no samples. All workers must be
    of this machine then.
    port: UDP port of the control process, 0 for any free one. host: where it listens; off this machine's loopback, it
    takes workers from elsewhere, who are told `advertise` if that is not where it listens.
    workers: processes on this machine, `replicas` of every stage if not given; 0 leaves all seats to others.
    Raises on entry: SpecError, RunExists, NotARun, DataError, PortInUse, LogCorrupt, NothingToResume.
    """

    def __init__(
        self,
        spec: RunSpec | str | Path | None,
        directory: str | Path,
        *,
        resume: bool = False,
        trains: bool = True,
        replicas: int | None = None,
        standbys: int = 0,
        port: int = 0,
        host: str = "127.0.0.1",
        advertise: Sequence[str] = (),
        workers: int | None = None,
        progress: Progress = _quiet,
        faults: Mapping[tuple[int, int], tuple[tuple[str, int], ...]] | None = None,
        environments: Mapping[tuple[int, int], Mapping[str, str]] | None = None,
    ) -> None:
        """faults: (stage, seat) -> points and steps at which that seat's first process kills itself, for tests.
        environments: (stage, seat) -> variables for that seat's processes, which torch may read as it is loaded."""
        self._faults = dict(faults or {})
        self.directory = RunDir(Path(directory))
        self._given, self._resumes, self._trains, self._replicas = spec, resume, trains, replicas
        self._bind, self._advertise, self._workers, self._progress = f"{host}:{port}", advertise, workers, progress
        self._standbys = standbys
        if standbys and (workers is not None or host not in ("127.0.0.1", "localhost", "::1")):
            raise UserError(
                "Standbys and workers from elsewhere do not go together yet: which standby has succeeded is told by a "
                "file that only processes of this machine read. Leave out `standbys`, or `host` and `workers`."
            )
        self._listeners: list[Callable[[ev.Event, RunState], None]] = []
        self._seats: dict[int, Seat] = {}
        self._respawns: set[asyncio.Task[None]] = set()
        # What is forked has its zygote's environment: a seat that wants another has another zygote.
        self._hosts: dict[_Kind, Host] = {(): Host(self._on_ended, self._on_host_died)}
        self._kinds = {place: tuple(sorted(kind.items())) for place, kind in (environments or {}).items()}
        for kind in set(self._kinds.values()) - set(self._hosts):
            self._hosts[kind] = Host(self._on_ended, self._on_host_died, dict(kind))
        self._address: NodeAddr | None = None
        self._closing = False
        self._run: OpenRun | None = None
        self._control: Control | None = None
        self._controls: Controls | None = None
        self._onlooker: Onlooker | None = None

    # --- what it shows

    @property
    def spec(self) -> RunSpec:
        return self._opened().spec

    @property
    def state(self) -> RunState:
        return self._onlooker.state if self._onlooker is not None else self._controlled().coordinator.state

    @property
    def telemetry(self) -> dict[Member, Telemetry]:
        """What each member told of itself last. For people."""
        return {} if self._onlooker is not None else dict(self._controlled().coordinator.telemetry)

    @property
    def address(self) -> NodeAddr:
        """Where the control process can be reached."""
        if self._address is None:
            raise StateError("The league has not been started: use it as a context manager.")
        return self._address

    @property
    def key(self) -> NodeKey:
        """The coordinator's."""
        return self._opened().key

    def is_mine(self, worker: str) -> bool:
        """Whether that worker's process runs on this machine, started by this league."""
        return any(seat.worker == worker for seat in self._seats.values())

    @property
    def control(self) -> Control:
        return self._controlled()

    def listen(self, listener: Callable[[ev.Event, RunState], None]) -> None:
        """Hear every event of the log, from the first on, after it was folded."""
        self._listeners.append(listener)

    # --- life

    async def __aenter__(self) -> Self:
        try:
            for host in self._hosts.values() if self._workers != 0 else ():
                await host.start()  # torch loads while the data is prepared
            self._run = await asyncio.to_thread(self._open)
            await self._begin(self._run)
        except BaseException:
            await self.close("it could not start")
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close("the caller closed it" if kind is None else f"the caller ended with {kind.__name__}")

    def _open(self) -> OpenRun:
        if self._resumes:
            return reopen(self.directory)
        return create(spec_of(self._given), self.directory, self._progress)

    async def _begin(self, run: OpenRun) -> None:
        from koinon.net.iroh_transport import IrohTransport

        if self._standbys:
            await self._begin_apart(run)
            return
        board = Switchboard(STATE_LIMIT)
        door = Doorkeeper(run.key.peer_id, RunId(run.spec.run_id))
        transport = IrohTransport(
            run.key, bind=self._bind, advertise=self._advertise, gate=door.admit, knows=door.knows
        )
        elsewhere = self._any_port()
        self._control = control = Control(
            run,
            transport,
            board,
            trains=self._trains,
            dialler=lambda: IrohTransport(NodeKey.generate(), bind=elsewhere),
        )
        door.watch(lambda: control.coordinator.state, transport.hang_up)
        for listener in self._listeners:
            control.follower.listen(listener)
        if self._resumes:
            # Reads and hashes snapshots, so it is done before anybody waits for us, and in a process that has torch.
            control.resume(await self._resume_step(run))
        self._address = await control.start()
        self._fill_seats(run.spec)

    async def _begin_apart(self, run: OpenRun) -> None:
        """The same, with the coordinator and its standbys in processes of their own."""
        step = await self._resume_step(run) if self._resumes else None
        run.log.close()  # the coordinator's process writes it
        folders = (self.directory, *(self.directory.standby(number) for number in range(self._standbys)))
        self._controls = controls = Controls(run.spec.run_id, folders, trains=self._trains, bind=self._bind)
        self._address = await controls.start(step)
        self._onlooker = Onlooker(self._address, run.spec.run_id, controls.store, self._listeners)
        await self._onlooker.start()
        self._fill_seats(run.spec)

    def _fill_seats(self, spec: RunSpec) -> None:
        for number, (stage, seat) in enumerate(self._places(spec)):
            self._seats[number] = Seat(number, stage, seat, self.directory.seat(stage, seat))
            self._spawn(self._seats[number])

    def _places(self, spec: RunSpec) -> Iterator[tuple[int, int]]:
        """(stage, seat) of every worker, first seats first: they found the stages."""
        replicas = self._replicas or spec.league.replicas
        places = ((stage, seat) for seat in range(replicas) for stage in range(spec.model.stages))
        return islice(places, self._workers)

    def _secret(self, stage: int) -> str | None:
        """On one machine a run can be repeated from its spec; among strangers, who all know the spec, it must not."""
        return stage_secret(self.spec, stage).hex() if self._workers is None else None

    def _any_port(self) -> str:
        """Where the other nodes of this machine listen."""
        return f"{self._bind.rpartition(':')[0]}:0"

    async def _resume_step(self, run: OpenRun) -> int:
        """The newest step that every stage has. Where workers are elsewhere, so are their snapshots."""
        if self._workers is not None:
            return resume_point_elsewhere(run.state, run.spec.train.snapshot_every)
        return await _resume_step(self.directory, run.state)

    def _spawn(self, seat: Seat) -> None:
        assert self._address is not None
        options = WorkerOptions(
            directory=str(seat.folder),
            run=self.spec.run_id,
            coordinator=self._address.peer,
            coordinator_addresses=self._address.addresses,
            account=f"local-{seat.stage}-{seat.seat}",
            stage=seat.stage,
            secret=self._secret(seat.stage),
            bind=self._any_port(),
            faults=self._faults.pop((seat.stage, seat.seat), ()),
            terms=None if self._controls is None else str(self._controls.store.path),
        )
        self._host_of(seat).spawn(seat.number, options)

    def _host_of(self, seat: Seat) -> Host:
        return self._hosts[self._kinds.get((seat.stage, seat.seat), ())]

    def _on_ended(self, number: int, status: int) -> None:
        """A worker's process has ended: say so at once, and put a fresh one into its seat."""
        with contextlib.suppress(StateError):  # the coordinator keeps it in `failure`, and ends the run with it
            self._replace(number, status)

    def _replace(self, number: int, status: int) -> None:
        if self._closing or self._address is None or self.state.phase in (Phase.STOPPED, Phase.FAILED):
            return
        seat = self._seats[number]
        known = self.state.member_of(seat.worker)
        was_ready = known is not None and known.status is SeatStatus.READY
        seat.crashes = 0 if was_ready else seat.crashes + 1
        what = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        if self._control is not None:  # elsewhere its silence tells, or that the next process asks for the seat
            self._control.coordinator.vanished(seat.worker, f"its process {what}")
        if seat.crashes > CRASHES_ALLOWED:
            self._fail(
                f"The worker of stage {seat.stage}, seat {seat.seat} ended {seat.crashes} times before it "
                f"was ready. {seat.folder / 'worker.log'} says why; then resume."
            )
        elif seat.wanted:
            task = asyncio.create_task(self._respawn(seat))
            self._respawns.add(task)
            task.add_done_callback(self._respawns.discard)

    def _on_host_died(self) -> None:
        """The process that forks the workers is gone, and with it every worker of this machine."""
        if not self._closing and self._address is not None and self.state.phase is Phase.TRAINING:
            reason = (
                "The process that starts the workers has ended; its own error is printed above. Mend it, then resume."
            )
            with contextlib.suppress(StateError):
                self._fail(reason)

    def _fail(self, reason: str) -> None:
        """No worker of this machine will come any more."""
        if self._control is not None:
            self._control.coordinator.write(ev.RunFailed(reason))
        elif self._onlooker is not None:
            self._onlooker.give_up(StateError(reason))

    async def _respawn(self, seat: Seat) -> None:
        await asyncio.sleep(0.1 * 2**seat.crashes if seat.crashes else 0.0)
        if not self._closing:
            self._spawn(seat)

    async def finished(self) -> RunState:
        """Until the run is complete, stopped or failed. Raises StateError with the run's own sentence if it failed."""
        await (self._onlooker.ended() if self._onlooker is not None else self._controlled().ended())
        if self.state.phase is Phase.FAILED:
            raise StateError(self.state.reason)
        return self.state

    async def close(self, reason: str = "asked to stop") -> None:
        """Drain and stop; the directory can be resumed. Returns when every process is gone."""
        if self._closing:
            return
        self._closing = True
        for task in self._respawns:
            task.cancel()
        try:
            if self._control is not None:
                await self._control.drain(reason)
            if self._controls is not None:
                await self._controls.close()
        finally:
            for host in self._hosts.values():
                await host.close()  # workers say goodbye to a coordinator that still listens
            if self._control is not None:
                await self._control.close()
            elif self._run is not None:
                self._run.log.close()
            if self._onlooker is not None:
                await self._onlooker.close()

    # --- what can be done to it

    def kill(self, stage: int, seat: int, how: signal.Signals = signal.SIGKILL) -> bool:
        """Send the worker in that seat a signal. It is replaced; the run goes on."""
        found = next((s for s in self._seats.values() if (s.stage, s.seat) == (stage, seat)), None)
        return found is not None and self._host_of(found).kill(found.number, how)

    def kill_coordinator(self, how: signal.Signals = signal.SIGKILL) -> PeerId:
        """Send the process that coordinates a signal; a standby goes on. Raises StateError where there is none."""
        if self._controls is None:
            raise StateError("The coordinator is this very process: start the league with `standbys=1` to kill it.")
        return self._controls.kill_coordinator(how)

    async def sample(
        self, prompt: str, *, tokens: int = 100, temperature: float = 0.8, seed: int = 0
    ) -> AsyncIterator[str]:
        """Text after `prompt`, piece by piece, each token through all stages; ends early where a document would.

        Raises UserError for an empty prompt.
        """
        run, trainer = self._opened(), self._controlled().trainer
        tokenizer = run.dataset.tokenizer
        ids = tokenizer.encode(prompt)
        if not ids:
            raise UserError("The prompt is empty: give a text to continue.")
        stream = tokenizer.stream()
        for count in range(tokens):
            token = await trainer.sample(ids, temperature=temperature, seed=seed * 1_000_003 + count)
            if token == END:
                break
            ids.append(token)
            if text := stream.feed([token]):
                yield text
        if text := stream.rest():
            yield text

    def _opened(self) -> OpenRun:
        if self._run is None:
            raise StateError("The league has not been started: use it as a context manager.")
        return self._run

    def _controlled(self) -> Control:
        if self._control is None:
            raise StateError("The league has not been started: use it as a context manager.")
        return self._control


def spec_of(given: RunSpec | str | Path | None) -> RunSpec:
    """A spec as it is, from a file, or by the name of a recipe. Raises SpecError."""
    if isinstance(given, RunSpec):
        return given
    if isinstance(given, str) and given in recipes():
        return RunSpec.recipe(given)
    return RunSpec.load(given or "spec.toml")


async def _resume_step(directory: RunDir, state: RunState) -> int:
    from koinon.nodes.inventory import verified_snapshots

    return resume_point(state, await verified_snapshots(directory, state))


class LocalSwarm:
    """A league on this machine, for plain Python: `League` in a thread of its own. Same arguments and errors."""

    def __init__(
        self,
        spec: RunSpec | str | Path | None,
        directory: str | Path,
        *,
        resume: bool = False,
        trains: bool = True,
        replicas: int | None = None,
        standbys: int = 0,
        progress: Progress = _quiet,
        faults: Mapping[tuple[int, int], tuple[tuple[str, int], ...]] | None = None,
        environments: Mapping[tuple[int, int], Mapping[str, str]] | None = None,
    ) -> None:
        self._league = League(
            spec,
            directory,
            resume=resume,
            trains=trains,
            replicas=replicas,
            standbys=standbys,
            progress=progress,
            faults=faults,
            environments=environments,
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="koinon", daemon=True)
        self._events: queue.SimpleQueue[ev.Event | None] = queue.SimpleQueue()
        self._watcher: Future[None] | None = None

    @property
    def state(self) -> RunState:
        """The fold of the log so far."""
        return self._league.state

    @property
    def spec(self) -> RunSpec:
        return self._league.spec

    def __enter__(self) -> Self:
        self._thread.start()
        self._league.listen(lambda event, _state: self._events.put(event))
        try:
            self._call(self._league.__aenter__())
        except BaseException:
            self._stop_thread()
            raise
        self._watcher = asyncio.run_coroutine_threadsafe(self._watch(), self._loop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._watcher is not None:
                self._watcher.cancel()
            self._call(self._league.__aexit__(kind, error, trace))
        finally:
            self._stop_thread()

    def events(self) -> Iterator[ev.Event]:
        """Every event of the run's log from its first, as it happens; ends when training has ended."""
        while (event := self._events.get()) is not None:
            yield event
        self._events.put(None)  # whoever asks again is told the same

    def train(self) -> RunState:
        """Wait until training has ended. Raises StateError with the run's sentence if it failed."""
        for _ in self.events():
            pass
        return self._call(self._league.finished())

    def kill(self, stage: int, seat: int) -> bool:
        """kill -9 the worker in that seat. It is replaced; the run goes on."""
        return self._call(_now(lambda: self._league.kill(stage, seat)))

    def kill_coordinator(self) -> PeerId:
        """kill -9 the process that coordinates. A standby goes on."""
        return self._call(_now(self._league.kill_coordinator))

    def sample(self, prompt: str, *, tokens: int = 100, temperature: float = 0.8, seed: int = 0) -> str:
        """Text after `prompt`."""
        return "".join(self.stream(prompt, tokens=tokens, temperature=temperature, seed=seed))

    def stream(self, prompt: str, *, tokens: int = 100, temperature: float = 0.8, seed: int = 0) -> Iterator[str]:
        """The same, piece by piece."""
        pieces = self._league.sample(prompt, tokens=tokens, temperature=temperature, seed=seed)
        while True:
            try:
                yield self._call(_next(pieces))
            except StopAsyncIteration:
                return

    async def _watch(self) -> None:
        try:
            await self._league.finished()
        except KoinonError:
            pass  # `train` raises it again; here it only ends the events
        finally:
            self._events.put(None)

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _stop_thread(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _now(call: Callable[[], T]) -> T:
    return call()


async def _next(pieces: AsyncIterator[str]) -> str:
    return await anext(pieces)


__all__ = ["League", "LocalSwarm"]
