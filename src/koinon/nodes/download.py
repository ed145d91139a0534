"""Fetching a stage's state from all replicas that have it, into a file that outlives the process.

Members are asked what they can give; what most of them agree on, and the log does not contradict, is fetched from all
of those at once. Weights count only once they hash to their root; whoever vouched for others is not asked again.
After a crash, or when the last source of a step is gone, the chunks in the file count for any step that shares them.
Knows nothing of engines.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from koinon.errors import ChunkUnavailable, FrameError, PeerError, room
from koinon.model.snapshot import root
from koinon.net.chunks import CHUNK, FileSink, Manifest, decode_manifest
from koinon.net.fetch import fetch
from koinon.net.frames import Buffer
from koinon.net.transport import Transport
from koinon.nodes import messages as m
from koinon.nodes.clock import loop_time
from koinon.nodes.content import FROZEN, WEIGHTS, Content, check, read_tensors, under
from koinon.units import Bytes, PeerId

log = logging.getLogger(__name__)
CONTENT_LIMIT = Bytes.gib(64)
KnownRoot = Callable[[int], str | None]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a fetch is. `rate`: bytes per second since it began, 0 before anything came."""

    done: int
    total: int
    rate: float = 0.0

    @property
    def seconds_left(self) -> float | None:
        return (self.total - self.done) / self.rate if self.rate else None


@dataclass(frozen=True, slots=True)
class Brought:
    """A stage's state as it came. `took`: seconds; `fetched`: bytes that had to come for it."""

    step: int
    root: str
    frozen: dict[str, Tensor]
    weights: dict[str, Tensor]
    took: float
    fetched: int


@dataclass(frozen=True, slots=True)
class _Offer:
    step: int
    root: str
    manifest: Manifest
    sources: tuple[PeerId, ...]


class Download:
    """Fetches into `directory`; one fetch at a time. `report` hears of progress, and None at the end."""

    def __init__(self, transport: Transport, directory: Path, report: Callable[[Progress | None], None]) -> None:
        self._transport, self._directory, self._report = transport, directory, report
        self._distrusted: set[PeerId] = set()
        self.wrong_by: list[PeerId] = []
        """Who sent chunks or vouched for weights that were not what they said."""

    async def bring(
        self,
        stage: int,
        sources: Sequence[PeerId],
        known: KnownRoot,
        *,
        step: int | None = None,
        newer_than: int = -1,
        seed: Content | None = None,
    ) -> Brought | None:
        """The state of `step`, or of the newest that is offered; None if nobody offers it.

        known: the log's root of a step, as far as it goes back. seed: content that is here, which may share chunks.
        Raises PeerError (try again, with other sources: what came is kept) and DiskFull.
        """
        sources = [source for source in sources if source not in self._distrusted]
        offer = await self._best(stage, sources, known, step, newer_than)
        if offer is None:
            return None
        path = await asyncio.to_thread(self._prepare, offer, seed)
        began = loop_time()
        sink = _Counted(FileSink(path, offer.manifest), self._report)
        try:
            fetched = await fetch(self._transport, offer.sources, offer.manifest, sink, alpn=m.BULK)
        finally:
            self._report(None)
        for source in dict.fromkeys(fetched.wrong_by):
            log.warning("%s sent chunks of stage %s with other bytes than it had promised", source[:10], stage)
        self.wrong_by += fetched.wrong_by
        took = loop_time() - began
        tensors = await asyncio.to_thread(read_tensors, path, offer.manifest.entries)
        frozen, weights = under(tensors, FROZEN), under(tensors, WEIGHTS)
        if await asyncio.to_thread(root, weights) != offer.root:
            path.unlink(missing_ok=True)
            self._distrust(offer.sources, f"weights of stage {stage} at step {offer.step} under a false root")
            raise ChunkUnavailable(offer.root, dict.fromkeys(offer.sources, "its weights do not hash to their root"))
        return Brought(offer.step, offer.root, frozen, weights, took, sum(fetched.nbytes.values()))

    def forget(self) -> None:
        """Remove what was fetched: it has been written down elsewhere."""
        for path in self._partials():
            path.unlink(missing_ok=True)

    async def _best(
        self, stage: int, sources: Sequence[PeerId], known: KnownRoot, step: int | None, newer_than: int
    ) -> _Offer | None:
        if step is None and (begun := self._begun()) is not None and begun > newer_than:
            offers = await self._ask(stage, sources, known, begun, newer_than)
            if offers:  # somebody still gives the step that a former life of this node began to fetch
                return _agreed(offers)
        offers = await self._ask(stage, sources, known, step, newer_than)
        if not offers:
            return None
        newest = max(offer.step for offer in offers)
        asked = {source for offer in offers if offer.step == newest for source in offer.sources}
        others = [source for source in sources if source not in asked]
        if step is None and others:
            offers += await self._ask(stage, others, known, newest, newer_than)
        return _agreed([offer for offer in offers if offer.step == newest])

    async def _ask(
        self, stage: int, sources: Iterable[PeerId], known: KnownRoot, step: int | None, newer_than: int
    ) -> list[_Offer]:
        wish = m.ContentWanted(stage, step, newer_than)
        answers = await asyncio.gather(*(self._offer(source, wish, known) for source in sources))
        return [offer for offer in answers if offer is not None]

    async def _offer(self, source: PeerId, wish: m.ContentWanted, known: KnownRoot) -> _Offer | None:
        """What one member says it can give; None if it is nothing, or nothing that can be true."""
        try:
            reply = await self._transport.request(source, m.BULK, wish)
            said = reply.header
            if not isinstance(said, m.ContentOffered) or not reply.body:
                return None
            if said.step <= wish.newer_than or (wish.step is not None and said.step != wish.step):
                return None
            if known(said.step) not in (None, said.root):
                self._distrust([source], f"a root of step {said.step} that is not the log's")
                return None
            manifest = decode_manifest(reply.body, said.manifest, limit=CONTENT_LIMIT)
            check(manifest.entries, manifest.nbytes)
        except FrameError as error:
            self._distrust([source], str(error))
        except PeerError as error:
            log.info("%s gave no state: %s", source[:10], error)
        else:
            return _Offer(said.step, said.root, manifest, (source,))
        return None

    def _distrust(self, sources: Iterable[PeerId], why: str) -> None:
        for source in sources:
            log.warning("%s vouched for what is not so (%s): it is not asked again", source[:10], why)
            self._distrusted.add(source)
            self.wrong_by.append(source)

    # --- the file

    def _partials(self) -> list[Path]:
        return sorted(self._directory.glob("fetch-*.partial"))

    def _begun(self) -> int | None:
        """The step that a fetch was begun for, by this process or by one before it."""
        steps = [path.stem.removeprefix("fetch-") for path in self._partials()]
        return max((int(step) for step in steps if step.isdigit()), default=None)

    def _prepare(self, offer: _Offer, seed: Content | None) -> Path:
        """The file to fetch into, with whatever is here already in it. The sink hashes what it finds."""
        path = self._directory / f"fetch-{offer.step:08d}.partial"
        before = [other for other in self._partials() if other != path]
        with room(path):
            if not path.exists() and before:
                before.pop().rename(path)
            elif not path.exists() and seed is not None:
                with path.open("wb") as file:
                    for start in range(0, seed.manifest.nbytes, CHUNK):
                        file.write(seed.read(start, min(CHUNK, seed.manifest.nbytes - start)))
            if path.exists():
                os.truncate(path, offer.manifest.nbytes)
        for other in before:
            other.unlink(missing_ok=True)
        return path


def _agreed(offers: Sequence[_Offer]) -> _Offer:
    """Of offers of one step, what most sources agree on. Replicas are equal, so who differs is wrong."""
    groups: dict[tuple[str, str], _Offer] = {}
    for offer in offers:
        key = (offer.root, offer.manifest.root)
        sources = groups[key].sources if key in groups else ()
        groups[key] = _Offer(offer.step, offer.root, offer.manifest, (*sources, *offer.sources))
    best = max(groups.values(), key=lambda group: len(group.sources))
    for other in groups.values():
        if other is not best:
            log.warning(
                "%s offer another state of step %s than %s: theirs is not taken",
                [source[:10] for source in other.sources], best.step, [source[:10] for source in best.sources],
            )  # fmt: skip
    return best


class _Counted:
    """A sink that says how far it is."""

    def __init__(self, sink: FileSink, report: Callable[[Progress | None], None]) -> None:
        self._sink, self._report = sink, report
        self._manifest, self._total = sink.manifest, sink.manifest.nbytes
        self._held = self._came = 0
        self._began = loop_time()

    def held(self) -> set[int]:
        held = self._sink.held()
        self._held = sum(self._manifest.chunks[index].nbytes for index in held)
        return held

    def write(self, index: int, data: Buffer) -> None:
        self._sink.write(index, data)
        self._came += len(data)
        elapsed = loop_time() - self._began
        self._report(Progress(self._held + self._came, self._total, self._came / elapsed if elapsed > 0 else 0.0))
