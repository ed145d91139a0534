"""Bulk transfer by content: a manifest names chunks by their sha-256, and any peer that has one may give it.

Every chunk is hashed before it is written, so a wrong one costs only itself, and its sender is named. What is on disk
already is not asked for again. Faster sources are asked for more; the last chunks are asked for twice.
Knows nothing of what the bytes mean: `entries` say where tensors lie in them, for whoever reads them.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final, Protocol, TypeAlias

import msgspec

from koinon.errors import DiskFull, FrameMalformed, FrameTooLarge
from koinon.net.frames import Buffer, Header, NBytes, Wire, flat
from koinon.net.transport import Answer, Service
from koinon.units import Bytes, PeerId

BULK: Final = "koinon/bulk/1"
CHUNK: Final = 4 * 1024 * 1024
"""Large enough that a request per chunk costs nothing, small enough that a wrong one is no loss."""
MAX_SERVED: Final = 8
"""Chunks read for peers at once: each holds `CHUNK` bytes of memory."""
Digest: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


class Chunk(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A piece of content: its sha-256 and its length."""

    digest: Digest
    nbytes: Annotated[int, msgspec.Meta(gt=0, le=CHUNK)]


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A tensor inside the content, at [offset, offset + nbytes)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: NBytes
    nbytes: NBytes


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Content as consecutive chunks, all `CHUNK` long but the last."""

    chunks: tuple[Chunk, ...]
    entries: tuple[Entry, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(chunk.nbytes for chunk in self.chunks)

    @property
    def root(self) -> str:
        """Hex sha-256 of the encoded manifest: names the content, and where tensors lie in it."""
        return hashlib.sha256(self.encode()).hexdigest()

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    def span(self, index: int) -> tuple[int, int]:
        """Offset and length of a chunk in the content."""
        return index * CHUNK, self.chunks[index].nbytes


def manifest_of(content: Buffer, entries: Iterable[Entry] = ()) -> Manifest:
    """The manifest of bytes in memory."""
    view = flat(content)
    pieces = (view[start : start + CHUNK] for start in range(0, len(view), CHUNK))
    return Manifest(tuple(_chunk(piece) for piece in pieces), tuple(entries))


def manifest_of_reader(read: Callable[[int, int], bytes], nbytes: int, entries: Iterable[Entry] = ()) -> Manifest:
    """The manifest of content that `read(offset, nbytes)` gives, whole nowhere."""
    pieces = (read(start, min(CHUNK, nbytes - start)) for start in range(0, nbytes, CHUNK))
    return Manifest(tuple(_chunk(piece) for piece in pieces), tuple(entries))


def manifest_of_file(path: Path, entries: Iterable[Entry] = ()) -> Manifest:
    """The manifest of a file, read chunk by chunk."""
    with path.open("rb") as file:
        pieces = iter(lambda: file.read(CHUNK), b"")
        return Manifest(tuple(_chunk(piece) for piece in pieces), tuple(entries))


def decode_manifest(encoded: Buffer, root: str, *, limit: Bytes) -> Manifest:
    """The manifest with that root, describing at most `limit`. Raises FrameMalformed, FrameTooLarge."""
    if hashlib.sha256(encoded).hexdigest() != root:
        raise FrameMalformed(f"A manifest's bytes do not hash to its root {root[:10]}.")
    try:
        manifest = msgspec.msgpack.decode(encoded, type=Manifest)
    except msgspec.DecodeError as error:
        raise FrameMalformed(f"A manifest cannot be read: {error}") from error
    if any(chunk.nbytes != CHUNK for chunk in manifest.chunks[:-1]):
        raise FrameMalformed("A manifest has a short chunk before its end.")
    if manifest.nbytes > limit.count:
        raise FrameTooLarge(f"A manifest describes {Bytes(manifest.nbytes)}, {limit} are allowed.")
    return manifest


class ChunkWanted(Header, frozen=True, tag="chunk?"):
    """Give me the chunk with this digest."""

    digest: Digest


class ChunkGiven(Header, frozen=True, tag="chunk!"):
    """Body: the chunk. An empty body: it is not here."""

    nbytes: Annotated[int, msgspec.Meta(ge=0, le=CHUNK)]


class ChunkLater(Header, frozen=True, tag="chunk~"):
    """It is here, and its holder has more urgent things to send: ask again after that time. No fault."""

    after_ms: Annotated[int, msgspec.Meta(ge=0, le=60_000)]


class ManifestWanted(Header, frozen=True, tag="manifest?"):
    """Give me the manifest with this root."""

    root: str


class ManifestGiven(Header, frozen=True, tag="manifest!"):
    """Body: the encoded manifest. An empty body: it is not here."""

    nbytes: NBytes


REQUESTS: Final = Wire(ChunkWanted, ManifestWanted)
REPLIES: Final = Wire(ChunkGiven, ChunkLater, ManifestGiven)


class ChunkStore:
    """Chunks that this node gives to whoever asks. What it holds is read when asked for, not kept in memory."""

    def __init__(self) -> None:
        self._manifests: dict[str, Manifest] = {}
        self._readers: dict[bytes, Callable[[], bytes]] = {}
        self._room = asyncio.Semaphore(MAX_SERVED)

    def add(self, manifest: Manifest, read: Callable[[int, int], bytes]) -> None:
        """Offer content. `read(offset, nbytes)` is called in a thread."""
        self._manifests[manifest.root] = manifest
        for index, chunk in enumerate(manifest.chunks):
            self._readers[chunk.digest] = _reader(read, *manifest.span(index))

    def add_file(self, manifest: Manifest, path: Path) -> None:
        self.add(manifest, lambda offset, nbytes: _read_at(path, offset, nbytes))

    def add_bytes(self, manifest: Manifest, content: Buffer) -> None:
        view = flat(content)
        self.add(manifest, lambda offset, nbytes: bytes(view[offset : offset + nbytes]))

    def remove(self, manifest: Manifest) -> None:
        """Stop offering content."""
        self._manifests.pop(manifest.root, None)
        for chunk in manifest.chunks:
            self._readers.pop(chunk.digest, None)

    def service(self, alpn: str = BULK) -> Service:
        return Service(alpn, REQUESTS, REPLIES, self.answer)

    async def answer(self, _peer: PeerId, message: msgspec.Struct, _body: bytearray) -> Answer:
        """The handler, for a service that also answers other messages."""
        match message:
            case ChunkWanted(digest=digest):
                data = await self._read(digest)
                return ChunkGiven(len(data)), data
            case ManifestWanted(root=root):
                manifest = self._manifests.get(root)
                encoded = manifest.encode() if manifest is not None else b""
                return ManifestGiven(len(encoded)), encoded
            case _:
                raise TypeError(f"{type(message).__name__} is no request for chunks")

    async def _read(self, digest: bytes) -> bytes:
        if (read := self._readers.get(digest)) is None:
            return b""
        async with self._room:
            return await asyncio.to_thread(read)


class Sink(Protocol):
    """Where fetched chunks go."""

    def held(self) -> set[int]:
        """Indices of chunks that are there already, whole and right."""

    def write(self, index: int, data: Buffer) -> None:
        """A chunk whose hash was checked."""


@dataclass(frozen=True, slots=True)
class FileSink:
    """A file of the content's size, filled in any order. Opened anew after a crash, it goes on where it was."""

    path: Path
    manifest: Manifest

    def held(self) -> set[int]:
        if not self.path.exists():
            return set()
        spans = {index: self.manifest.span(index) for index in range(len(self.manifest.chunks))}
        return {i for i, span in spans.items() if is_chunk(self.manifest.chunks[i], _read_at(self.path, *span))}

    def write(self, index: int, data: Buffer) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.pwrite(descriptor, data, self.manifest.span(index)[0])
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise DiskFull(f"There is no room for a chunk in {self.path}. Make room; what is there is kept.") from error
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class MemorySink:
    """The content in memory; `content()` once every chunk was written."""

    manifest: Manifest
    parts: dict[int, bytes] = field(default_factory=dict)

    def held(self) -> set[int]:
        return set(self.parts)

    def write(self, index: int, data: Buffer) -> None:
        self.parts[index] = bytes(data)

    def content(self) -> bytes:
        return b"".join(self.parts[index] for index in range(len(self.manifest.chunks)))


def is_chunk(chunk: Chunk, data: Buffer) -> bool:
    """Whether these bytes are that chunk."""
    return len(data) == chunk.nbytes and hashlib.sha256(data).digest() == chunk.digest


def _chunk(piece: Buffer) -> Chunk:
    return Chunk(hashlib.sha256(piece).digest(), len(piece))


def _reader(read: Callable[[int, int], bytes], offset: int, nbytes: int) -> Callable[[], bytes]:
    return lambda: read(offset, nbytes)


def _read_at(path: Path, offset: int, nbytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(nbytes)
