"""How long and how wide the link to a peer is, by `Probe`s: a few megabytes at most, and about a second each way.

Knows nothing of what is good enough.
"""

from __future__ import annotations

import asyncio
from statistics import median
from typing import Final

from koinon.net.transport import Transport
from koinon.nodes import join_messages as j
from koinon.nodes import messages as m
from koinon.units import BitsPerSecond, Bytes, PeerId, Seconds

ECHOES: Final = 5
GROWTH: Final = 4
"""From one size to the next."""
SIZES: Final = (*(j.PROBE_LIMIT // GROWTH**n for n in (2, 1, 0)), *(j.PROBE_LIMIT,) * 3)
"""Bytes of one measurement after the other: a slow link is not kept busy for long, a fast one shows itself."""
ENOUGH: Final = Seconds(1.5)
ANSWER: Final = Seconds(5.0)
SLOWEST: Final = BitsPerSecond.mbit(0.1)
"""Below it nothing is measured any more."""


class LinkMeter:
    """Measures over `transport`, which knows where `peer` is. Everything raises PeerErrors."""

    def __init__(self, transport: Transport, peer: PeerId) -> None:
        self._transport, self._peer = transport, peer

    async def rtt(self) -> Seconds:
        """Of an empty exchange; the median of a few."""
        return Seconds(median([await self._probe(0, 0) for _ in range(ECHOES)]))

    async def up(self, rtt: Seconds) -> BitsPerSecond:
        """The best that one exchange has shown, less one round trip."""
        return await self._rate(rtt, up=1, back=0)

    async def down(self, rtt: Seconds) -> BitsPerSecond:
        return await self._rate(rtt, up=0, back=1)

    async def _rate(self, rtt: Seconds, *, up: int, back: int) -> BitsPerSecond:
        best, spent = 0.0, 0.0
        for size in SIZES:
            took = await self._probe(up * size, back * size)
            best = max(best, 8 * size / max(took - rtt.value, took / 2))
            spent += took
            if spent > ENOUGH.value or GROWTH * took > ENOUGH.value:
                break
        return BitsPerSecond(best)

    async def _probe(self, up: int, back: int) -> float:
        clock = asyncio.get_running_loop().time
        began, patience = clock(), ANSWER + Bytes(up + back).over(SLOWEST)
        await self._transport.request(self._peer, m.JOIN, j.Probe(back, up), bytes(up), deadline=patience)
        return clock() - began
