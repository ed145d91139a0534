"""A member's own pass: shown in every hello, renewed when half of its life is over.

Knows nothing of who checks it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec

from koinon.errors import Refused
from koinon.net.passes import Pass
from koinon.net.transport import Hello, Transport
from koinon.nodes import messages as m
from koinon.nodes.follower import Office
from koinon.units import RunId

log = logging.getLogger(__name__)
_SOONEST = 1.0
"""Seconds between two renewals, whatever this machine's clock says."""


class PassKeeper:
    """`held`: the pass that new connections show."""

    def __init__(
        self, transport: Transport, office: Office, run: RunId, *, now: Callable[[], float] = time.time
    ) -> None:
        self._transport, self._office, self._run, self._now = transport, office, run, now
        self.held: Pass | None = None

    def hold(self, encoded: bytes) -> None:
        """Show this pass from now on. Raises msgspec.DecodeError on what is none."""
        self.held = msgspec.msgpack.decode(encoded, type=Pass)
        self._transport.introduce(Hello(run=self._run, shown=self.held))

    async def keep(self, member: int) -> None:
        """Renew it at half-life, as long as the coordinator does. Ends with the task, or when the seat is lost."""
        while self.held is not None:
            await asyncio.sleep(max(_SOONEST, (self.held.not_after - self._now()) / 2))
            try:
                renewed = await self._office.insist(m.Renew(member))
            except Refused as refusal:
                log.info("the pass was not renewed: %s", refusal)
                return
            assert isinstance(renewed, m.Renewed)
            self.hold(renewed.signed_pass)
