"""The console that commands print on. Knows nothing of what they print."""

from __future__ import annotations

import os
import sys

from rich.console import Console


class Lines(Console):
    """No markup is read out of texts that others wrote, and lines of a pipe or a file are never broken."""

    def __init__(self, *, stderr: bool = False) -> None:
        piped = not (sys.stderr if stderr else sys.stdout).isatty()
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=piped)

    def on_broken_pipe(self) -> None:
        """Whoever read us has gone (`koinon log DIR | head`). What is printed from now on goes nowhere."""
        leave_pipe()
        raise BrokenPipeError


def leave_pipe() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
