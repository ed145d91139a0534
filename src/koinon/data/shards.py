"""Token ids on disk: flat little-endian files that are memory-mapped, and an index with their hashes.

A shard ends where a document ends and appears under its name only when whole, so building can be killed at any moment
and continued. A shard is hashed when it is first read: damage is found before one of its ids is used, and opening a
terabyte costs nothing (windows are drawn all over the store, so the first steps read nearly every shard).
Knows nothing of text, seeds or steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from koinon.data.files import write_whole
from koinon.errors import DataError, ShardDamaged, TokenOutOfRange

SHARD_TOKENS = 2**24
"""A shard is closed at the first document end beyond this: 32 MiB of uint16, some 30 ms to hash."""


@dataclass(frozen=True)
class Shard:
    file: str
    tokens: int
    documents: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """`dtype` is uint16 where every id fits into it. `shards` follow one another without gaps."""

    vocab: int
    dtype: Literal["uint16", "uint32"]
    shards: tuple[Shard, ...] = ()

    @classmethod
    def empty(cls, vocab: int) -> Index:
        return cls(vocab, "uint16" if vocab <= 2**16 else "uint32")

    @classmethod
    def load(cls, directory: Path) -> Index:
        path = directory / "index.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (FileNotFoundError, msgspec.MsgspecError) as error:
            raise ShardDamaged(f"{path} is missing or damaged. Remove {directory.parent} and start again.") from error

    def save(self, directory: Path) -> None:
        write_whole(directory / "index.json", msgspec.json.format(msgspec.json.encode(self), indent=1))

    @property
    def numpy_dtype(self) -> np.dtype[np.unsignedinteger]:
        return np.dtype("<u2" if self.dtype == "uint16" else "<u4")


class ShardWriter:
    """Appends documents to a store. Continues after the last whole shard; `documents` says how many those hold."""

    def __init__(self, directory: Path, vocab: int, shard_tokens: int = SHARD_TOKENS) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._shard_tokens = directory, shard_tokens
        self._index = Index.load(directory) if (directory / "index.json").exists() else Index.empty(vocab)
        self._open: list[NDArray[np.unsignedinteger]] = []
        self._tokens = 0

    @property
    def documents(self) -> int:
        """Documents in whole shards: where to continue."""
        return sum(shard.documents for shard in self._index.shards)

    def append(self, ids: NDArray[np.int64]) -> None:
        """One document. Raises TokenOutOfRange, and DiskFull when a shard cannot be written."""
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self._index.vocab:
            raise TokenOutOfRange(
                f"A document holds token {int(ids.max())}, but the vocabulary has {self._index.vocab}. "
                "Set `vocab` to what the tokenizer has."
            )
        self._open.append(ids.astype(self._index.numpy_dtype))
        self._tokens += ids.size
        if self._tokens >= self._shard_tokens:
            self._close_shard()

    def finish(self) -> None:
        """Write what is left. A store without documents gets an index too."""
        self._close_shard() if self._open else self._index.save(self._directory)

    def _close_shard(self) -> None:
        data = np.concatenate(self._open).data
        shard = Shard(f"{len(self._index.shards):05d}.bin", self._tokens, len(self._open), sha256(data).hexdigest())
        write_whole(self._directory / shard.file, data)
        self._index = Index(self._index.vocab, self._index.dtype, (*self._index.shards, shard))
        self._index.save(self._directory)
        self._open, self._tokens = [], 0


class TokenStore:
    """A row of token ids, read in place. `store.read(start, n)` is a pure function of the files."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.index = directory, Index.load(directory)
        self.tokens = sum(shard.tokens for shard in self.index.shards)
        self._ends = np.cumsum([shard.tokens for shard in self.index.shards], dtype=np.int64)
        self._maps: dict[int, NDArray[np.unsignedinteger]] = {}

    @property
    def digest(self) -> str:
        """Hex sha256 of all ids, by way of the shards' hashes and lengths."""
        lines = "".join(f"{shard.tokens} {shard.sha256}\n" for shard in self.index.shards)
        return sha256(f"{self.index.vocab} {self.index.dtype}\n{lines}".encode()).hexdigest()

    def sample(self, sample_id: int, context: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The window that begins at token `sample_id`: ids (context,) and their successors (context,).

        Raises DataError when the window leaves the store, ShardDamaged when a file is not what was written.
        """
        window = self.read(sample_id, context + 1)
        return window[:-1], window[1:]

    def read(self, start: int, length: int) -> NDArray[np.int32]:
        """Tokens start .. start+length-1, shape (length,), across shards where need be."""
        if start < 0 or start + length > self.tokens:
            raise DataError(f"Tokens {start}..{start + length} are not in {self.directory}, which holds {self.tokens}.")
        out = np.empty(length, np.int32)
        number, done = int(np.searchsorted(self._ends, start, side="right")), 0
        while done < length:
            shard = self._map(number)
            begin = start + done - (int(self._ends[number]) - shard.size)
            piece = shard[begin : begin + length - done]
            out[done : done + piece.size] = piece
            done, number = done + piece.size, number + 1
        return out

    def _map(self, number: int) -> NDArray[np.unsignedinteger]:
        if number not in self._maps:
            shard = self.index.shards[number]
            path = self.directory / shard.file
            _check(path, shard)
            self._maps[number] = np.memmap(path, self.index.numpy_dtype, mode="r", shape=(shard.tokens,))
        return self._maps[number]


def _check(path: Path, shard: Shard) -> None:
    try:
        with path.open("rb") as file:
            intact = file_digest(file, "sha256").hexdigest() == shard.sha256
    except FileNotFoundError:
        intact = False
    if not intact:
        raise ShardDamaged(
            f"{path} is not what was written there. Remove {path.parent.parent} and start again: "
            "the same text gives the same tokens."
        )
