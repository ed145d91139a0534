"""What a worker's process tells whoever started it. For people; nothing decides by it but when to look at the log."""

from __future__ import annotations

import msgspec


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`state`: joining, waiting, syncing, idle, working or ended. `phase` and `reason`: of the run, as its log says."""

    state: str
    phase: str = ""
    reason: str = ""
    stage: int | None = None
    seat: int | None = None
    step: int = 0
    items: int = 0
    tokens: int = 0
    """Folded since the process started."""
    received: int = 0
    """Bytes from all peers together."""
    error: str = ""
    is_refused: bool = False
    """The error is the coordinator's no."""
    ticket: int = 0
    """Queue number, while it waits for a seat."""
    position: int = 0
    waits_for: str = ""
