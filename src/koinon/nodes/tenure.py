"""Holding a term: renewing its lease while this node coordinates, and noticing that it is over.

Knows nothing of what is written in the term.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from koinon.errors import Fenced, StateError
from koinon.nodes.clock import loop_time
from koinon.run.policies.deadlines import History, observe
from koinon.run.record import Head
from koinon.run.terms import RENEW_EVERY, Term, TermStore, lease_length
from koinon.units import PeerId, Seconds

log = logging.getLogger(__name__)


class Tenure:
    """This node's term. `take` one, `begin` it where its history starts, `keep` it until it is lost."""

    def __init__(self, store: TermStore, me: PeerId, *, clock: Callable[[], float] = loop_time) -> None:
        self.store, self.number = store, 0
        self._me, self._clock = me, clock
        self._renewals, self._renewed = History(), clock()

    async def take(self, number: int, *, after: int, head: Head, addresses: tuple[str, ...]) -> None:
        """Raises TermRefused: another was quicker, or holds a term that has not run out."""
        wanted = Term(
            number=number,
            holder=self._me,
            addresses=addresses,
            not_after=0.0,
            seq=head.seq,
            head=head.hash.hex(),
        )
        await self.store.take(wanted, after=after, lease=lease_length(self._renewals))
        self.number, self._renewed = number, self._clock()

    async def begin(self, head: Head) -> None:
        """From here on the log is signed in this term. Raises Fenced."""
        await self.store.renew(self.number, self._me, lease=lease_length(self._renewals), begins=head)
        self._note()

    async def keep(self, lost: Callable[[Fenced], None]) -> None:
        """Renew until the term is over, which `lost` is told. A store that fails for a while is asked again."""
        while True:
            await asyncio.sleep(RENEW_EVERY.value)
            try:
                await self.store.renew(self.number, self._me, lease=lease_length(self._renewals))
            except Fenced as fenced:
                lost(fenced)
                return
            except StateError as error:
                log.warning("term %s was not renewed: %s", self.number, error)
            else:
                self._note()

    def _note(self) -> None:
        now = self._clock()
        self._renewals, self._renewed = observe(self._renewals, Seconds(now - self._renewed)), now
