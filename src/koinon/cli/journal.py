"""`koinon log`: every event of a run as one line, for people or for programs. Knows nothing of live views."""

from __future__ import annotations

import sys
import time
from datetime import datetime
from pathlib import Path

import msgspec
from rich.console import Console
from rich.text import Text

from koinon.cli.history import History
from koinon.cli.sentences import sentence, tone
from koinon.cli.view import QUIET, STYLES
from koinon.run import events as ev
from koinon.run.state import Phase, RunState
from koinon.units import Seconds

LOOK_EVERY = Seconds.ms(200)


def show_log(directory: Path, console: Console, *, follow: bool, as_json: bool) -> None:
    """Print the log. follow: until the run has ended or nobody writes it any more. Errors as in `History`."""
    history = History(directory)
    while True:
        # Asked before the look, so that what a writer says last is still read.
        goes_on = follow and history.is_being_written()
        for event, state in history.poll():
            _print(event, state, console, as_json)
        if not goes_on or history.state.phase is not Phase.TRAINING:
            return
        sys.stdout.flush()
        time.sleep(LOOK_EVERY.value)


def _print(event: ev.Event, state: RunState, console: Console, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.encode(event).decode())
    else:
        console.print(line(event, state))


def line(event: ev.Event, state: RunState) -> Text:
    """Local time and what happened."""
    at = datetime.fromtimestamp(event.at).strftime("%Y-%m-%d %H:%M:%S")
    return Text.assemble((at, QUIET), "  ", (sentence(event, state), STYLES[tone(event)]))
