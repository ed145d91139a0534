"""Byte-pair encoding (Sennrich et al., arXiv:1508.07909) over bytes, as in GPT-2, learned on the run's own text.

A tokenizer is its list of merges and nothing else: ids 0..255 are the bytes, each merge adds an id. Learning is
deterministic. There are no special tokens. The `tokenizers` package does the work and is loaded when one is made.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from koinon.data.config import BYTES_VOCAB
from koinon.data.corpus import whole_characters
from koinon.data.tokenizer import END, Tokenizer, check_range
from koinon.errors import DataError

LEARN_FROM = 4 * 1024 * 1024
"""Characters of training text to learn from; learning from 2.5 times as much changed the token count by 1%."""

Merge = tuple[str, str]
"""Two tokens that become one, written in GPT-2's letters for bytes."""


class BpeTokenizer(Tokenizer):
    """`vocab` ids: the bytes, then the merges in the order learned; a short text leaves the upper ids unused."""

    def __init__(self, merges: Sequence[Merge], vocab: int) -> None:
        """Raises DataError when the merges do not build on one another or are more than `vocab` has room for."""
        from tokenizers import Tokenizer as Engine
        from tokenizers import models, pre_tokenizers

        ids = _ids(merges, vocab)
        self.vocab, self._merges = vocab, list(merges)
        self._bytes = _table(ids, vocab)
        self._engine = Engine(models.BPE(vocab=ids, merges=list(merges)))
        self._engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)

    @classmethod
    def learn(cls, texts: Iterable[str], vocab: int) -> BpeTokenizer:
        """Merge the most frequent pair until there are `vocab` ids or no pair occurs twice."""
        from tokenizers import Tokenizer as Engine
        from tokenizers import models, pre_tokenizers, trainers

        engine = Engine(models.BPE())
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(vocab_size=vocab, min_frequency=2, show_progress=False, initial_alphabet=_LETTERS)
        engine.train_from_iterator(map(whole_characters, texts), trainer)
        return cls([(left, right) for left, right in json.loads(engine.to_str())["model"]["merges"]], vocab)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._engine.encode(whole_characters(text), add_special_tokens=False).ids
        return ids

    def encode_documents(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Each text's ids, closed by END; the texts are shared out over the cores."""
        encoded = self._engine.encode_batch_fast([whole_characters(t) for t in texts], add_special_tokens=False)
        return [np.array([*document.ids, END], np.int64) for document in encoded]

    def to_json(self) -> dict[str, Any]:
        return {"kind": "bpe", "vocab": self.vocab, "merges": [list(merge) for merge in self._merges]}

    def bytes_of(self, token: int) -> bytes:
        check_range(token, self.vocab)
        return self._bytes[token]


def _letters() -> list[str]:
    """The printable letter by which GPT-2 writes each byte, by byte value."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(BYTES_VOCAB, 2 * BYTES_VOCAB))
    return [chr(byte if byte in printable else next(others)) for byte in range(BYTES_VOCAB)]


_LETTERS = _letters()


def _ids(merges: Sequence[Merge], vocab: int) -> dict[str, int]:
    """The id of every token. Two merges may give the same token; it keeps its first id."""
    ids = {letter: byte for byte, letter in enumerate(_LETTERS)}
    for merge in merges:
        if not all(part in ids for part in merge):
            raise DataError(
                "The saved tokenizer is damaged: a merge joins tokens that are not there. Prepare it again."
            )
        ids.setdefault("".join(merge), len(ids))
    if len(ids) > vocab:
        raise DataError(f"The saved tokenizer has {len(ids)} tokens, more than its `vocab` {vocab}. Prepare it again.")
    return ids


def _table(ids: dict[str, int], vocab: int) -> list[bytes]:
    """The bytes of every id; nothing for END and for ids not in use."""
    value = {letter: byte for byte, letter in enumerate(_LETTERS)}
    table = [b""] * vocab
    for token, index in ids.items():
        table[index] = bytes(value[letter] for letter in token)
    table[END] = b""
    return table
