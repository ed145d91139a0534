"""The two texts that compression is judged on; whoever has this Python and the pinned numpy has both.

code: the source of Python's standard library. prose: English that explains, from the help topics of pydoc and the
docstrings of the standard library and of numpy, one document per module. Training text and held-out text never share a
document, and no run reads a byte twice. Knows nothing of models.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Final, Literal

from koinon.data import DataConfig, Dataset, prepare

Corpus = Literal["code", "prose"]
CORPORA: Final[tuple[Corpus, ...]] = ("code", "prose")

_SHORTEST = 80
"""Characters: shorter docstrings are signatures in words."""
_NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "__pycache__"}


def open_corpus(corpus: Corpus) -> Dataset:
    """Byte tokens, prepared once and kept in the user's cache folder. Takes seconds the first time."""
    folder = _cache() / f"{corpus}-python-{platform.python_version()}-numpy-{version('numpy')}"
    if corpus == "code":
        return prepare(DataConfig(source="stdlib"), folder)
    documents = folder.with_suffix(".jsonl")
    if not documents.exists():
        _write(documents)
    return prepare(DataConfig(source=str(documents)), folder)


def prose() -> Iterator[tuple[str, str]]:
    """(name, text) of every document, always in one order."""
    for name, text in sorted(topics.items()):
        yield f"pydoc/{name}", text
    seen: set[str] = set()  # many docstrings are copies of one another
    for library, root in (("python", _standard_library()), ("numpy", _package("numpy"))):
        for file in sorted(root.rglob("*.py")):
            inside = file.relative_to(root)
            if not _NOT_PROSE.intersection(inside.parts):
                fresh = [text for text in docstrings(file.read_bytes()) if text not in seen]
                seen.update(fresh)
                if fresh:
                    yield f"{library}/{inside.as_posix()}", "\n\n".join(fresh)


def docstrings(source: bytes) -> list[str]:
    """The longer docstrings of a module, outermost first, unindented; none where it does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's sources
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return [text for text in found if text and len(text) >= _SHORTEST]


def _write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".tmp")
    with half.open("w", encoding="utf-8") as lines:
        for name, text in prose():
            lines.write(json.dumps({"name": name, "text": text}) + "\n")
    half.replace(path)


def _standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "koinon" / "bench"
