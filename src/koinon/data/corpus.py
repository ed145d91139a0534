"""Documents: where the text of a run comes from, one document at a time and in an order that every machine repeats.

Files are read in the order of their names' hashes, so that a cut at `max_bytes` is a fair sample of the folder and
not whatever begins with "a". Knows nothing of tokens, splits or hashes of texts.
"""

from __future__ import annotations

import json
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from koinon.data.config import DataConfig
from koinon.errors import DataError, EmptyCorpus

PIECE = 64 * 1024
"""Text files of more characters are cut at line ends, so that one long file can still be split into two sides."""

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "encodings", "__pycache__"}
_LOCAL_NAMES = ("_sysconfigdata", "sitecustomize", "usercustomize")  # made by the machine, not by Python's authors


@dataclass(frozen=True, slots=True)
class Document:
    """One text. `name` says where it stands in its source and is the same on every machine."""

    name: str
    text: str
    replaced: bool = False
    """Some bytes were not UTF-8 and stand in `text` as U+FFFD."""


@dataclass(frozen=True)
class Corpus:
    """Documents that can be read more than once, and a sentence's subject for errors: what they are."""

    what: str
    documents: Callable[[], Iterator[Document]]


def open_corpus(config: DataConfig) -> Corpus:
    """The corpus that `config.source` names, cut at `config.max_bytes`; documents without text are left out.

    Raises DataError when the source is not there or cannot be read.
    """
    whole = _source(config)

    def documents() -> Iterator[Document]:
        with_text = (document for document in whole.documents() if document.text)
        return with_text if config.max_bytes is None else _cut(with_text, config.max_bytes)

    return Corpus(whole.what, documents)


def _source(config: DataConfig) -> Corpus:
    if config.source == "stdlib":
        return Corpus(f"the standard library of Python {platform.python_version()}", _standard_library)
    if config.source.startswith("hf:"):
        return _hugging_face(config)
    path = Path(config.source).expanduser()
    if path.is_file() and path.suffix == ".jsonl":
        return Corpus(str(path), lambda: _jsonl([path], path.parent, config.text_field))
    if path.is_file():
        return Corpus(str(path), lambda: _texts([path], path.parent))
    if path.is_dir():
        return Corpus(str(path), lambda: _folder(path, config.text_field))
    raise DataError(f'There is no corpus at {path}. Set `source` to a folder of text, a .jsonl file, or "stdlib".')


def _standard_library() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    files = (file for file in root.rglob("*.py") if _is_library(file.relative_to(root)))
    for file in _shuffled(files, root):
        yield _read(file, root)


def _is_library(relative: Path) -> bool:
    """Whether a .py file is library source that one Python version ships alike on every platform."""
    folders = relative.parts[:-1]
    return not (
        _NOT_LIBRARY.intersection(folders)
        or any(folder.startswith("config-") for folder in folders)
        or relative.name.startswith(_LOCAL_NAMES)
    )


def _folder(root: Path, text_field: str) -> Iterator[Document]:
    """Every visible file under `root`; where there are .jsonl files, those alone."""
    visible = [file for file in root.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(root))]
    rows = [file for file in visible if file.suffix == ".jsonl"]
    return _jsonl(rows, root, text_field) if rows else _texts(visible, root)


def _texts(files: Iterable[Path], root: Path) -> Iterator[Document]:
    for file in _shuffled(files, root):
        if _is_text(file):
            yield from _pieces(_read(file, root))


def _jsonl(files: Iterable[Path], root: Path, text_field: str) -> Iterator[Document]:
    for file in _shuffled(files, root):
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _row(line, f"{file.relative_to(root).as_posix()}:{number}", text_field)


def _row(line: bytes, name: str, text_field: str) -> Document:
    raw = line.decode("utf-8", "replace")
    try:
        row = json.loads(raw)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{name} is not JSON ({error}). Each line of a .jsonl file holds one object.") from error
    return Document(name, _field(row, text_field, name), replaced=_has_replaced(line, raw))


def _field(row: Any, text_field: str, name: str) -> str:
    text = row.get(text_field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        fields = ", ".join(map(str, row)) if isinstance(row, dict) else "none"
        raise DataError(f"{name} has no text in `{text_field}` (fields: {fields}). Set `text_field` to the right one.")
    return whole_characters(text)


def _hugging_face(config: DataConfig) -> Corpus:
    name, _, configuration = config.source.removeprefix("hf:").partition(":")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(f"Reading {config.source} needs one more package: pip install koinon[datasets]") from error

    def documents() -> Iterator[Document]:
        # Streamed only when a limit makes it a prefix: then two passes cost less than the whole download.
        streaming = config.max_bytes is not None
        rows = load_dataset(name, configuration or None, split="train", streaming=streaming)
        for number, row in enumerate(rows):
            label = f"{name}:{number}"
            yield Document(label, _field(row, config.text_field, label))

    return Corpus(f"the Hugging Face dataset {name}", documents)


def _shuffled(files: Iterable[Path], root: Path) -> list[Path]:
    return sorted(files, key=lambda file: sha256(file.relative_to(root).as_posix().encode("utf-8", "replace")).digest())


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _is_text(file: Path) -> bool:
    with file.open("rb") as opened:
        return b"\0" not in opened.read(8192)


def _read(file: Path, root: Path) -> Document:
    raw = file.read_bytes()
    text = raw.decode("utf-8-sig", "replace")
    return Document(file.relative_to(root).as_posix(), text, replaced=_has_replaced(raw, text))


def _has_replaced(raw: bytes, text: str) -> bool:
    """Whether U+FFFD stands in `text` for bytes that were no UTF-8, and not because the author wrote it."""
    return "\ufffd" in text and raw.count("\ufffd".encode()) != text.count("\ufffd")


def whole_characters(text: str) -> str:
    """`text` with lone surrogates, which JSON can carry and UTF-8 cannot, as question marks."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _pieces(document: Document) -> Iterator[Document]:
    if len(document.text) <= PIECE:
        yield document
        return
    start, number = 0, 0
    while start < len(document.text):
        stop = start + PIECE
        line_end = document.text.rfind("\n", start, stop) + 1
        stop = line_end if line_end and stop < len(document.text) else stop
        yield Document(f"{document.name}#{number}", document.text[start:stop], document.replaced)
        start, number = stop, number + 1


def _cut(documents: Iterator[Document], max_bytes: int) -> Iterator[Document]:
    """The first `max_bytes` of text; the last document is shortened to a whole number of characters."""
    left = max_bytes
    for document in documents:
        raw = document.text.encode()
        if len(raw) <= left:
            yield document
        elif text := raw[:left].decode("utf-8", "ignore"):
            yield Document(document.name, text, document.replaced)
        left -= len(raw)
        if left <= 0:
            return


def empty(corpus: Corpus) -> EmptyCorpus:
    return EmptyCorpus(f"There is no text in {corpus.what}. Set `source` to a place that holds some.")
