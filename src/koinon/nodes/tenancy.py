"""A worker process that joins a run from anywhere, and its folder: started, watched, told to leave.

    key              node key (0600): the same key takes the same seat again
    invitation       by which it came
    at-work          locked by the process that is at work here, whose number it holds
    worker.log, step-*.safetensors

The lock goes when its process does, however that ends, so no number in a file is ever believed after that.
Knows nothing of checks or terminals.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import gc
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from koinon.errors import InvitationError, OtherRun, SeatInUse, UserError
from koinon.net.identity import NodeKey
from koinon.net.invitation import Invitation, read
from koinon.nodes.process import WorkerOptions
from koinon.nodes.report import Report
from koinon.units import Seconds

LEAVING = Seconds(20.0)
"""How long `leave` waits for the other process to end."""
ENDING = Seconds(15.0)
"""How long the worker process may take to say goodbye, before it is ended without one."""
FREED_TRIES = 50
"""At 0.1 s each."""


@dataclass(frozen=True, slots=True)
class Tenancy:
    """A joiner's folder."""

    path: Path

    @property
    def invitation(self) -> Path:
        return self.path / "invitation"

    @property
    def lock(self) -> Path:
        return self.path / "at-work"

    def key(self) -> NodeKey:
        """Raises KeyUnsafe."""
        return NodeKey.load_or_create(self.path / "key")

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Inside, this process alone works here. Raises SeatInUse."""
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if not _locked(handle):
                raise SeatInUse(str(self.path), _number(handle))
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
            yield
            os.ftruncate(handle, 0)
        finally:
            os.close(handle)

    def keep(self, invitation: Invitation) -> None:
        """Remember by which invitation this machine came. Raises OtherRun if the folder is of another run."""
        with suppress(FileNotFoundError, InvitationError):
            before = read(self.invitation.read_text(encoding="utf-8"))
            if before.run != invitation.run:
                raise OtherRun(
                    f"{self.path} is this machine's seat in run {before.run[:10]}, and the invitation is to run "
                    f"{invitation.run[:10]}. Join with another --dir."
                )
        draft = self.invitation.with_suffix(".draft")
        draft.write_text(f"{invitation.text}\n", encoding="utf-8")
        draft.replace(self.invitation)

    def leave(self) -> bool:
        """Tell the process that is at work here to leave, and wait until it has. False: nobody was.

        Raises UserError if it does not end.
        """
        try:
            handle = os.open(self.lock, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            if _locked(handle):
                return False
            number = _number(handle)
            if number is None:
                raise UserError(f"A process is just beginning in {self.path}: try again.")
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGTERM)
            until = time.monotonic() + LEAVING.value
            while not _locked(handle):
                if time.monotonic() > until:
                    raise UserError(f"Process {number} was told to leave {LEAVING} ago, and is still there.")
                time.sleep(0.1)
        finally:
            os.close(handle)
        return True


@dataclass(frozen=True, slots=True)
class Ended:
    """How a worker process ended. `status`: negative for a signal. `last`: what it said last."""

    status: int
    last: Report


class Tenant:
    """One worker process, from its start to its end. `hear` gets what it reports."""

    def __init__(self, options: WorkerOptions, hear: Callable[[Report], None]) -> None:
        self._options, self._hear = options, hear
        self._process: asyncio.subprocess.Process | None = None

    async def run(self) -> Ended:
        """Until it has ended. Cancelled, it tells the process to leave, and waits for that."""
        last = Report("joining")
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "koinon.nodes.tenancy",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": str(self._options.threads)},
            start_new_session=True,  # Ctrl-C is ours, who then tell it to leave
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(msgspec.json.encode(self._options))
        process.stdin.close()
        try:
            async for line in process.stdout:
                last = msgspec.json.decode(line, type=Report)
                self._hear(last)
            return Ended(await process.wait(), last)
        except asyncio.CancelledError:
            self.leave()
            try:
                async with asyncio.timeout(ENDING.value):
                    await process.wait()
            except TimeoutError:
                process.kill()
            raise

    def leave(self) -> None:
        """Tell it to say goodbye and end."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.terminate()


async def freed(bind: str) -> None:
    """Until nobody in this process holds that address any more, or some seconds have passed in vain.

    The network library frees a socket with the last reference to anything that used it, some time after it was closed.
    """
    host, _, port = bind.rpartition(":")
    for _ in range(FREED_TRIES):
        gc.collect()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            probe.bind((host, int(port)))
            return
        await asyncio.sleep(0.1)


def _locked(handle: int) -> bool:
    """Whether the lock is ours now."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return False
    return True


def _number(handle: int) -> int | None:
    text = os.pread(handle, 32, 0).strip()
    return int(text) if text.isdigit() else None


def main() -> int:
    """The worker process: options on standard input, reports on standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from koinon.nodes import process

    ours = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no report

    def tell(report: Report) -> None:
        with suppress(BrokenPipeError):  # nobody watches any more; the worker notices it by itself
            os.write(ours, msgspec.json.encode(report) + b"\n")

    return process.main(json.load(sys.stdin), tell)


if __name__ == "__main__":
    os._exit(main())  # what threads of libraries still wait for is nobody's business
