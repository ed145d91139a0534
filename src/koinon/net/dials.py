"""Dials under way: one per peer and ALPN, shared by all who wait for it, and begun anew when the peer has moved.

Used by both carriers. Knows nothing of how a dial is made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from koinon.units import PeerId

T = TypeVar("T")


@dataclass(slots=True)
class _Dial(Generic[T]):
    task: asyncio.Task[T]
    is_stale: bool = False
    """The peer has other addresses than those being tried."""


class Dials(Generic[T]):
    """Shared dials. `dial` makes a connection or raises a PeerError."""

    def __init__(self, dial: Callable[[PeerId, str], Coroutine[Any, Any, T]]) -> None:
        self._dial = dial
        self._open: dict[tuple[PeerId, str], _Dial[T]] = {}

    async def join(self, peer: PeerId, alpn: str) -> T:
        """Wait for a connection. A caller that gives up leaves the dial to the others. Raises what the dial raises."""
        while True:
            dial = self._open.get((peer, alpn)) or self._begin(peer, alpn)
            try:
                return await asyncio.shield(dial.task)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not dial.is_stale or (task is not None and task.cancelling()):
                    raise

    def moved(self, peer: PeerId) -> None:
        """The peer is elsewhere: whoever waits for an answer from its old addresses dials anew, now."""
        for key in [key for key in self._open if key[0] == peer]:
            dial = self._open.pop(key)
            dial.is_stale = True
            dial.task.cancel()

    def cancel(self) -> list[asyncio.Task[T]]:
        """Give every dial up; returns the tasks that are ending."""
        tasks = [dial.task for dial in self._open.values()]
        for task in tasks:
            task.cancel()
        return tasks

    def _begin(self, peer: PeerId, alpn: str) -> _Dial[T]:
        dial = self._open[peer, alpn] = _Dial(asyncio.ensure_future(self._dial(peer, alpn)))
        dial.task.add_done_callback(lambda _done: self._end((peer, alpn), dial))
        return dial

    def _end(self, key: tuple[PeerId, str], dial: _Dial[T]) -> None:
        if self._open.get(key) is dial:
            del self._open[key]
        if not dial.task.cancelled():
            dial.task.exception()  # seen: every caller that waited got it, and there may be none left
