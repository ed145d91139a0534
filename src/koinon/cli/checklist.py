"""Findings as a checklist: signs and colours on a terminal, words anywhere else. Knows nothing of what is checked."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from koinon.cli.view import QUIET
from koinon.nodes.findings import Finding, Verdict

SIGNS = {Verdict.GOOD: ("✓", "green"), Verdict.DOUBTFUL: ("!", "yellow"), Verdict.BAD: ("✗", "bold red")}
WORDS = {Verdict.GOOD: "ok", Verdict.DOUBTFUL: "note", Verdict.BAD: "FAILED"}
HOP = 27
"""Columns of the longest hop's name."""


class Checklist:
    """One line per finding, and below it what to do. Use as a context manager: a bar may be on the screen."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_bar()

    def show(self, finding: Finding) -> None:
        self._end_bar()
        self._console.print(line(finding, signs=self._console.is_terminal))
        if finding.remedy:
            self._console.print(
                Text(f"  {'':{HOP}}  {finding.remedy}" if self._console.is_terminal else f"       {finding.remedy}")
            )

    def progress(self, share: float) -> None:
        """How far the calibration is, of 1."""
        if not self._console.is_terminal:
            return
        if self._bar is None:
            columns = TextColumn(f"… {'compute':{HOP}}", style=QUIET), BarColumn(bar_width=40)
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.add_task("", total=1.0)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=share)

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def line(finding: Finding, *, signs: bool) -> Text:
    """A finding in one line."""
    if not signs:
        return Text(f"{WORDS[finding.verdict]:7}{finding.hop}: {finding.found}")
    sign, style = SIGNS[finding.verdict]
    return Text.assemble(
        (sign, style),
        f" {finding.hop:{HOP}}  ",
        (finding.found, style if finding.verdict is Verdict.BAD else "default"),
    )
