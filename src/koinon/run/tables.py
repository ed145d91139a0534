"""TOML text to checked values and back, with errors that name the key, the line and what was expected.

A table's keys are the fields of a frozen dataclass, and their types its annotations; what a value means is the
dataclass's own business. Knows nothing of runs.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from koinon.errors import SpecError, UnknownKey

Table = dict[str, Any]
_LARGEST = 2**53
"""Beyond it a number is a typing mistake, and JSON readers elsewhere would round it."""
_WORDS = {int: "a whole number", float: "a number", str: "text in quotes", bool: "true or false"}


@dataclass(frozen=True, slots=True)
class Source:
    """Where keys come from, so that an error can say it. `name`: what to call it; `text`: to find lines in."""

    name: str
    text: str = ""
    lines: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lines", _lines(self.text))

    def where(self, key: str) -> str:
        """'spec.toml, line 3: ' as far as it is known."""
        line = self.lines.get(key)
        return f"{self.name}, line {line}: " if line else f"{self.name}: "


def read_toml(source: Source) -> Table:
    """The document. Raises SpecError with the line if it is not TOML."""
    try:
        return tomllib.loads(source.text)
    except ValueError as error:
        raise SpecError(f"{source.name} is not valid TOML: {error}. Text needs quotes, a list needs [ ].") from error
    except RecursionError as error:
        raise SpecError(f"{source.name} nests lists or tables too deeply for a spec.") from error


def assigned(override: str) -> tuple[list[str], Any]:
    """Key path and value of 'train.steps=10' or 'data.source=stdlib'. Raises SpecError."""
    key, equals, value = override.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not equals or not all(path):
        raise SpecError(f"`{override}` sets nothing: write it as table.key=value, say train.steps=100.")
    try:
        return path, tomllib.loads(f"value = {value}")["value"]
    except ValueError:
        return path, value.strip()  # a word without quotes, as shells like it


def merge(tables: Table, path: Sequence[str], value: Any) -> None:
    """Set one key, making tables on the way. Raises SpecError where a value stands in the place of a table."""
    for part in path[:-1]:
        tables = tables.setdefault(part, {})
        if not isinstance(tables, dict):
            raise SpecError(f"`{'.'.join(path)}` cannot be set: `{part}` is no table.")
    tables[path[-1]] = value


def table_of(tables: Table, name: str, source: Source) -> Table:
    table = tables.get(name, {})
    if not isinstance(table, dict):
        raise SpecError(f"{source.where(name)}`{name}` must be a table: write [{name}] on a line of its own.")
    return table


def check_keys(given: Sequence[str], known: Sequence[str], *, prefix: str = "") -> None:
    """Raises UnknownKey with the known key that looks most like it."""
    for key in given:
        if key not in known:
            nearest = next(iter(get_close_matches(key, known, 1, 0.5)), None)
            raise UnknownKey(prefix + key, prefix + nearest if nearest else None)


def checked(cls: type[Any], table: Table, name: str, source: Source, *, without: Sequence[str] = ()) -> Table:
    """The table's values in the types of the dataclass `cls`, whose keys they are. Raises UnknownKey, SpecError."""
    prefix = f"{name}." if name else ""
    hints = get_type_hints(cls)
    check_keys(list(table), [f.name for f in fields(cls) if f.name not in without], prefix=prefix)
    return {key: _typed(hints[key], value, prefix + key, source) for key, value in table.items()}


def to_toml(tables: Mapping[str, Any]) -> str:
    """Scalars first, then a table each, in the order given; what is None is left out."""
    scalars = [f"{k} = {_literal(v)}" for k, v in tables.items() if not isinstance(v, Mapping) and v is not None]
    blocks = [
        "\n".join([f"[{name}]", *(f"{k} = {_literal(v)}" for k, v in table.items() if v is not None)])
        for name, table in tables.items()
        if isinstance(table, Mapping)
    ]
    return "\n\n".join(["\n".join(scalars), *blocks]) + "\n"


def _typed(hint: Any, value: Any, key: str, source: Source) -> Any:
    try:
        converted = msgspec.convert(value, hint)
    except (msgspec.ValidationError, OverflowError):
        shown = json.dumps(value, default=str, ensure_ascii=False)
        got = shown if len(shown) <= 60 else shown[:57] + "..."
        raise SpecError(f"{source.where(key)}`{key}` must be {_expected(hint)}, got {got}.") from None
    if isinstance(converted, int | float) and not abs(converted) <= _LARGEST:
        raise SpecError(f"{source.where(key)}`{key}` must be {_expected(hint)} of at most 2^53.")
    return converted


def _expected(hint: Any) -> str:
    origin = get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(f'"{choice}"' for choice in get_args(hint))
    if origin in (Union, UnionType):
        return " or ".join(_expected(part) for part in get_args(hint) if part is not NoneType)
    if origin is tuple:
        return f"a list of {len(get_args(hint))} numbers"
    return _WORDS[hint]


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    return repr(value)


def _lines(text: str) -> dict[str, int]:
    """Line of each key, as far as it can be seen without a parser: `[table]` on one line, `key =` on its own."""
    table = ""
    found: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\s*([\w.-]+)\s*\]", line):
            table = header[1] + "."
            found.setdefault(header[1], number)
        elif key := re.match(r"\s*([\w.-]+)\s*=", line):
            found.setdefault(table + key[1], number)
    return found
