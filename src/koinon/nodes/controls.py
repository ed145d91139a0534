"""The control processes of a league on one machine: one coordinates, the others stand by in directories of their own.

Whichever ends before it is told to is started again, as a standby in the same directory.
Knows nothing of workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from koinon.errors import StateError
from koinon.net.identity import NodeKey
from koinon.net.transport import NodeAddr
from koinon.nodes.controlling import ControlOptions
from koinon.nodes.rundir import RunDir
from koinon.run.termfile import FileTermStore
from koinon.run.terms import Term
from koinon.units import PeerId, RunId, Seconds

CLOSING = Seconds(10.0)
RESTART_PAUSE = Seconds(1.0)


class Controls:
    """directories: the first one holds the run and coordinates to begin with."""

    def __init__(self, run: RunId, directories: tuple[RunDir, ...], *, trains: bool, bind: str) -> None:
        self.store = FileTermStore(directories[0].path / "terms", run)
        self._run, self._directories, self._trains, self._bind = run, directories, trains, bind
        self._processes: dict[PeerId, asyncio.subprocess.Process] = {}
        self._begun: list[asyncio.subprocess.Process] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    async def start(self, resume_step: int | None) -> NodeAddr:
        """Returns where the first coordinator is. Raises StateError if it does not come up."""
        first, *others = self._directories
        address = await self._spawn(first, None, resume_step)
        for directory in others:
            await self._spawn(directory, address)
        return address

    @property
    def pids(self) -> Mapping[PeerId, int]:
        return {peer: process.pid for peer, process in self._processes.items()}

    def current(self) -> Term:
        """Whose term it is."""
        term = self.store.read().current
        assert term is not None, "the first coordinator took one before it said where it is"
        return term

    def kill_coordinator(self, how: signal.Signals = signal.SIGKILL) -> PeerId:
        """Send the process that holds the term a signal. Raises StateError if it is not one of ours, or gone."""
        holder = PeerId(self.current().holder)
        process = self._processes.get(holder)
        if process is None or process.returncode is not None:
            raise StateError("No process of this machine coordinates the run just now: wait for a successor.")
        process.send_signal(how)
        return holder

    async def close(self) -> None:
        """End them in order. Returns when they are gone."""
        self._closing = True
        for process in self._begun:
            if process.stdin is not None:
                process.stdin.close()
        for process in self._begun:
            try:
                async with asyncio.timeout(CLOSING.value):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
        for task in self._tasks:
            task.cancel()

    async def _spawn(self, directory: RunDir, leader: NodeAddr | None, resume_step: int | None = None) -> NodeAddr:
        options = ControlOptions(
            directory=str(directory.path),
            run=self._run,
            terms=str(self.store.path),
            coordinator="" if leader is None else leader.peer,
            coordinator_addresses=() if leader is None else leader.addresses,
            data=str(self._directories[0].data),
            resume_step=resume_step,
            bind=self._bind if leader is None else "127.0.0.1:0",
            trains=self._trains,
            lingers=True,
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "koinon.nodes.controlling",
            msgspec.json.encode(options).decode(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        self._begun = [one for one in self._begun if one.returncode is None] + [process]
        assert process.stdout is not None and process.stdin is not None
        if self._closing:
            process.stdin.close()
        line = await process.stdout.readline()
        if not line:
            await process.wait()
            raise StateError(f"A control process did not come up: {Path(options.directory) / 'control.log'} says why.")
        said = json.loads(line)
        address = NodeAddr(PeerId(said["peer"]), tuple(said["addresses"]))
        self._processes[address.peer] = process
        task = asyncio.create_task(self._replace(directory, process))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return address

    async def _replace(self, directory: RunDir, process: asyncio.subprocess.Process) -> None:
        """When it has ended: let another stand by in its directory."""
        await process.wait()
        if self._closing or process.returncode == 0:
            return
        me = NodeKey.load_or_create(directory.key).peer_id
        while (term := self.current()).holder == me and not self._closing:
            await asyncio.sleep(RESTART_PAUSE.value)  # nobody has succeeded it yet
        if not self._closing:
            with contextlib.suppress(StateError):  # its log says why; the others go on
                await self._spawn(directory, NodeAddr(PeerId(term.holder), term.addresses))
