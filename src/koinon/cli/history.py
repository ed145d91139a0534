"""A run's log, read beside whoever writes it. Knows nothing of how it is shown."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from koinon.cli.sources import spec_in
from koinon.nodes.rundir import RunDir
from koinon.run import events as ev
from koinon.run.reader import LogReader
from koinon.run.spec import RunSpec
from koinon.run.state import RunState, apply


class History:
    """The events of a run's log with the state after each. Raises NotARun, SpecError; reading raises LogCorrupt."""

    def __init__(self, directory: Path) -> None:
        self.directory = RunDir(directory)
        self.spec: RunSpec = spec_in(directory)
        self.state = RunState()
        self._reader: LogReader[ev.Event] = LogReader(self.directory.log, run=self.spec.run_id, decode=ev.decode)

    def poll(self) -> Iterator[tuple[ev.Event, RunState]]:
        """What was written since the last poll."""
        for event in self._reader.poll():
            self.state = apply(self.state, event)
            yield event, self.state

    def is_being_written(self) -> bool:
        """Whether a process has the log open for writing."""
        try:
            lock = os.open(self.directory.log.with_name(f"{self.directory.log.name}.lock"), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False
