"""The one compute thread of a worker, seen from its event loop.

One job runs at a time; the loop decides which is next only when the thread is free, so a backward that arrives
meanwhile goes first. Knows nothing of what jobs do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

T = TypeVar("T")


class Compute(Protocol):
    """Runs one job after the other. `busy_seconds`: time spent in jobs since the start."""

    busy_seconds: float

    async def run(self, job: Callable[[], T]) -> T:
        """The job's result; its exception is raised here."""

    def close(self) -> None: ...


class ThreadCompute:
    """One thread, so torch and the event loop do not wait for each other."""

    def __init__(self) -> None:
        self.busy_seconds = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compute")

    async def run(self, job: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._timed, job)

    def _timed(self, job: Callable[[], T]) -> T:
        began = time.perf_counter()
        try:
            return job()
        finally:
            self.busy_seconds += time.perf_counter() - began

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)


class InlineCompute:
    """Runs jobs in the loop's own thread: for simulated time, where a thread would wait for real time."""

    def __init__(self) -> None:
        self.busy_seconds = 0.0

    async def run(self, job: Callable[[], T]) -> T:
        await asyncio.sleep(0)
        return job()

    def close(self) -> None:
        pass
