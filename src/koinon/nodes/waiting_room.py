"""The coordinator's waiting room: who is given a seat now, and what those are told who are not.

Order and limits are `koinon.run.policies.admission`; tickets are events, written in batches. Here is only what a log
need not hold: who was heard when, and wishes that are not written yet. All of it is bounded by the line's length.
Knows nothing of stages.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from koinon.errors import Refused, StateError
from koinon.net.allowance import Allowance, Rate
from koinon.net.transport import Answer
from koinon.nodes import messages as m
from koinon.nodes.switchboard import Switchboard
from koinon.run import events as ev
from koinon.run.events import Ticket
from koinon.run.policies import admission
from koinon.run.policies.admission import Line, Wish
from koinon.run.state import Phase, RunState, SeatStatus
from koinon.units import PeerId

T = TypeVar("T")
LINGER = 0.05
"""Seconds in which wishes gather to be written as one record. A copy of a line of 10,000 takes a millisecond."""
BATCH = 200
"""Tickets in one event: under half of the largest header that may carry its record."""
UNDECIDED = 1024
"""Wishes that may wait to be written."""
ASKED = Rate(20, 1.0), Rate(4000, 1000.0)
TICKETS = Rate(2, 1 / 60), Rate(float(admission.LENGTH), 50.0)
"""New ones. They are in the log for ever: 50 in a second are half a gigabyte in a day."""
SWEEP = 5.0
REMEMBERED = 0.25
"""Seconds for which it is not computed anew whose turn it is, if nothing has happened."""
ACCOUNT, ADDRESS, ADDRESSES, WISH, SNAPSHOTS = 64, 64, 8, 64, 64
"""Longest of each that a `Join` may bring."""


@dataclass(frozen=True, slots=True)
class _Turn:
    """Whose turn it was found to be, and for which line, free seats and time that is true."""

    workers: frozenset[str] = frozenset()
    line: Line | None = None
    free: int = 0
    until: float = 0.0


class WaitingRoom:
    """`places`: seats of the league. `write`: into the run log. Registers `Withdraw` on the board."""

    def __init__(
        self,
        places: int,
        state: Callable[[], RunState],
        write: Callable[..., None],
        board: Switchboard,
        clock: Callable[[], float],
    ) -> None:
        self._places, self._state, self._write, self._clock = places, state, write, clock
        self._asked, self._tickets = Allowance(*ASKED), Allowance(*TICKETS)
        self._late: dict[str, float] = {}
        """When each who waits is called absent."""
        self._undecided: dict[str, tuple[Wish, asyncio.Future[None]]] = {}
        self._turn = _Turn()
        self._next_sweep = 0.0
        board.on(m.Withdraw, self._on_withdraw)

    def has_seat_for(self, peer: PeerId, message: m.Join) -> bool:
        """Whether the asker may sit down, now. Raises Refused for what is no wish, or for one whose key was revoked."""
        check(message)
        state = self._state()
        if peer in state.revoked:
            raise Refused(f"This node takes no part in the run any more: {state.revoked[peer]}")
        self._hear(state.line, peer)
        free = self._free(state)
        if free <= 0:
            return False
        turn = self._whose_turn(state, free)
        if peer in turn:
            return True
        return peer not in state.line.tickets and free > len(turn) + len(self._undecided)

    async def line_up(self, peer: PeerId, message: m.Join) -> m.Waiting | m.Later:
        """A place in the line, the one it has or a new one. Raises Refused when the line is full."""
        if peer in self._state().line.tickets:
            return self._waiting(peer)
        wish = Wish(peer, message.account)
        if peer not in self._undecided:
            if (wait := self._over(peer)) > 0:
                return m.Later(wait, "Many ask for a seat at this moment.")
            future = asyncio.get_running_loop().create_future()
            if not self._undecided:
                asyncio.get_running_loop().call_later(LINGER, self._decide)
            self._undecided[peer] = wish, future
        await asyncio.shield(self._undecided[peer][1])
        return self._waiting(peer)

    def tick(self) -> None:
        """Call it often. Those who were not heard for long lose their tickets."""
        now = self._clock()
        if now < self._next_sweep:
            return
        self._next_sweep = now + SWEEP
        state = self._state()
        line, seated = state.line, _seated(state)
        for worker in [worker for worker in self._late if worker not in line.tickets]:
            del self._late[worker]
        for place, worker in enumerate(line.tickets, 1):
            if worker in seated or worker not in self._late:  # not: this coordinator has just begun
                self._late[worker] = now + admission.absent_after(place)
        gone = [worker for worker, late in self._late.items() if now > late + admission.PATIENCE]
        for some in _batches(gone, BATCH):
            self._write(ev.Dequeued(tuple(some), "not heard of any more"))

    def close(self) -> None:
        """The log takes nothing more."""
        for _, future in self._undecided.values():
            _end(future, Refused("The coordinator is ending: ask again when it is back."))
        self._undecided.clear()

    # --- one wish

    def _hear(self, line: Line, worker: str) -> None:
        place = line.position(worker)
        if place is not None:
            now = self._clock()
            if self._late.get(worker, now) <= now:
                self._turn = _Turn()  # it was away: it may be its turn
            self._late[worker] = now + admission.absent_after(place)

    def _over(self, peer: PeerId) -> float:
        """Seconds until a new wish can be taken; 0: now."""
        now = self._clock()
        if len(self._undecided) >= UNDECIDED:
            return 2.0
        wait = self._asked.take(peer, 1, now).value or self._tickets.take(peer, 1, now).value
        return min(max(wait, 1.0), admission.LATEST) if wait else 0.0

    def _waiting(self, peer: PeerId) -> m.Waiting:
        line = self._state().line
        ticket, place = line.tickets.get(peer), line.position(peer)
        if ticket is None or place is None:
            raise Refused("Your place in the line was given up meanwhile: ask again.")
        return m.Waiting(ticket.number, place, admission.poll_after(place), self._why())

    def _why(self) -> str:
        if self._free(self._state()) <= 0:
            return f"all {self._places} seats are taken"
        return "the seats that are free now go to those before"

    def _decide(self) -> None:
        """Write what has gathered. A wish that came while somebody left is decided like the others: it is in line."""
        undecided, self._undecided = self._undecided, {}
        try:
            given, refused = admission.issued(self._state().line, [wish for wish, _ in undecided.values()])
            self._record(given)
        except StateError as error:
            for _, future in undecided.values():
                _end(future, error)
            return
        for worker, (_, future) in undecided.items():
            _end(future, Refused(refused[worker]) if worker in refused else None)

    def _record(self, tickets: Sequence[Ticket]) -> None:
        for some in _batches(tickets, BATCH):
            self._write(ev.Queued(tuple(some)))
        line = self._state().line
        for ticket in tickets:
            self._hear(line, ticket.worker)

    async def _on_withdraw(self, peer: PeerId, _message: m.Withdraw, _body: bytearray) -> Answer:
        state = self._state()
        if peer in state.line.tickets and state.member_of(peer) is None and state.phase is Phase.TRAINING:
            self._write(ev.Dequeued((peer,), "left the line"))
        return m.Ack()

    # --- whose turn

    def _free(self, state: RunState) -> int:
        return self._places - sum(seat.status is not SeatStatus.LEFT for seat in state.seats.values())

    def _whose_turn(self, state: RunState, free: int) -> frozenset[str]:
        now, turn = self._clock(), self._turn
        if turn.line is not state.line or turn.free != free or now > turn.until:
            absent = {worker for worker, late in self._late.items() if late <= now}
            workers = frozenset(admission.called(state.line, free, seated=_seated(state), absent=absent))
            self._turn = turn = _Turn(workers, state.line, free, now + REMEMBERED)
        return turn.workers


def check(message: m.Join) -> None:
    """Raises Refused for a wish of which a part is longer than it need be: tickets are kept, here and on disk."""
    fits = (
        1 <= len(message.account.encode()) <= ACCOUNT
        and message.account.isprintable()
        and len(message.addresses) <= ADDRESSES
        and all(len(address) <= ADDRESS for address in message.addresses)
        and len(message.wish) <= WISH
        and len(message.have) <= SNAPSHOTS
        and all(len(root) <= WISH for _, root in message.have)
    )
    if not fits:
        raise Refused(
            f"A wish for a seat brings an account of 1 to {ACCOUNT} bytes that can be printed, at most {ADDRESSES} "
            f"addresses of {ADDRESS} letters, and at most {SNAPSHOTS} snapshots: give a shorter account or fewer "
            "addresses."
        )


def _seated(state: RunState) -> set[str]:
    return {seat.worker for seat in state.seats.values() if seat.status is not SeatStatus.LEFT}


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    left = iter(items)
    while some := list(islice(left, size)):
        yield some


def _end(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
        future.exception()  # whoever asked may be gone; that is no defect


__all__ = ["WaitingRoom", "check"]
