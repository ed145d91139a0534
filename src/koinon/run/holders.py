"""Who signs in which term of a log that lies on a disk, as that log itself says it.

The first event names the first coordinator, and each succession names the next. A log cannot prove that a successor was
entitled to succeed: that is what the term store says, to those who can ask it. Knows nothing of term stores.
"""

from __future__ import annotations

from pathlib import Path

from koinon.run import events as ev
from koinon.run.reader import LogReader
from koinon.run.record import Issuer
from koinon.run.state import fold
from koinon.units import PeerId, RunId


def issuer_in(path: Path, run: RunId) -> Issuer:
    """For `RunLog.open` and `LogReader`. Reads the log once, unsigned. Raises NotARun, LogCorrupt."""
    with LogReader(path, run=run, decode=ev.decode) as reader:
        state = fold(
            event for event in reader.poll() if isinstance(event, ev.RunOpened | ev.TermBegan | ev.Equivocated)
        )  # fmt: skip
    return lambda term: PeerId(state.holder_of(term)) if state.holders else None
