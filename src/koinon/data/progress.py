"""How long work tells what it has done, without knowing who watches: a bar, a log line, nobody."""

from __future__ import annotations

from typing import Literal, Protocol

Phase = Literal["reading", "learning the tokenizer", "tokenizing"]


class Progress(Protocol):
    """Called often and cheaply. `done` and `total` count bytes of text; `total` is 0 while it is not known."""

    def __call__(self, phase: Phase, done: int, total: int, /) -> None: ...


def silent(phase: Phase, done: int, total: int, /) -> None:
    """Nobody watches."""
