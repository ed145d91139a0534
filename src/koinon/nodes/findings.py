"""What a check found: one value, whoever shows it. Knows nothing of what is checked."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from koinon.errors import MachineUnfit


class Verdict(StrEnum):
    GOOD = "good"
    DOUBTFUL = "doubtful"
    """It will work, and could be better."""
    BAD = "bad"
    """Joining is refused."""


@dataclass(frozen=True, slots=True)
class Finding:
    """`hop`: what was looked at. `found`: a sentence. `remedy`: what to do about it, where something is to be done."""

    hop: str
    verdict: Verdict
    found: str
    remedy: str = ""

    def as_error(self) -> MachineUnfit:
        return MachineUnfit(self.hop, self.found, self.remedy)


def good(hop: str, found: str) -> Finding:
    return Finding(hop, Verdict.GOOD, found)


def doubtful(hop: str, found: str, remedy: str) -> Finding:
    return Finding(hop, Verdict.DOUBTFUL, found, remedy)


def bad(hop: str, found: str, remedy: str) -> Finding:
    return Finding(hop, Verdict.BAD, found, remedy)
