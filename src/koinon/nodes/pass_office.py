"""Where the coordinator issues passes: with a seat, and anew for a member that asks before its own expires.

A pass is good for a quarter of an hour and is renewed at half of it, so a coordinator may be gone for minutes and
nobody is shut out. Knows nothing of how seats are given.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from koinon.errors import Refused
from koinon.net.identity import NodeKey
from koinon.net.passes import issue
from koinon.net.transport import Answer
from koinon.nodes import messages as m
from koinon.nodes.switchboard import Switchboard
from koinon.run.state import RunState, Seat
from koinon.units import PeerId, Seconds

LIFETIME = Seconds(15 * 60)


class PassOffice:
    """Registers `Renew` on the board. `key`: the coordinator's, which signs."""

    def __init__(
        self,
        key: NodeKey,
        state: Callable[[], RunState],
        board: Switchboard,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._key, self._state, self._now = key, state, now
        board.on(m.Renew, self._on_renew)

    def issued(self, seat: Seat) -> bytes:
        """A pass for that seat, encoded."""
        state = self._state()
        shown = issue(
            self._key,
            run=state.run,
            node=PeerId(seat.worker),
            account=seat.account,
            role="worker",
            stage=seat.stage,
            term=state.term,
            not_after=int(self._now() + LIFETIME.value),
            member=seat.member,
        )
        return msgspec.msgpack.encode(shown)

    async def _on_renew(self, peer: PeerId, message: m.Renew, _body: bytearray) -> Answer:
        seat = self._state().member_of(peer)
        if seat is None or seat.member != message.member:
            raise Refused("You have no seat in this run (any more), so there is no pass to renew: ask for a seat.")
        return m.Renewed(self.issued(seat))
