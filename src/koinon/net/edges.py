"""What went over each edge: bytes per ALPN, counted where they are handed to the carrier, and when a peer was heard.

Shared by both transports. Knows nothing of connections.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from koinon.units import PeerId


@dataclass(slots=True)
class Count:
    """Bytes of one (peer, ALPN), both ways: headers, bodies and the transport's own words."""

    sent: int = 0
    received: int = 0
    heard: float = 0.0


class Edges:
    """Counts per peer and ALPN. They survive reconnections."""

    def __init__(self) -> None:
        self._counts: dict[PeerId, dict[str, Count]] = {}

    def count(self, peer: PeerId, alpn: str) -> Count:
        """The counter to add to; the same object every time."""
        return self._counts.setdefault(peer, {}).setdefault(alpn, Count())

    def forget(self, peer: PeerId) -> None:
        """A stranger that is gone: node keys are free, so they are not counted for ever."""
        self._counts.pop(peer, None)

    def peers(self) -> Iterable[PeerId]:
        return self._counts.keys()

    def sent(self, peer: PeerId) -> dict[str, int]:
        return {alpn: c.sent for alpn, c in self._counts[peer].items()}

    def received(self, peer: PeerId) -> dict[str, int]:
        return {alpn: c.received for alpn, c in self._counts[peer].items()}

    def heard(self, peer: PeerId) -> float:
        return max((c.heard for c in self._counts[peer].values()), default=0.0)
