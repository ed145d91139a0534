"""Where strangers' frames wait, unread, so that they do not keep members waiting.

Each key has its rate, and all strangers together; and they go through one by one, giving way while this event loop has
other work. A frame that waits here is not in memory: QUIC's flow control holds it back at its sender.
Knows nothing of what frames say.
"""

from __future__ import annotations

import asyncio
from typing import Final

from koinon.net.allowance import Allowance, Rate
from koinon.units import PeerId

FRAMES: Final = Rate(60, 20.0), Rate(4000, 2000.0)
BUSY: Final = 0.01
"""Seconds for one round of the event loop, from which strangers give way: they get at most half of its time then."""
_MOST: Final = 0.25


class Turnstile:
    """One per node. `enter` returns when the peer's next frame may be read."""

    def __init__(self) -> None:
        self._frames = Allowance(*FRAMES, remembered=4096)
        self._one = asyncio.Lock()

    async def enter(self, peer: PeerId) -> None:
        clock = asyncio.get_running_loop().time
        while wait := self._frames.take(peer, 1, clock()).value:
            await asyncio.sleep(wait)
        async with self._one:
            began = clock()
            await asyncio.sleep(0)
            if (round_took := clock() - began) > BUSY:
                await asyncio.sleep(min(_MOST, round_took))
