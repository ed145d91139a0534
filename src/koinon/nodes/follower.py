"""A node's copy of the run: the log as the coordinator pushes it, folded into a state.

Every role on every machine has one. Records are verified (chain and signature) before they are folded, by the same
`apply` as everywhere. Knows nothing of what a role does with an event.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from koinon.errors import LogGap, PeerError, Refused, TwoHeads
from koinon.net.transport import Answer, NodeAddr, Transport
from koinon.nodes import messages as m
from koinon.nodes.switchboard import Switchboard
from koinon.run import events as ev
from koinon.run.record import Follower, decode_record
from koinon.run.state import RunState, apply
from koinon.units import PeerId, RunId

log = logging.getLogger(__name__)
EVIDENCE_KEPT = 16
Listener = Callable[[ev.Event, RunState], None]


class RunFollower:
    """Follows one run's log. `state` is current up to `next_seq`; listeners hear each event after it was folded."""

    def __init__(self, transport: Transport, board: Switchboard, coordinator: PeerId, run: RunId) -> None:
        self.state = RunState()
        self._transport, self._coordinator = transport, coordinator
        self._follower = Follower(run, coordinator)
        self.evidence: deque[object] = deque(maxlen=EVIDENCE_KEPT)
        """Pairs of records that convict the coordinator of two heads. None of it was folded."""
        self._listeners: list[Listener] = []
        board.on(m.Records, self._records, lambda _peer, _message: 0)

    @property
    def next_seq(self) -> int:
        return self._follower.head.seq + 1

    def listen(self, listener: Listener) -> None:
        self._listeners.append(listener)

    async def start(self, addresses: tuple[str, ...]) -> None:
        """Ask the coordinator for the log from where this copy ends."""
        await insist(self._transport, self._coordinator, m.CTL, m.Follow(self.next_seq, addresses))

    async def _records(self, peer: PeerId, message: m.Records, _body: bytearray) -> Answer:
        if peer != self._coordinator:
            raise Refused("Only the coordinator of the run pushes its log.")
        records = [decode_record(raw) for raw in message.records]
        try:
            twins = self._follower.accept_all(records)
        except LogGap:
            return m.Ack(self.next_seq)  # from here on, please
        except TwoHeads as caught:  # the answer goes to the culprit: whoever runs this node has to hear of it too
            log.error("%s", caught)  # noqa: TRY400 - the sentence is the message
            self.evidence.append(caught.evidence)
            raise
        for record in records[twins:]:
            self._take(ev.decode(record.event))
        return m.Ack(self.next_seq)

    def _take(self, event: ev.Event) -> None:
        self.state = apply(self.state, event)
        self._meet(event)
        for listener in self._listeners:
            listener(event, self.state)

    def _meet(self, event: ev.Event) -> None:
        """Learn where members can be reached, and who cannot be any more."""
        match event:
            case ev.Seated(worker=worker, addresses=addresses) if worker != self._transport.me:
                self._transport.learn(NodeAddr(PeerId(worker), addresses))
            case ev.SeatMoved(member=member, addresses=addresses) if member in self.state.seats:
                self._transport.learn(NodeAddr(PeerId(self.state.seats[member].worker), addresses))
            case ev.SeatLeft(member=member) if member in self.state.seats:
                # Nothing on the wire says that a killed process is gone: its connections look alive for half a minute.
                self._transport.hang_up(PeerId(self.state.seats[member].worker), "its seat is void")
            case ev.Revoked(worker=worker, reason=reason):
                self._transport.hang_up(PeerId(worker), f"its pass was revoked: {reason}")
            case _:
                pass


async def insist(transport: Transport, peer: PeerId, alpn: str, message: m.Message, *, pause: float = 0.2) -> m.Message:
    """A request that is repeated until the peer answers; for messages that are safe to repeat.

    Raises Refused when the peer says no: that is an answer. Ends with the task that awaits it.
    """
    while True:
        try:
            reply = await transport.request(peer, alpn, message)
        except Refused:
            raise
        except PeerError:
            await asyncio.sleep(pause)
            pause = min(2 * pause, 5.0)
        else:
            assert isinstance(reply.header, m.Message)
            return reply.header
