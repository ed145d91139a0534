"""A node's copy of the run: the log as the coordinator pushes it, folded into a state.

Every role on every machine has one. Records are verified (chain, signature, and that the term store still knows their
sender's term) before they are folded, by the same `apply` as everywhere. The newest ones stay in memory: a successor
asks for them, and followers compare them, so that a coordinator with two stories is found out.
Knows nothing of what a role does with an event.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from random import Random
from typing import Protocol

from koinon.errors import ChainBroken, LogGap, PeerError, PeerUnreachable, Refused, StateError, TwoHeads
from koinon.net.transport import Answer, NodeAddr, Reply, Transport
from koinon.nodes import messages as m
from koinon.nodes.publisher import batch
from koinon.nodes.switchboard import Switchboard
from koinon.run import events as ev
from koinon.run.record import Equivocation, Follower, Head, Record, decode_record
from koinon.run.state import RunState, SeatStatus, apply
from koinon.run.terms import Book, Term, TermStore, is_expired
from koinon.units import PeerId, RunId, Seconds

log = logging.getLogger(__name__)
EVIDENCE_KEPT = 16
LOOK = Seconds(1.0)
"""How often the term store is asked for a successor while the coordinator does not answer."""
COMPARE = Seconds(3.0)
"""How often a follower shows another its newest record."""
REFUSALS = 3
Listener = Callable[[ev.Event, RunState], None]
Keep = Callable[[Sequence[Record]], None]


class Office(Protocol):
    """Whoever coordinates: for those to whom it is all the same who that is just now."""

    async def ask(self, message: m.Message, alpn: str = m.CTL, *, deadline: Seconds | None = None) -> m.Message:
        """One request. Raises PeerErrors."""

    async def insist(self, message: m.Message, alpn: str = m.CTL) -> m.Message:
        """The same until there is an answer; for messages that are safe to repeat. Raises Refused."""


class RunFollower:
    """Follows one run's log. `state` is current up to `next_seq`; listeners hear each event after it was folded.

    terms: who may write; without it, `coordinator` does for ever. held: the copy that lies on this node's disk already.
    keep: called with verified records before they are folded.
    """

    def __init__(
        self,
        transport: Transport,
        board: Switchboard,
        coordinator: PeerId,
        run: RunId,
        *,
        terms: TermStore | None = None,
        held: tuple[Head, RunState] | None = None,
        keep: Keep | None = None,
        stands_by: bool = False,
        looks_on: bool = False,
    ) -> None:
        self.state = RunState() if held is None else held[1]
        self.coordinator = coordinator
        """Whom this node heeds: the sender of the newest record, or who was named to begin with."""
        self.keep, self.is_astray = keep, False
        """Whether this copy holds records that the history of a later term does not have."""
        self.went_astray: Callable[[], None] = _nothing
        self._transport, self._run, self._terms = transport, run, terms
        self._stands_by, self._looks_on = stands_by, looks_on
        self._founder, self._book, self._promised = coordinator, Book(run), 0
        self._follower = Follower(run, self.issuer) if held is None else Follower(run, self.issuer, held[0])
        self._addresses: tuple[str, ...] = ()
        self._refusals = 0
        self._random = Random(transport.me)
        self.evidence: deque[Equivocation] = deque(maxlen=EVIDENCE_KEPT)
        """Pairs of records that convict a coordinator of two heads. None of it was folded."""
        self._listeners: list[Listener] = []
        self._asking: set[asyncio.Task[Reply]] = set()
        self._meet_all()
        board.on(m.Records, self._records, lambda _peer, _message: 0)
        board.on(m.TailWanted, self._on_tail_wanted)
        board.on(m.Shown, self._on_shown)

    @property
    def next_seq(self) -> int:
        return self._follower.head.seq + 1

    @property
    def head(self) -> Head:
        return self._follower.head

    @property
    def book(self) -> Book:
        """The term store's book as last seen."""
        return self._book

    def listen(self, listener: Listener) -> None:
        self._listeners.append(listener)

    async def start(self, addresses: tuple[str, ...]) -> None:
        """Ask the coordinator for the log from where this copy ends."""
        self._addresses = addresses
        await self.insist(self._wish())

    async def ask(self, message: m.Message, alpn: str = m.CTL, *, deadline: Seconds | None = None) -> m.Message:
        """One request to the coordinator. Raises PeerErrors; at once, if another coordinates meanwhile."""
        asked = asyncio.create_task(self._transport.request(self.coordinator, alpn, message, deadline=deadline))
        self._asking.add(asked)
        try:
            await asyncio.wait([asked])
            if asked.cancelled():
                raise PeerUnreachable(self.coordinator, {"coordinator": "another has taken its place: ask that one"})
            reply = asked.result()
        finally:
            asked.cancel()
            self._asking.discard(asked)
        assert isinstance(reply.header, m.Message)
        return reply.header

    async def insist(self, message: m.Message, alpn: str = m.CTL) -> m.Message:
        """The same until whoever coordinates by then has answered; for messages that are safe to repeat.

        Raises Refused when the coordinator says no: that is an answer. Ends with the task that awaits it.
        """
        return await repeated(lambda: self.ask(message, alpn))

    def _wish(self) -> m.Follow:
        return m.Follow(self.next_seq, self._addresses, self._stands_by, self._looks_on)

    def take_office(self) -> None:
        """This node coordinates from now on: it follows its own log, which the coordinator keeps."""
        self.coordinator, self.keep, self._stands_by = self._transport.me, None, False

    def restart(self, head: Head, state: RunState) -> None:
        """Go on from an earlier place: what came behind it was not the history of the run."""
        self._follower, self.state, self.is_astray = Follower(self._run, self.issuer, head), state, False
        self._meet_all()

    # --- terms

    async def look(self) -> Term | None:
        """Ask the term store who writes now; None where there is no store, or no term yet. Raises StateError."""
        if self._terms is None:
            return None
        self._book = await self._terms.book()
        current = self._book.current
        if current is not None and current.addresses and current.holder != self._transport.me:
            self._transport.learn(NodeAddr(PeerId(current.holder), current.addresses))
        return current

    async def seek(self) -> None:
        """The coordinator does not answer: if another has begun a term, ask that one for the log.

        It is heeded once it has sent the record with which its term begins; by a node without any state, at once.
        """
        with contextlib.suppress(PeerError, StateError):
            current = await self.look()
            if current is None or not current.begun or current.number <= self.head.term:
                return
            self._see_whether_astray()
            if not self._has_part():
                self._heed(PeerId(current.holder))
                return
            try:
                await self._transport.request(PeerId(current.holder), m.CTL, self._wish())
            except Refused:
                self._refusals += 1
                if self._refusals >= REFUSALS:  # it does not know us: our seat was given by somebody it never heard
                    self._go_astray()

    async def keep_seeking(self) -> None:
        """For as long as the task lives: look for successors, and compare heads with other followers."""
        if self._terms is None:
            return
        rounds = 0
        while True:
            await asyncio.sleep(LOOK.value)
            await self.seek()
            rounds += 1
            if rounds * LOOK.value >= COMPARE.value:
                rounds = 0
                await self.compare_heads()

    def _heed(self, holder: PeerId) -> None:
        """From now on this is the coordinator: what still waits for the former one's answer is asked again, here."""
        if holder != self.coordinator:
            self.coordinator = holder
            for asked in list(self._asking):
                asked.cancel()

    def _has_part(self) -> bool:
        """Whether somebody sends this node the log. Without a seat it knows nothing that it could hold on to."""
        if self._stands_by or self._looks_on:
            return bool(self.state.run)
        return self.state.member_of(self._transport.me) is not None

    def _see_whether_astray(self) -> None:
        fork = self._book.fork_after(self.head.term)
        if fork is None or self.head.seq < fork.seq:
            return
        if self.head.seq > fork.seq or self.head.hash.hex() != fork.head:
            self._go_astray()

    def _go_astray(self) -> None:
        if not self.is_astray:
            log.warning("This copy of the log holds records that the history of a later term does not have.")
            self.is_astray = True
            self.went_astray()

    def issuer(self, term: int) -> PeerId | None:
        """Who signs in that term; None: nobody yet."""
        return self._book.holder_of(term) if self._book.terms else self._founder

    async def _check_sender(self, peer: PeerId) -> None:
        """Raises Refused unless the term store lets `peer` write now."""
        current = await self.look()
        if current is None or self._terms is None:
            if peer != self.coordinator:
                raise Refused("Only the coordinator of the run pushes its log.")
            return
        if peer != current.holder or current.number < max(self._promised, self.head.term):
            raise Refused(f"{current.holder[:10]} holds term {current.number} of this run: nobody else pushes its log.")
        if current.revoked:
            raise Refused(f"Term {current.number} was revoked: its holder signed two histories.")
        if peer != self._transport.me and is_expired(current, self._terms.now(), self._terms.grace):
            raise Refused(f"The lease of term {current.number} has run out: renew it.")

    # --- records

    async def _records(self, peer: PeerId, message: m.Records, _body: bytearray) -> Answer:
        await self._check_sender(peer)
        try:
            self.adopt([decode_record(raw) for raw in message.records])
        except LogGap:
            return m.Ack(self.next_seq)  # from here on, please
        except ChainBroken:
            self._see_whether_astray()
            raise
        except TwoHeads as caught:  # the answer goes to the culprit: whoever runs this node has to hear of it too
            log.error("%s", caught)  # noqa: TRY400 - the sentence is the message
            if isinstance(proof := caught.evidence, Equivocation):
                await self._accuse(proof)
            raise
        if peer != (former := self.coordinator):
            self._heed(peer)
            if former != self._transport.me:
                self._transport.hang_up(former, "its term is over")
        return m.Ack(self.next_seq)

    def adopt(self, records: Sequence[Record]) -> None:
        """Verify, keep and fold. Raises RecordRefused, and then nothing was taken."""
        twins = self._follower.accept_all(records)
        if self.keep is not None and records[twins:]:
            self.keep(records[twins:])
        for record in records[twins:]:
            self._take(ev.decode(record.event))

    def _take(self, event: ev.Event) -> None:
        self.state = apply(self.state, event)
        self._meet(event)
        for listener in self._listeners:
            listener(event, self.state)

    def _meet_all(self) -> None:
        """Members that this copy knows from a disk."""
        for seat in self.state.seats.values():
            if seat.status is not SeatStatus.LEFT:
                self._transport.learn(NodeAddr(PeerId(seat.worker), seat.addresses))

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

    # --- what others ask for

    async def _on_tail_wanted(self, peer: PeerId, message: m.TailWanted, _body: bytearray) -> Answer:
        current = await self.look()
        if current is None or peer != current.holder or message.term != current.number:
            raise Refused("Only the holder of the newest term is given what others hold of the log.")
        self._promised = max(self._promised, message.term)
        encoded = (record.encode() for record in self._follower.recent(message.first))
        return m.Tail(tuple(batch(encoded)), self.head.seq)

    async def compare_heads(self) -> None:
        """Show the newest record to another follower, drawn anew each time."""
        shown, others = self._follower.recent(self.head.seq), self._others()
        if not shown or not others:
            return
        with contextlib.suppress(PeerError):
            reply = await self._transport.request(self._random.choice(others), m.CTL, m.Shown(shown[0].encode()))
            assert isinstance(reply.header, m.Seen)
            if reply.header.record:
                await self._judge(decode_record(reply.header.record))

    def _others(self) -> list[PeerId]:
        seats = self.state.seats.values()
        return [PeerId(s.worker) for s in seats if s.status is not SeatStatus.LEFT and s.worker != self._transport.me]

    async def _on_shown(self, _peer: PeerId, message: m.Shown, _body: bytearray) -> Answer:
        proof = await self._judge(decode_record(message.record))
        return m.Seen(b"" if proof is None else proof.first.encode())

    async def _judge(self, record: Record) -> Equivocation | None:
        proof = self._follower.clash(record)
        if proof is not None:
            log.error("%s", TwoHeads(record.seq, record.term, proof))
            await self._accuse(proof)
        return proof

    async def _accuse(self, proof: Equivocation) -> None:
        """Keep the proof, and end the culprit's term."""
        if proof not in self.evidence:
            self.evidence.append(proof)
        if self._terms is not None:
            with contextlib.suppress(StateError):
                await self._terms.revoke(proof)


def _nothing() -> None:
    """Nobody minds."""


async def insist(transport: Transport, peer: PeerId, alpn: str, message: m.Message, *, pause: float = 0.2) -> m.Message:
    """A request that is repeated until the peer answers; for messages that are safe to repeat.

    Raises Refused when the peer says no: that is an answer. Ends with the task that awaits it.
    """

    async def once() -> m.Message:
        reply = await transport.request(peer, alpn, message)
        assert isinstance(reply.header, m.Message)
        return reply.header

    return await repeated(once, pause=pause)


async def repeated(once: Callable[[], Awaitable[m.Message]], *, pause: float = 0.2) -> m.Message:
    """Call until there is an answer; a refusal is one, and raised."""
    while True:
        try:
            return await once()
        except Refused:
            raise
        except PeerError:
            await asyncio.sleep(pause)
            pause = min(2 * pause, 5.0)
