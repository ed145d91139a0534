"""The reception: what the control process does for strangers who have no seat (yet), on `koinon/join/1`.

It tells what the run is, lets its link be measured, and looks whether the asker can be seen from outside. Everything is
rationed per key and in all, at the header, before a body is read; what is refused says when to ask again.
Limits per network (/24, /48) would belong here too: the transport does not tell where a peer calls from.
Knows nothing of how seats are given.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version

from koinon.errors import DeadlinePassed, PeerError, Refused
from koinon.net.allowance import Allowance, Rate
from koinon.net.identity import NodeKey
from koinon.net.passes import AddressRecord, announce
from koinon.net.transport import PROTOCOL, Answer, NodeAddr, Transport
from koinon.nodes import join_messages as j
from koinon.nodes import messages as m
from koinon.nodes.clock import loop_time
from koinon.nodes.switchboard import Switchboard
from koinon.run.spec import RunSpec
from koinon.run.state import RunState, SeatStatus
from koinon.units import Bytes, PeerId, RunId, Seconds

Dialler = Callable[[], Transport]
"""A fresh node that nobody has heard of: whom it reaches, any newcomer reaches."""
KNOCKS = Rate(30, 1.0), Rate(300, 100.0)
PROBES = Rate(200, 4.0), Rate(2000, 400.0)
PROBED_BYTES = Rate(32 * 2**20, 2**18), Rate(256 * 2**20, 32 * 2**20)
REACHES = Rate(6, 0.1), Rate(40, 2.0)
AT_ONCE = 8
"""Bodies of probes in memory, and dials back, at one time."""
LOOK = Seconds(4.0)
"""How long one address is given to answer."""
WHEREABOUTS_LAST = Seconds(30 * 86400.0)


class Reception:
    """Registers its handlers on the board. `state`: the run as it stands. `dialler` makes nodes for looking back."""

    def __init__(
        self,
        spec: RunSpec,
        state: Callable[[], RunState],
        board: Switchboard,
        key: NodeKey,
        dialler: Dialler,
        *,
        clock: Callable[[], float] = loop_time,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._spec, self._toml, self._state, self._key = spec, spec.to_toml(), state, key
        self._dialler, self._clock, self._now = dialler, clock, now
        self._addresses: tuple[str, ...] = ()
        self._knocks, self._probes, self._bytes, self._reaches = (
            Allowance(*rates) for rates in (KNOCKS, PROBES, PROBED_BYTES, REACHES)
        )
        self._bodies: set[tuple[PeerId, int]] = set()
        self._looking: set[PeerId] = set()
        board.on(j.Knock, self._on_knock)
        board.on(j.Probe, self._on_probe, self._probe_limit, self._probe_abandoned)
        board.on(j.Reach, self._on_reach)
        board.on(j.Whereabouts, self._on_whereabouts)

    def open_at(self, addresses: tuple[str, ...]) -> None:
        """Where this node can be reached, for those who ask."""
        self._addresses = addresses

    # --- the run

    async def _on_knock(self, peer: PeerId, _message: j.Knock, _body: bytearray) -> Answer:
        self._ration(self._knocks, peer, 1, "knocked")
        state = self._state()
        seated = state.member_of(peer)
        return j.Opened(
            run=self._spec.run_id,
            spec=self._toml,
            phase=state.phase.value,
            reason=state.reason,
            step=state.step,
            now=self._now(),
            taken=sum(seat.status is not SeatStatus.LEFT for seat in state.seats.values()),
            places=self._spec.league.max_workers,
            has_seat=seated is not None and seated.status is not SeatStatus.LEFT,
            protocol=PROTOCOL,
            build=version("koinon"),
            whereabouts=self._record(),
        )

    async def _on_whereabouts(self, peer: PeerId, message: j.Whereabouts, _body: bytearray) -> Answer:
        self._ration(self._knocks, peer, 1, "asked")
        if message.run != self._spec.run_id:
            raise Refused(f"This node is of run {self._spec.run_id[:10]}, not of {message.run[:10]}.")
        return j.Known(self._record())

    def _record(self) -> AddressRecord:
        now = int(self._now())
        return announce(
            self._key,
            run=RunId(self._spec.run_id),
            addresses=self._addresses,
            sequence=now,
            expiry=now + int(WHEREABOUTS_LAST.value),
        )

    # --- the link

    def _probe_limit(self, peer: PeerId, message: j.Probe) -> int:
        """At the header: the body is admitted, and its room reserved, or refused."""
        if max(message.nbytes, message.back) > j.PROBE_LIMIT:
            raise Refused(f"A probe brings and asks for {Bytes(j.PROBE_LIMIT)} at most.")
        if len(self._bodies) >= AT_ONCE or any(other == peer for other, _ in self._bodies):
            raise Refused("Another link is being measured: ask again in a moment.")
        self._ration(self._probes, peer, 1, "measured")
        self._ration(self._bytes, peer, message.nbytes + message.back, "measured")
        self._bodies.add((peer, id(message)))
        return int(message.nbytes)

    def _probe_abandoned(self, peer: PeerId, message: j.Probe) -> None:
        self._bodies.discard((peer, id(message)))

    async def _on_probe(self, peer: PeerId, message: j.Probe, _body: bytearray) -> Answer:
        self._bodies.discard((peer, id(message)))
        return j.Probed(message.back), bytes(message.back)

    # --- the way back

    async def _on_reach(self, peer: PeerId, message: j.Reach, _body: bytearray) -> Answer:
        if not 1 <= len(message.addresses) <= j.ADDRESS_LIMIT:
            raise Refused(f"Name 1 to {j.ADDRESS_LIMIT} addresses to be looked for at.")
        if peer in self._looking or len(self._looking) >= AT_ONCE:
            raise Refused("Somebody is being looked for: ask again in a moment.")
        self._ration(self._reaches, peer, 1, "asked to be looked for")
        self._looking.add(peer)
        try:
            answers = await asyncio.gather(*(self._look(peer, address) for address in message.addresses))
        finally:
            self._looking.discard(peer)
        return j.Reached(tuple(answers))

    async def _look(self, peer: PeerId, address: str) -> str:
        """What the address answers to a node that it has never heard of; "" if the peer is there."""
        async with stranger(self._dialler) as node:
            node.learn(NodeAddr(peer, (address,)))
            try:
                await node.request(peer, m.JOIN, j.Wave(), deadline=LOOK)
            except PeerError as error:
                return answer_at(address, error)
        return ""

    def _ration(self, allowance: Allowance, peer: PeerId, amount: float, done: str) -> None:
        if (wait := allowance.take(peer, amount, self._clock())).value:
            raise Refused(f"You have {done} too often: ask again in {wait}.")


@asynccontextmanager
async def stranger(dialler: Dialler) -> AsyncIterator[Transport]:
    """A node of its own, gone afterwards, that answers nobody."""
    node = dialler()
    try:
        await node.start(Switchboard(Bytes(j.PROBE_LIMIT)).services())
        yield node
    finally:
        await node.close()


def answer_at(address: str, error: PeerError) -> str:
    """What an error says about one address."""
    if isinstance(error, DeadlinePassed):
        return "no answer"
    tried = getattr(error, "tried", {})
    return str(tried.get(address) or next(iter(tried.values()), "") or error)


__all__ = ["Dialler", "Reception", "answer_at", "stranger"]
