"""Starts worker processes on this machine through a zygote, and says when one has ended.

Knows nothing of runs: who is started again, and when, is the caller's business.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from koinon.errors import StateError
from koinon.nodes.process import WorkerOptions

Ended = Callable[[int, int], None]


class Host:
    """A zygote and its workers. `ended(number, status)` is called for each worker that ends; negative: a signal."""

    def __init__(self, ended: Ended, died: Callable[[], None], environment: Mapping[str, str] | None = None) -> None:
        """died: called if the zygote itself ends before it is told to. environment: variables beside our own."""
        self._died, self._closing = died, False
        self._environment = dict(environment or {})
        self.pids: dict[int, int] = {}
        self._ended = ended
        self._zygote: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()

    async def start(self) -> None:
        """Begin loading; `spawn` may be called at once."""
        environment = {"OMP_NUM_THREADS": "1", **os.environ, **self._environment}
        self._zygote = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "koinon.nodes.zygote",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C in a terminal reaches the caller alone, who then ends us in order
        )
        self._reader = asyncio.create_task(self._read(), name="zygote")

    async def ready(self) -> None:
        """Until workers can be forked."""
        await self._ready.wait()

    def spawn(self, number: int, options: WorkerOptions) -> None:
        """Start a worker; `number` names it in `pids` and `ended`."""
        if self._zygote is None or self._zygote.stdin is None:
            raise StateError("The host of the workers is not running.")
        order = {"spawn": number, "options": msgspec.to_builtins(options)}
        self._zygote.stdin.write(json.dumps(order).encode() + b"\n")

    def kill(self, number: int, how: signal.Signals = signal.SIGKILL) -> bool:
        """Send a worker a signal; False if it is not running."""
        pid = self.pids.get(number)
        if pid is None:
            return False
        try:
            os.kill(pid, how)
        except ProcessLookupError:
            return False
        return True

    async def close(self) -> None:
        """End all workers, then the zygote. Returns when they are gone."""
        self._closing = True
        if self._zygote is None:
            return
        if self._zygote.stdin is not None:
            self._zygote.stdin.close()
        await self._zygote.wait()
        if self._reader is not None:
            await self._reader

    async def _read(self) -> None:
        assert self._zygote is not None
        assert self._zygote.stdout is not None
        async for line in self._zygote.stdout:
            self._hear(json.loads(line))
        self._ready.set()
        if not self._closing:
            self._died()

    def _hear(self, message: dict[str, Any]) -> None:
        if "started" in message:
            self.pids[message["started"]] = message["pid"]
        elif "ended" in message:
            self.pids.pop(message["ended"], None)
            self._ended(message["ended"], message["status"])
        else:
            self._ready.set()
