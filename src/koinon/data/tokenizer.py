"""Text to token ids and back, byte by byte: whatever the ids, decoding gives valid text.

The first 256 ids of every tokenizer are the bytes. 0xFF never occurs in UTF-8, so its id marks the end of a document,
and no text can be written that contains the mark. Knows nothing of corpora or shards.
"""

from __future__ import annotations

import codecs
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from koinon.data.config import BYTES_VOCAB
from koinon.data.files import write_whole
from koinon.errors import DataError, TokenOutOfRange

END = 0xFF
"""The id that closes a document. It decodes to nothing; a sampler stops at it."""


class Tokenizer(ABC):
    """What trainers, samplers and the gateway need. Ids are 0..vocab-1; not all of them need be in use."""

    vocab: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text, without an end mark."""

    @abstractmethod
    def encode_documents(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Each text's ids, closed by END."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Everything that decides which ids a text becomes, as plain JSON values."""

    @abstractmethod
    def bytes_of(self, token: int) -> bytes:
        """The bytes that an id stands for; empty for END and for ids not in use. Raises TokenOutOfRange."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that are no UTF-8 become U+FFFD. Raises TokenOutOfRange."""
        return b"".join(map(self.bytes_of, ids)).decode("utf-8", "replace")

    def stream(self) -> TextStream:
        """A decoder for ids that come one by one."""
        return TextStream(self)

    @property
    def digest(self) -> str:
        """Hex sha256; tokenizers with equal digests give equal ids."""
        return sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def save(self, path: Path) -> None:
        write_whole(path, json.dumps(self.to_json(), sort_keys=True, indent=1).encode())


class TextStream:
    """Decodes ids as they come and never shows half a character: pieces and rest join to `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Iterable[int]) -> str:
        """The characters that these ids complete. Raises TokenOutOfRange."""
        return self._decoder.decode(b"".join(map(self._tokenizer.bytes_of, ids)))

    def rest(self) -> str:
        """What was cut off in the middle of a character, as U+FFFD; the stream is then as new."""
        return self._decoder.decode(b"", final=True)


class ByteTokenizer(Tokenizer):
    """An id is a byte. 256 ids, nothing to learn."""

    vocab = BYTES_VOCAB

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "replace"))

    def encode_documents(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        closed = (text.encode("utf-8", "replace") + bytes([END]) for text in texts)
        return [np.frombuffer(raw, np.uint8).astype(np.int64) for raw in closed]

    def to_json(self) -> dict[str, Any]:
        return {"kind": "bytes"}

    def bytes_of(self, token: int) -> bytes:
        check_range(token, self.vocab)
        return b"" if token == END else bytes([token])


def check_range(token: int, vocab: int) -> None:
    """Raises TokenOutOfRange unless 0 <= token < vocab."""
    if not 0 <= token < vocab:
        raise TokenOutOfRange(f"Token {token} is not in the vocabulary of {vocab}: the model and the tokenizer differ.")


def load(path: Path) -> Tokenizer:
    """The tokenizer in a JSON file that `save` wrote. Raises DataError if it is missing or something else."""
    try:
        match json.loads(path.read_bytes()):
            case {"kind": "bytes"}:
                return ByteTokenizer()
            case {"kind": "bpe", "vocab": int(vocab), "merges": list(merges)}:
                from koinon.data.bpe import BpeTokenizer

                return BpeTokenizer([(left, right) for left, right in merges], vocab)
    except FileNotFoundError as error:
        raise DataError(f"There is no tokenizer at {path}. Prepare the data of the run first.") from error
    except (ValueError, TypeError):
        pass  # said below, as for JSON of another shape
    raise DataError(f"{path} is not a tokenizer. Remove {path.parent} and prepare the data again.")
