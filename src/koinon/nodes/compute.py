"""The one compute thread of a worker, seen from its event loop.

One job runs at a time; the loop decides which is next only when the thread is free, so a backward that arrives
meanwhile goes first. Knows nothing of what jobs do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
_Job = tuple[Callable[[], Any], asyncio.AbstractEventLoop, "asyncio.Future[Any]"]


class Compute(Protocol):
    """Runs one job after the other. `busy_seconds`: time spent in jobs since the start."""

    busy_seconds: float

    async def run(self, job: Callable[[], T]) -> T:
        """The job's result; its exception is raised here."""

    def close(self) -> None: ...


class ThreadCompute:
    """One thread, so torch and the event loop do not wait for each other.

    A step is some ninety jobs, so a job should cost little: an executor's two futures, lock and callbacks take 70
    microseconds of CPU more (measured on an idle loop).
    """

    def __init__(self) -> None:
        self.busy_seconds = 0.0
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name="compute", daemon=True)
        self._thread.start()

    async def run(self, job: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()
        self._jobs.put((job, loop, result))
        return await result

    def _work(self) -> None:
        while (order := self._jobs.get()) is not None:
            job, loop, result = order
            if result.cancelled():
                continue
            began = time.perf_counter()
            answer: Any
            tell: Callable[[asyncio.Future[Any], Any], None] = _succeed
            try:
                answer = job()
            except BaseException as error:  # whatever it is, it is the caller's
                answer, tell = error, _fail
            self.busy_seconds += time.perf_counter() - began
            if not loop.is_closed():
                loop.call_soon_threadsafe(tell, result, answer)
            del order, job, result, answer, tell  # nothing of a job is kept while waiting for the next

    def close(self) -> None:
        """Once the job under way has ended. What was not begun is never run."""
        self._drop_the_rest()
        self._jobs.put(None)
        self._thread.join()

    def _drop_the_rest(self) -> None:
        while not self._jobs.empty():
            self._jobs.get()


class InlineCompute:
    """Runs jobs in the loop's own thread: for simulated time, where a thread would wait for real time."""

    def __init__(self) -> None:
        self.busy_seconds = 0.0

    async def run(self, job: Callable[[], T]) -> T:
        await asyncio.sleep(0)
        return job()

    def close(self) -> None:
        pass


def _succeed(result: asyncio.Future[Any], answer: Any) -> None:
    if not result.done():
        result.set_result(answer)


def _fail(result: asyncio.Future[Any], error: BaseException) -> None:
    if not result.done():
        result.set_exception(error)
