"""Makes the data folder of a run: reads the corpus twice, first for its hashes, then for its tokens.

Every file appears whole or not at all and depends on the text and the settings alone, so a build that was killed is
continued by starting it again. One process builds a folder at a time. Knows nothing of steps or batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from koinon.data import tokenizer
from koinon.data.config import DataConfig
from koinon.data.corpus import Corpus, open_corpus
from koinon.data.dataset import Dataset
from koinon.data.manifest import CorpusManifest, Part, scan
from koinon.data.progress import Progress, silent
from koinon.data.shards import SHARD_TOKENS, ShardWriter
from koinon.data.tokenizer import ByteTokenizer, Tokenizer
from koinon.errors import CorpusChanged

_BLOCK = 1024 * 1024
"""Bytes of text tokenized at once: work for all cores, little memory."""


def prepare(
    config: DataConfig,
    directory: Path,
    progress: Progress = silent,
    *,
    expect: str | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Dataset:
    """Make the data of a run ready in `directory`, or reopen it; a build that was killed goes on where it was.

    expect: the `Dataset.digest` that the run was started with, where this machine joins one.
    Reopening does not read the corpus: the shards are the run's data, whatever became of the text since.
    Raises CorpusChanged (other settings, other texts, another digest), EmptyCorpus, DataError, DiskFull.
    """
    if not (directory / "dataset.json").exists():
        _build(config, directory, progress, shard_tokens)
    dataset = Dataset.open(directory)
    _require_same_settings(dataset.config, config, directory)
    if expect is not None and dataset.digest != expect:
        raise CorpusChanged(
            f"The run reads other text than {dataset.manifest.what} gives on this machine. "
            "Use the source (and the Python version) that the run names, or copy the run's data folder."
        )
    return dataset


def _build(config: DataConfig, directory: Path, progress: Progress, shard_tokens: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for abandoned in directory.rglob("*.tmp"):
        abandoned.unlink()
    corpus = open_corpus(config)
    manifest = _manifest(corpus, config, directory / "corpus.json", progress)
    made = _tokenizer(corpus, manifest, directory / "tokenizer.json", progress)
    writers = {
        False: ShardWriter(directory / "train", made.vocab, shard_tokens),
        True: ShardWriter(directory / "heldout", made.vocab, shard_tokens),
    }
    _tokenize(manifest, manifest.parts(corpus), made, writers, progress)
    Dataset(directory, config).seal()


def _manifest(corpus: Corpus, config: DataConfig, path: Path, progress: Progress) -> CorpusManifest:
    """The manifest of this build; a build begun earlier must have read the same."""
    begun = CorpusManifest.load(path) if path.exists() else None
    if begun:
        _require_same_settings(begun.config, config, path.parent)
    found = scan(corpus, config, progress)
    if begun:
        begun.require_same(found)
    else:
        found.save(path)
    return found


def _tokenizer(corpus: Corpus, manifest: CorpusManifest, path: Path, progress: Progress) -> Tokenizer:
    """The tokenizer of the run. A BPE learns from training documents only."""
    if path.exists():
        return tokenizer.load(path)
    made: Tokenizer = ByteTokenizer()
    if manifest.config.tokenizer == "bpe":
        from koinon.data.bpe import LEARN_FROM, BpeTokenizer

        texts = (part.text for part in manifest.parts(corpus) if not part.is_held_out)
        made = BpeTokenizer.learn(_first(texts, LEARN_FROM, progress), manifest.config.vocab)
    made.save(path)
    return made


def _first(texts: Iterator[str], characters: int, progress: Progress) -> Iterator[str]:
    done = 0
    for text in texts:
        yield text
        done += len(text)
        progress("learning the tokenizer", min(done, characters), characters)
        if done >= characters:
            return


def _tokenize(
    manifest: CorpusManifest,
    parts: Iterator[Part],
    made: Tokenizer,
    writers: dict[bool, ShardWriter],
    progress: Progress,
) -> None:
    total, done = manifest.nbytes, 0
    ahead = {side: writer.documents for side, writer in writers.items()}
    for block in _blocks(parts):
        fresh = [part for part in block if not _is_written(part, ahead)]
        for part, ids in zip(fresh, made.encode_documents([part.text for part in fresh]), strict=True):
            writers[part.is_held_out].append(ids)
        done += sum(part.nbytes for part in block)
        progress("tokenizing", done, total)
    for writer in writers.values():
        writer.finish()


def _is_written(part: Part, ahead: dict[bool, int]) -> bool:
    """Whether a whole shard of an earlier build holds the document; counts it off."""
    ahead[part.is_held_out] -= 1
    return ahead[part.is_held_out] >= 0


def _blocks(parts: Iterator[Part]) -> Iterator[list[Part]]:
    block: list[Part] = []
    size = 0
    for part in parts:
        block.append(part)
        size += part.nbytes
        if size >= _BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def _require_same_settings(was: DataConfig, now: DataConfig, directory: Path) -> None:
    old, new = msgspec.to_builtins(was), msgspec.to_builtins(now)
    changes = "; ".join(f"`{key}` was {old[key]}, is now {new[key]}" for key in old if old[key] != new[key])
    if changes:
        raise CorpusChanged(
            f"{directory} was made with other [data] settings: {changes}. Use a new folder, or the old settings."
        )
