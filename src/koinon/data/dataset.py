"""The data of a run on this machine, read by (seed, step).

    FOLDER/corpus.json      what was read, hash by hash, and what is held out
    FOLDER/tokenizer.json
    FOLDER/train/           shards and index.json
    FOLDER/heldout/
    FOLDER/dataset.json     written last: the data is ready

`building` makes such a folder. Knows nothing of models or of who asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from koinon.data import sampling, tokenizer
from koinon.data.config import DataConfig
from koinon.data.files import write_whole
from koinon.data.manifest import CorpusManifest
from koinon.data.shards import TokenStore
from koinon.errors import CorpusChanged, DataError, EmptyCorpus


@dataclass(frozen=True, eq=False, slots=True)
class Microbatch:
    """`ids` and `targets` (the ids one token later), both (sequences, context) int32; `samples` are their offsets."""

    index: int
    ids: NDArray[np.int32]
    targets: NDArray[np.int32]
    samples: tuple[int, ...]


class Dataset:
    """Prepared data. Batches are pure functions of their arguments and of the files."""

    def __init__(self, directory: Path, config: DataConfig) -> None:
        self.directory, self.config = directory, config
        self.tokenizer = tokenizer.load(directory / "tokenizer.json")
        self.manifest = CorpusManifest.load(directory / "corpus.json")
        self.train = TokenStore(directory / "train")
        self.heldout = TokenStore(directory / "heldout")

    @classmethod
    def open(cls, directory: Path) -> Self:
        """What `prepare` left in a folder; the corpus itself is not needed. Raises DataError, CorpusChanged."""
        ready = _Ready.load(directory / "dataset.json")
        dataset = cls(directory, ready.config)
        if dataset.digest != ready.digest:
            raise CorpusChanged(f"The files in {directory} do not belong together. Remove the folder and start again.")
        return dataset

    def seal(self) -> None:
        """Mark the folder as ready; `open` then holds it to these hashes."""
        _Ready(self.config, self.digest).save(self.directory / "dataset.json")

    @property
    def vocab(self) -> int:
        return self.tokenizer.vocab

    @property
    def tokens_train(self) -> int:
        return self.train.tokens

    @property
    def tokens_heldout(self) -> int:
        return self.heldout.tokens

    @property
    def digest(self) -> str:
        """Hex sha256 of corpus, split, tokenizer and tokens. Equal digests give equal batches on every machine."""
        parts = (self.manifest.digest, self.tokenizer.digest, self.train.digest, self.heldout.digest)
        return sha256("\n".join(parts).encode()).hexdigest()

    def batch(self, seed: bytes, step: int, batch: int, microbatch: int, context: int) -> list[Microbatch]:
        """The `batch` sequences of a step in groups of `microbatch`. Raises EmptyCorpus, ShardDamaged."""
        groups = sampling.microbatches(seed, step, batch, microbatch, self.tokens_train, context)
        return [_gather(self.train, index, samples, context) for index, samples in enumerate(groups)]

    def heldout_batches(self, sequences: int, microbatch: int, context: int) -> list[Microbatch]:
        """The same held-out sequences at every call, spread evenly; fewer than asked where the text is short.

        Raises EmptyCorpus when not even one sequence is held out.
        """
        if self.tokens_heldout <= context:
            raise EmptyCorpus(
                f"{self.tokens_heldout} tokens are held out, too few for a sequence of `context` {context}. "
                "Raise `heldout` in [data], add text, or lower `context`."
            )
        samples = sampling.evenly(sequences, self.tokens_heldout, context)
        groups = sampling.grouped(samples, microbatch)
        return [_gather(self.heldout, index, group, context) for index, group in enumerate(groups)]


def _gather(store: TokenStore, index: int, samples: Sequence[int], context: int) -> Microbatch:
    windows = np.stack([store.read(sample, context + 1) for sample in samples])
    ids, targets = np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])
    return Microbatch(index, ids, targets, tuple(samples))


@dataclass(frozen=True)
class _Ready:
    """dataset.json: the settings, and the hash by which two machines know that they read the same tokens."""

    config: DataConfig
    digest: str

    def save(self, path: Path) -> None:
        write_whole(path, msgspec.json.format(msgspec.json.encode(self), indent=1))

    @classmethod
    def load(cls, path: Path) -> Self:
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except FileNotFoundError as error:
            raise DataError(f"There is no prepared data in {path.parent}.") from error
        except msgspec.MsgspecError as error:
            raise DataError(f"{path} is damaged ({error}). Remove {path.parent} and start again.") from error
