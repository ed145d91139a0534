"""Fetching content from several sources at once, each chunk checked before it counts.

Every source has a few requests under way, so the faster is asked for more, and for what fewer sources have before what
all have. When nothing is left to ask for, a chunk that another source still owes is asked for again. A source that is
busy is asked again after the time it names. A source that sends wrong bytes, or does not answer, is left after
`MAX_FAULTS`. Knows nothing of who is a good source: the caller names them.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from koinon.errors import ChunkUnavailable, PeerError
from koinon.net.chunks import (
    BULK,
    ChunkGiven,
    ChunkLater,
    ChunkWanted,
    Manifest,
    ManifestGiven,
    ManifestWanted,
    Sink,
    decode_manifest,
    is_chunk,
)
from koinon.net.transport import Transport
from koinon.units import Bytes, PeerId

PARALLEL: Final = 2
"""Requests under way per source: one is on the wire while the other is being hashed."""
MAX_FAULTS: Final = 3
_MAX_ASKED: Final = 2
_LEAST_PAUSE: Final = 0.005


@dataclass(frozen=True, slots=True)
class Fault:
    """What a source did wrong, or did not do, about one chunk."""

    source: PeerId
    index: int
    reason: str


@dataclass(slots=True)
class Fetched:
    """What came from whom, and who failed at what. `wrong_by`: the senders of bytes that did not hash right."""

    nbytes: dict[PeerId, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    wrong_by: list[PeerId] = field(default_factory=list)


async def fetch_manifest(
    transport: Transport, sources: Sequence[PeerId], root: str, *, limit: Bytes, alpn: str = BULK
) -> Manifest:
    """The manifest with that root, from the first source that has it right. Raises ChunkUnavailable."""
    answers: dict[str, str] = {}
    for source in sources:
        try:
            reply = await transport.request(source, alpn, ManifestWanted(root))
            if isinstance(reply.header, ManifestGiven) and reply.body:
                return decode_manifest(reply.body, root, limit=limit)
            answers[source] = "does not have it"
        except PeerError as error:
            answers[source] = str(error)
    raise ChunkUnavailable(root, answers)


async def fetch(
    transport: Transport,
    sources: Sequence[PeerId],
    manifest: Manifest,
    sink: Sink,
    *,
    alpn: str = BULK,
    parallel: int = PARALLEL,
) -> Fetched:
    """Bring every chunk that the sink does not hold; what was written stays when this fails, and need not come again.

    Raises ChunkUnavailable when no source has a chunk right, and whatever the sink raises (DiskFull).
    """
    held = await asyncio.to_thread(sink.held)
    hunt = _Hunt(transport, manifest, sink, alpn, [i for i in range(len(manifest.chunks)) if i not in held])
    askers = {asyncio.ensure_future(hunt.ask(source)) for source in sources for _ in range(parallel)}
    try:
        await _until_found(hunt, askers)
    finally:
        for asker in askers:
            asker.cancel()  # it may wait for a second copy of the last chunk
        await asyncio.gather(*askers, return_exceptions=True)
    if hunt.missing:
        index = min(hunt.missing)
        raise ChunkUnavailable(manifest.chunks[index].digest.hex(), hunt.answers(index))
    return hunt.fetched


async def _until_found(hunt: _Hunt, askers: set[asyncio.Task[None]]) -> None:
    waiting = set(askers)
    while waiting and hunt.missing:
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for asker in done:
            asker.result()


class _Hunt:
    """The state that all askers of one fetch share."""

    def __init__(self, transport: Transport, manifest: Manifest, sink: Sink, alpn: str, missing: list[int]) -> None:
        self._transport, self._manifest, self._sink, self._alpn = transport, manifest, sink, alpn
        self.missing = set(missing)
        self.fetched = Fetched()
        self._asked: defaultdict[int, set[PeerId]] = defaultdict(set)
        self._failed: set[tuple[PeerId, int]] = set()
        self._faults: Counter[PeerId] = Counter()
        self._lacking: Counter[int] = Counter()
        self._changed = asyncio.Condition()

    async def ask(self, source: PeerId) -> None:
        """Chunk after chunk from one source, until nothing is left that it could give."""
        while self._faults[source] < MAX_FAULTS and (index := await self._next(source)) is not None:
            self._asked[index].add(source)
            pause = 0.0
            try:
                pause = await self._bring(source, index)
            except PeerError as error:
                self._fault(source, index, str(error))
            finally:
                self._asked[index].discard(source)
                async with self._changed:
                    self._changed.notify_all()
            if pause:
                await asyncio.sleep(pause)

    def answers(self, index: int) -> dict[str, str]:
        return {fault.source: fault.reason for fault in self.fetched.faults if fault.index == index}

    async def _next(self, source: PeerId) -> int | None:
        """A chunk that nobody is asked for; else one that another source owes; None when this source can do no more."""
        async with self._changed:
            while True:
                possible = [i for i in self.missing if (source, i) not in self._failed]
                if not possible:
                    return None
                free = [i for i in possible if source not in self._asked[i] and len(self._asked[i]) < _MAX_ASKED]
                if free:
                    return min(free, key=lambda i: (len(self._asked[i]), -self._lacking[i], i))
                await self._changed.wait()

    async def _bring(self, source: PeerId, index: int) -> float:
        """Ask for one chunk; returns the seconds for which this source wants to be left alone."""
        chunk = self._manifest.chunks[index]
        reply = await self._transport.request(source, self._alpn, ChunkWanted(chunk.digest))
        if isinstance(reply.header, ChunkLater):
            return max(_LEAST_PAUSE, reply.header.after_ms / 1e3)
        if not isinstance(reply.header, ChunkGiven) or not reply.body:
            self._lack(source, index, "does not have it")
            return 0.0
        if not await asyncio.to_thread(is_chunk, chunk, reply.body):
            self.fetched.wrong_by.append(source)
            self._fault(source, index, f"sent {len(reply.body)} bytes with another hash")
        elif index in self.missing:
            self._sink.write(index, reply.body)
            self.missing.discard(index)
            self.fetched.nbytes[source] = self.fetched.nbytes.get(source, 0) + len(reply.body)
        return 0.0

    def _fault(self, source: PeerId, index: int, reason: str) -> None:
        self._faults[source] += 1
        self._lack(source, index, reason)

    def _lack(self, source: PeerId, index: int, reason: str) -> None:
        self._failed.add((source, index))
        self._lacking[index] += 1
        self.fetched.faults.append(Fault(source, index, reason))
