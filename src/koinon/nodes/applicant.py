"""Whoever asks for a seat: it waits in line when there is none, and asks again when it was told to.

Knows nothing of what is done with a seat.
"""

from __future__ import annotations

import asyncio
import logging
import random

from koinon.nodes import messages as m
from koinon.nodes.follower import Office
from koinon.units import Seconds

log = logging.getLogger(__name__)
GOODBYE = Seconds(1.0)
_EARLIER = 0.8
"""Of the time until the next question, at least: a crowd that came at once does not come at once again."""


class Applicant:
    """`waiting`: what it was told last, while it waits."""

    def __init__(self, office: Office) -> None:
        self._office = office
        self.waiting: m.Waiting | None = None

    async def seat(self, message: m.Join) -> m.Welcome:
        """Ask until there is a seat. The same wish all the time: a repeated message is not taken for a new process.

        Raises Refused.
        """
        try:
            while True:
                answer = await self._office.insist(message, m.JOIN)
                if isinstance(answer, m.Welcome):
                    return answer
                assert isinstance(answer, m.Waiting | m.Later)
                if isinstance(answer, m.Waiting):
                    self._note(answer)
                await asyncio.sleep(answer.after * random.uniform(_EARLIER, 1.0))
        finally:
            self.waiting = None

    async def withdraw(self) -> None:
        """Nobody need keep a place for this node. Raises PeerError."""
        if self.waiting is not None:
            await self._office.ask(m.Withdraw(), m.JOIN, deadline=GOODBYE)

    def _note(self, told: m.Waiting) -> None:
        before, self.waiting = self.waiting, told
        if before is None or (before.ticket, before.position) != (told.ticket, told.position):
            log.info("waiting for a seat: number %s, place %s in line, %s", told.ticket, told.position, told.why)
