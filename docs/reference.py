"""Writes the reference pages of the site from the docstrings, so that they cannot fall behind the code.

An mkdocs hook: it reads src/koinon as text, imports nothing, and adds one page per package to the site. Names that
begin with an underscore are left out.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

SOURCE = Path(__file__).parent.parent / "src" / "koinon"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the pages at the end of the navigation."""
    pages: list[Any] = [
        {f"koinon.{name}" if name else "koinon": f"reference/{name or 'koinon'}.md"} for name in _pages()
    ]
    assert config.nav is not None, "mkdocs.yml has a navigation"
    config.nav = [*config.nav, {"Reference": pages}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages themselves."""
    for name, modules in _pages().items():
        title = f"# `koinon.{name}`" if name else "# `koinon`"
        content = "\n\n".join([title, *(part for module in modules for part in _module(module))])
        files.append(File.generated(config, f"reference/{name or 'koinon'}.md", content=content))
    return files


def _pages() -> dict[str, list[Path]]:
    """Package name -> its modules. Modules of the top level share one page, named ''."""
    top = [path for path in sorted(SOURCE.glob("*.py")) if not path.stem.startswith("_")]
    packages = {folder.name: sorted(folder.rglob("*.py")) for folder in sorted(SOURCE.iterdir()) if folder.is_dir()}
    return {"": top} | {name: modules for name, modules in packages.items() if any(map(_says_something, modules))}


def _says_something(path: Path) -> bool:
    return bool(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))))


def _module(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    if text := ast.get_docstring(tree):
        if path.stem != "__init__":
            yield f"## `{'.'.join(parts)}`"
        yield _prose(text)
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield from _definition(node, "###")


def _definition(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, level: str) -> Iterator[str]:
    text = ast.get_docstring(node)
    if text is None and not isinstance(node, ast.ClassDef):
        return  # too plain for words: not worth a heading either
    yield f"{level} `{node.name}`"
    yield f"```python\n{_signature(node)}\n```"
    if text:
        yield _prose(text)
    if isinstance(node, ast.ClassDef):
        for part in node.body:
            if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) and not part.name.startswith("_"):
                yield from _definition(part, level + "#")


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """A definition without its body; for a class, with its fields."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, [*node.bases, *node.keywords]))
        return "\n".join([f"class {node.name}({bases}):" if bases else f"class {node.name}:", *_fields(node)])
    shell = ast.parse(ast.unparse(node)).body[0]
    assert isinstance(shell, ast.FunctionDef | ast.AsyncFunctionDef)
    shell.body, shell.decorator_list = [ast.Expr(ast.Constant(...))], []
    return ast.unparse(shell).replace(":\n    ...", ": ...")


def _fields(node: ast.ClassDef) -> Iterator[str]:
    """Public fields, each with the docstring below it as a comment above it."""
    for part, below in zip_longest(node.body, node.body[1:]):
        if isinstance(part, ast.AnnAssign) and _is_public(part):
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                yield from (f"    # {line}" for line in inspect.cleandoc(str(below.value.value)).splitlines())
            yield f"    {ast.unparse(part)}"


def _is_public(field: ast.AnnAssign) -> bool:
    return isinstance(field.target, ast.Name) and not field.target.id.startswith("_")


def _prose(text: str) -> str:
    """A docstring as Markdown. Drawings and aligned lists stay as they were typed."""
    return "\n\n".join(map(_paragraph, re.split(r"\n\s*\n", inspect.cleandoc(text))))


def _paragraph(text: str) -> str:
    is_typed = any(re.search(r"\S {2,}\S|^ ", line) for line in text.splitlines())
    if is_typed:
        return f"```text\n{text}\n```"
    spans = re.split(r"(`[^`]*`)", text)  # what stands between backticks is left alone
    return "".join(span if span.startswith("`") else _escaped(span) for span in spans)


def _escaped(text: str) -> str:
    return re.sub(r"([*_\[\]<>])", r"\\\1", text)
