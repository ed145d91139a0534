"""Ctrl-C and SIGTERM: the first asks the work to end in order, the second ends the process at once.

Knows nothing of what the work is.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

from koinon.errors import KoinonError

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KoinonError):
    """The user asked to stop. `code` is the exit status that shells expect: 128 and the signal's number."""

    def __init__(self, asked: signal.Signals) -> None:
        self.asked = asked
        super().__init__("Stopped.")

    @property
    def code(self) -> int:
        return 128 + self.asked

    @property
    def reason(self) -> str:
        return "with Ctrl-C" if self.asked is signal.SIGINT else f"by {self.asked.name}"


class Stopping:
    """Signals during one piece of work. Use as a context manager within a running event loop.

    on_ask: called at the first signal. on_abort: called before the process ends at the second.
    """

    def __init__(self, on_ask: Callable[[], None], on_abort: Callable[[], None]) -> None:
        self._on_ask, self._on_abort = on_ask, on_abort
        self._asked: signal.Signals | None = None
        self._work: asyncio.Task[Any] | None = None

    def __enter__(self) -> Self:
        for each in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(each, self._heard, each)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(each)

    def check(self) -> None:
        """For work in other threads, which no event loop can cancel. Raises Stopped once the user has asked."""
        if self._asked is not None:
            raise Stopped(self._asked)

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`; at the first signal it is cancelled, and may take its time to end. Raises Stopped then."""
        self._work = task = asyncio.create_task(work)
        try:
            return await task
        except asyncio.CancelledError:
            self.check()
            raise

    def _heard(self, asked: signal.Signals) -> None:
        if self._asked is not None:
            self._on_abort()
            os._exit(128 + asked)  # no cleaning up: workers end by themselves when this process is gone
        self._asked = asked
        self._on_ask()
        if self._work is not None:
            self._work.cancel()
