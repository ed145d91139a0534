"""`koinon sample`: a text continued by a league that only serves. Knows nothing of training."""

from __future__ import annotations

import asyncio
import unicodedata
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from koinon.cli.lines import Lines
from koinon.cli.sources import spec_in
from koinon.cli.stopping import Stopping
from koinon.errors import UserError
from koinon.local import League
from koinon.units import Seconds

LOOK_EVERY = Seconds.ms(50)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a text is drawn."""

    tokens: int = 200
    temperature: float = 0.8
    seed: int = 0


async def sample_run(directory: Path, prompt: str, how: Sampling, console: Console) -> None:
    """Print `prompt` and what follows, as it comes. Raises NotARun, LogInUse, UserError, Stopped."""
    if not prompt:
        raise UserError('The prompt is empty: give the text to continue, for example "def ".')
    spec = spec_in(directory)
    aside = Lines(stderr=True)
    if aside.is_terminal:
        aside.print(f"Starting {spec.model.stages} workers, one for each stage.", style="grey62")
    with Stopping(lambda: aside.print("\nStopping.", style="grey62"), lambda: None) as stop:
        await stop.run(_sample(directory, prompt, how, console))


async def _sample(directory: Path, prompt: str, how: Sampling, console: Console) -> None:
    async with League(None, directory, resume=True, trains=False, replicas=1) as league:
        while not all(league.control.trainer.state.ready(stage) for stage in range(league.spec.model.stages)):
            await asyncio.sleep(LOOK_EVERY.value)
        await stream(league, prompt, how, console)


async def stream(league: League, prompt: str, how: Sampling, console: Console) -> None:
    """Print `prompt` and what the league writes after it, piece by piece."""
    put(console, prompt, "bold")
    pieces: AsyncIterator[str] = league.sample(prompt, tokens=how.tokens, temperature=how.temperature, seed=how.seed)
    async for piece in pieces:
        put(console, piece)
        await asyncio.sleep(0)  # a signal is heard between two tokens
    put(console, "\n")


def put(console: Console, text: str, style: str = "") -> None:
    """Without a line break, and flushed."""
    console.print(Text(printable(text), style), end="", soft_wrap=True)
    console.file.flush()


def printable(text: str) -> str:
    """With U+FFFD for what would steer the terminal: a model may write any byte, escape sequences included."""
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)
