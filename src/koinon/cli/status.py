"""`koinon status`: how a run stands, folded from its log. Knows nothing of live views."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from koinon.cli.board import Board
from koinon.cli.history import History
from koinon.cli.sentences import waiting
from koinon.cli.view import PHASES, QUIET, absorptions, grid
from koinon.run.state import Phase
from koinon.units import Flops, Seconds


def show_status(directory: Path, console: Console, *, as_json: bool) -> None:
    """Print how the run in `directory` stands. Errors as in `History`."""
    history = History(directory)
    is_written = history.is_being_written()
    board = Board(history.spec)
    for event, state in history.poll():
        board = board.heard(event, state)
    now = time.time() if is_written else board.last
    if as_json:
        print(json.dumps(as_values(board, now, is_written), indent=2))
        return
    for line in _lines(board, now, is_written, directory):
        console.print(line)
    if is_written:
        console.print(Text(), grid(board.grid(now), now), sep="\n")
    console.print(Text(), credit(board), sep="\n")


def as_values(board: Board, now: float, is_written: bool) -> dict[str, Any]:
    """The same as plain values."""
    state, spec = board.state, board.spec
    return {
        "run": spec.run_id,
        "name": spec.name,
        "phase": state.phase.value,
        "reason": state.reason,
        "is_running": is_written,
        "pauses": [asdict(pause) for pause in state.pauses],
        "step": state.step,
        "steps": spec.train.steps,
        "elapsed_s": board.elapsed(now),
        "tokens_per_second": board.tokens_per_second(now),
        "loss": None if state.loss is None else {"step": state.loss[0], "value": state.loss[1]},
        "heldout": None if state.heldout is None else {"step": state.heldout[0], "value": state.heldout[1]},
        "stages": [[asdict(cell) for cell in row] for row in board.grid(now)],
        "credit": {account: asdict(credit) for account, credit in sorted(state.credit.items())},
        "absorbed": asdict(state.tally),
    }


def _lines(board: Board, now: float, is_written: bool, directory: Path) -> list[Text]:
    state, steps = board.state, board.spec.train.steps
    phase = Text.assemble((board.spec.name, "bold"), "  ", (state.phase.value, PHASES.get(state.phase, QUIET)))
    phase.append(f", {_standing(board, is_written, directory)}")
    lines = [phase, Text(f"step      {state.step} of {steps}, after {Seconds(round(board.elapsed(now)))}")]
    if state.loss is not None:
        lines.append(Text(f"loss      {state.loss[1]:.4f} in step {state.loss[0]}"))
    if state.heldout is not None:
        lines.append(Text(f"held-out  {state.heldout[1]:.4f} with the weights of step {state.heldout[0]}"))
    if is_written and board.tokens.seen:
        lines.append(Text(f"speed     {board.tokens_per_second(now):,.0f} tokens/s"))
    lines.append(Text(f"absorbed  {', '.join(absorptions(state)) or 'nothing'}"))
    return lines


def _standing(board: Board, is_written: bool, directory: Path) -> str:
    """Whether somebody is at work, and what the user can do."""
    go_on = f"go on with: koinon run --resume {quote(str(directory))}"
    match board.state.phase:
        case Phase.TRAINING if is_written and board.state.pauses:
            return " ".join(waiting(pause) for pause in board.state.pauses)
        case Phase.TRAINING if is_written:
            left = board.seconds_left(now=board.last)
            return f"about {Seconds(left)} left" if left else "just begun"
        case Phase.TRAINING:
            return f"but it was cut off, nobody is at work; {go_on}"
        case Phase.STOPPED:
            return f"{board.state.reason}; {go_on}"
        case Phase.FAILED:
            return f"{board.state.reason} Then {go_on}"
        case Phase.COMPLETE:
            return f'continue a text with: koinon sample {quote(str(directory))} "def "'
        case _:
            return "not begun"


def credit(board: Board) -> Table:
    """What each account has earned: final once the step was committed."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=QUIET)
    table.add_column("account")
    for column in ("work items", "tokens", "compute"):
        table.add_column(column, justify="right")
    for account, earned in sorted(board.state.credit.items()):
        table.add_row(account, f"{earned.items:,}", f"{earned.tokens:,}", str(Flops(earned.flops)))
    return table
