"""The corpus as a list of hashes: what was read, and which documents training never sees.

The split depends on each document's content and on nothing else, so equal texts always fall on the same side and a
copy of a held-out document cannot be trained on. Knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import msgspec

from koinon.data.config import DataConfig
from koinon.data.corpus import Corpus, Document, empty
from koinon.data.files import write_whole
from koinon.data.progress import Progress
from koinon.errors import CorpusChanged, DataError, EmptyCorpus


@dataclass(frozen=True, slots=True)
class Entry:
    """One document. `nbytes` and `sha256` (hex) are those of its text as UTF-8."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Part:
    """One document on its way to the shards: its text, its length in UTF-8, and on which side of the split it is."""

    text: str
    nbytes: int
    is_held_out: bool


@dataclass(frozen=True)
class CorpusManifest:
    """Every document of a corpus, in reading order.

    what      the corpus in words, for sentences.
    config    the [data] table that it was read with.
    heldout   sha256 of the documents that training never sees.
    replaced  how many documents held bytes that were not UTF-8.
    """

    what: str
    config: DataConfig
    documents: tuple[Entry, ...]
    heldout: frozenset[str]
    replaced: int

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.documents)

    @property
    def digest(self) -> str:
        """Hex sha256 of the texts in their order and of the split; names and paths do not count."""
        lines = (f"{entry.sha256} {entry.sha256 in self.heldout:d}\n" for entry in self.documents)
        return sha256("".join(lines).encode()).hexdigest()

    def parts(self, corpus: Corpus) -> Iterator[Part]:
        """The documents again, each checked. Raises CorpusChanged if one is not what it was."""
        documents = corpus.documents()
        for entry in self.documents:
            document = next(documents, None)
            if document is None or entry_of(document).sha256 != entry.sha256:
                raise CorpusChanged(
                    f"{entry.name} changed while the data was being prepared. Start again when it is at rest."
                )
            yield Part(document.text, entry.nbytes, entry.sha256 in self.heldout)

    def save(self, path: Path) -> None:
        ordered = msgspec.to_builtins(self, order="deterministic")
        write_whole(path, msgspec.json.format(msgspec.json.encode(ordered), indent=1))

    @classmethod
    def load(cls, path: Path) -> CorpusManifest:
        """Raises DataError if the file is not a manifest."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except msgspec.MsgspecError as error:
            raise DataError(
                f"{path} is not a corpus manifest ({error}). Remove {path.parent} and start again."
            ) from error

    def require_same(self, now: CorpusManifest) -> None:
        """Raises CorpusChanged when `now` holds other texts; the sentence names the first that differs."""
        if self.digest == now.digest:
            return
        ours, theirs = ({e.name: e.sha256 for e in m.documents} for m in (self, now))
        changed = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise CorpusChanged(
            f"The corpus is not the one this run was started with: it was {self.what}, it is now {now.what}, and "
            f"{len(changed)} of {len(ours)} documents differ{_first(changed)}. "
            "Restore the text, or start a new run."
        )


def _first(changed: Sequence[str]) -> str:
    return f" (the first is {changed[0]})" if changed else " in their order"


def scan(corpus: Corpus, config: DataConfig, progress: Progress) -> CorpusManifest:
    """Read the whole corpus once. Raises EmptyCorpus when there is nothing, or nothing left to train on."""
    entries, replaced, done = [], 0, 0
    for document in corpus.documents():
        entries.append(entry_of(document))
        replaced += document.replaced
        done += entries[-1].nbytes
        progress("reading", done, config.max_bytes or 0)
    if not entries:
        raise empty(corpus)
    return CorpusManifest(corpus.what, config, tuple(entries), held_out(entries, config.heldout), replaced)


def entry_of(document: Document) -> Entry:
    raw = document.text.encode()
    return Entry(document.name, len(raw), sha256(raw).hexdigest())


def held_out(entries: Sequence[Entry], share: float) -> frozenset[str]:
    """Which documents (by sha256) are held out: at most `share` of the bytes, but at least one document.

    Documents are taken in the order of a hash of their hash, skipping those too long for what is left. Raises
    EmptyCorpus if all documents are equal: then holding one out leaves nothing to train on.
    """
    if share == 0:
        return frozenset()
    sizes: dict[str, int] = {}
    for entry in entries:  # copies of one text go to one side, together
        sizes[entry.sha256] = sizes.get(entry.sha256, 0) + entry.nbytes
    if len(sizes) < 2:
        raise EmptyCorpus(
            "The corpus is a single document, so none can be held out. Add text, or set `heldout = 0` in [data]."
        )
    left, taken = share * sum(sizes.values()), set()
    for digest in sorted(sizes, key=lambda digest: sha256(b"held out" + bytes.fromhex(digest)).digest()):
        if sizes[digest] <= left:
            taken.add(digest)
            left -= sizes[digest]
    return frozenset(taken or {min(sizes, key=lambda digest: (sizes[digest], digest))})
