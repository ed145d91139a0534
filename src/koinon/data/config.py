"""What a run reads: the [data] table of its spec. Knows nothing of files; `corpus` opens what it names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from koinon.errors import Contradiction

BYTES_VOCAB = 256
"""Ids of the byte tokenizer. 0xFF never occurs in UTF-8, so it marks the end of a document and no id is added."""


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes ids.

    source      "stdlib" (the .py files of this Python's standard library), a path to a folder of text, to a .jsonl
                file or a folder of them, or "hf:NAME" or "hf:NAME:CONFIGURATION" (needs the `datasets` extra).
    text_field  the field that holds the text in JSONL and Hugging Face rows.
    tokenizer   "bytes" (vocab is 256) or "bpe" (byte-level, trained on the training split).
    vocab       number of token ids; a text too small to fill a BPE vocabulary leaves its upper ids unused.
    heldout     at most this share of the text is kept from training, by whole documents; 0 holds nothing out.
    max_bytes   read at most this much UTF-8 text; None reads all.

    Raises Contradiction.
    """

    source: str = "stdlib"
    text_field: str = "text"
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    vocab: int = BYTES_VOCAB
    heldout: float = 0.05
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.source:
            raise Contradiction('`source` is empty: name "stdlib", a path, or "hf:NAME".')
        if self.tokenizer not in ("bytes", "bpe"):
            raise Contradiction(f'`tokenizer` is "{self.tokenizer}": it must be "bytes" or "bpe".')
        if self.tokenizer == "bytes" and self.vocab != BYTES_VOCAB:
            raise Contradiction(
                f"The byte tokenizer has 256 ids, but `vocab` is {self.vocab}. "
                'Leave `vocab` out, or set `tokenizer = "bpe"`.'
            )
        if self.tokenizer == "bpe" and self.vocab <= BYTES_VOCAB:
            raise Contradiction(
                f"A BPE tokenizer begins with the 256 bytes, but `vocab` is {self.vocab}. Set it above 256, say 4096."
            )
        if not 0 <= self.heldout <= 0.5:
            raise Contradiction(f"`heldout` is {self.heldout}: it is a share of the text, from 0 to 0.5.")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise Contradiction(
                f"`max_bytes` is {self.max_bytes}: give at least 1, or leave it out to read everything."
            )
