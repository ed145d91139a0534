"""What a member gives to those who join its stage: a few recent steps as content, chunk by chunk, after its own work.

A step that somebody fetches is pinned by holding its tensors; at most `KEPT` are, the least asked for goes first, and
what nobody has asked for in a while is let go of. While the stage reduces, or when more than a share of the declared
uplink is used, a joiner is asked to come later: a newcomer must not slow training.
Knows nothing of who may ask.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from koinon.net.chunks import CHUNK, ChunkGiven, ChunkLater
from koinon.net.transport import Answer
from koinon.nodes.clock import loop_time
from koinon.nodes.content import Content
from koinon.units import BitsPerSecond, Seconds

KEPT = 2
"""Steps that are pinned at once: the one that is fetched, and the one before it or the next."""
ACTIVE = Seconds(1.0)
"""Whoever asks for any step is given one that somebody fetched within that time: two joiners then share one."""
IDLE = Seconds(60.0)
UPLINK_SHARE = 0.5
COURTESY = Seconds(2.0)
"""A reduce that takes longer waits for somebody, and no link is spared by waiting with it."""
LATER_MS = 50
READERS = 2


@dataclass(slots=True)
class _Pinned:
    content: Content
    used: float
    places: dict[bytes, int] = field(default_factory=dict)


class Offers:
    """The contents that this member gives at present."""

    def __init__(self, uplink: BitsPerSecond | None, *, clock: Callable[[], float] = loop_time) -> None:
        """uplink: as the run spec declares it; None: not limited."""
        self._uplink, self._clock = uplink, clock
        self._pinned: dict[int, _Pinned] = {}
        self._room = asyncio.Semaphore(READERS)
        self._free_at = 0.0
        self._reduce: object = None
        self._reduce_since = 0.0

    def active(self, newer_than: int) -> Content | None:
        """What somebody fetches just now, if it is newer than that."""
        now = self._clock()
        busy = [p for p in self._pinned.values() if now - p.used < ACTIVE.value and p.content.step > newer_than]
        return max(busy, key=lambda p: p.content.step).content if busy else None

    def pinned(self, step: int) -> Content | None:
        return self._pinned[step].content if step in self._pinned else None

    def pin(self, content: Content) -> None:
        places = {chunk.digest: index for index, chunk in enumerate(content.manifest.chunks)}
        self._pinned[content.step] = _Pinned(content, self._clock(), places)
        while len(self._pinned) > KEPT:
            del self._pinned[min(self._pinned, key=lambda step: self._pinned[step].used)]

    def tidy(self) -> None:
        """Let go of what nobody asks for any more."""
        now = self._clock()
        for step in [step for step, pinned in self._pinned.items() if now - pinned.used > IDLE.value]:
            del self._pinned[step]

    async def chunk(self, digest: bytes, reduce: object) -> Answer:
        """The answer to a wish for a chunk. `reduce`: the reduce that is open in the stage, None if there is none."""
        found = next((p for p in reversed(self._pinned.values()) if digest in p.places), None)
        if found is None:
            return ChunkGiven(0), b""
        found.used = self._clock()
        if (wait := self._wait(reduce)) > 0:
            return ChunkLater(min(60_000, 1 + int(1e3 * wait)))
        content = found.content
        offset, nbytes = content.manifest.span(found.places[digest])
        async with self._room:
            data = await asyncio.to_thread(content.read, offset, nbytes)
        return ChunkGiven(len(data)), data

    def _wait(self, reduce: object) -> float:
        """Seconds until a chunk may be sent; 0 counts it as sent."""
        now = self._clock()
        if reduce != self._reduce:
            self._reduce, self._reduce_since = reduce, now
        if reduce is not None and now - self._reduce_since < COURTESY.value:
            return LATER_MS / 1e3
        if self._uplink is None:
            return 0.0
        if self._free_at > now:
            return self._free_at - now
        self._free_at = now + 8 * CHUNK / (UPLINK_SHARE * self._uplink.value)
        return 0.0
