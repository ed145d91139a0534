"""A member that introduces: it tells whoever holds an old invitation where the coordinator is now.

It passes on a record that the coordinator signed, so all it can do wrong is to keep it back. Knows nothing of runs.
"""

from __future__ import annotations

from koinon.errors import Refused
from koinon.net.allowance import Allowance, Rate
from koinon.net.passes import AddressRecord
from koinon.net.transport import Answer
from koinon.nodes import join_messages as j
from koinon.nodes.clock import loop_time
from koinon.nodes.switchboard import Switchboard
from koinon.units import PeerId

ASKED = Rate(10, 1.0), Rate(100, 20.0)


class Introducer:
    """Registers its handlers on the board: `Whereabouts`, and `Wave` for those who look whether this node is there."""

    def __init__(self, board: Switchboard, record: AddressRecord | None) -> None:
        self._record = record
        self._allowance = Allowance(*ASKED)
        board.on(j.Whereabouts, self._on_whereabouts)
        board.on(j.Wave, self._on_wave)

    async def _on_whereabouts(self, peer: PeerId, message: j.Whereabouts, _body: bytearray) -> Answer:
        if (wait := self._allowance.take(peer, 1, loop_time())).value:
            raise Refused(f"You have asked too often: ask again in {wait}.")
        if self._record is None or self._record.run != message.run:
            raise Refused(f"This node does not know run {message.run[:10]}.")
        return j.Known(self._record)

    async def _on_wave(self, _peer: PeerId, _message: j.Wave, _body: bytearray) -> Answer:
        return j.Waved()
