"""The waiting line of a full league, as a frozen value: who waits, in which order, and whose turn it is.

A queue number is given once and never changes. A position is how many tickets stand before it, with itself, and a
ticket keeps its place until its holder is *ready* in a seat: whoever was called and lost the seat before that is at
the front again, and nobody behind it is moved back. So a position never increases.
Pure: time is passed in. Knows nothing of messages, logs or files.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace

from koinon.run.events import Ticket

LENGTH = 20_000
"""Tickets in one line. A ticket takes about half a kilobyte here, and 130 bytes in the log."""
PER_ACCOUNT = 64
"""Machines of one account that may wait."""
TRIES = 3
"""Seats that a ticket may lose before it was ready in them. Then whoever holds it begins at the end."""
SOONEST, LATEST = 1.0, 600.0
"""Seconds between two polls of one waiter: at the front, and far behind."""
_PER_PLACE = 0.5
_SLACK = 10.0
"""A poll that comes so late is no absence: a dial to a busy host takes seconds."""
PATIENCE = 600.0
"""How long the ticket of somebody who does not poll any more is kept."""


@dataclass(frozen=True, slots=True)
class Line:
    """Tickets in the order of their numbers. At most `LENGTH` of them, since only `issued` adds any."""

    tickets: Mapping[str, Ticket] = field(default_factory=dict)
    """By node key, lowest number first."""
    numbers: tuple[int, ...] = ()
    accounts: Mapping[str, int] = field(default_factory=dict)
    """Tickets per account; only accounts that have any."""
    lost: Mapping[str, int] = field(default_factory=dict)
    """Node key -> seats that it was called to and lost before it was ready; only where there were any."""
    next_number: int = 1

    def __len__(self) -> int:
        return len(self.numbers)

    def position(self, worker: str) -> int | None:
        """1 at the front; None without a ticket."""
        ticket = self.tickets.get(worker)
        return None if ticket is None else bisect_left(self.numbers, ticket.number) + 1

    def with_tickets(self, tickets: Iterable[Ticket]) -> Line:
        """Those that are news: a key that has a ticket keeps it, and numbers only grow."""
        held, numbers, accounts, last = dict(self.tickets), list(self.numbers), dict(self.accounts), self.next_number
        for ticket in tickets:
            if ticket.worker in held or ticket.number < last:
                continue
            held[ticket.worker] = ticket
            numbers.append(ticket.number)
            accounts[ticket.account] = accounts.get(ticket.account, 0) + 1
            last = ticket.number + 1
        return Line(held, tuple(numbers), accounts, self.lost, last)

    def without(self, workers: Collection[str]) -> Line:
        """The line when these have left it, for whatever reason."""
        gone = {worker for worker in workers if worker in self.tickets}
        if not gone:
            return self
        accounts = dict(self.accounts)
        for worker in gone:
            account = self.tickets[worker].account
            accounts[account] -= 1
            if not accounts[account]:
                del accounts[account]
        held = {worker: ticket for worker, ticket in self.tickets.items() if worker not in gone}
        numbers = tuple(ticket.number for ticket in held.values())
        return Line(held, numbers, accounts, _but(self.lost, gone), self.next_number)

    def seat_lost(self, worker: str) -> Line:
        """Whoever was called lost the seat before it was ready: its ticket is good again, but not for ever."""
        if worker not in self.tickets:
            return self
        lost = self.lost.get(worker, 0) + 1
        if lost >= TRIES:
            return self.without({worker})
        return replace(self, lost={**self.lost, worker: lost})


@dataclass(frozen=True, slots=True)
class Wish:
    """Somebody asks for a place in the line."""

    worker: str
    account: str


def issued(line: Line, wishes: Iterable[Wish], *, length: int = LENGTH) -> tuple[tuple[Ticket, ...], dict[str, str]]:
    """Tickets for those who may have one, in the order of their wishes; and for the others, by key, a sentence.

    Whoever has a ticket is in neither.
    """
    given: dict[str, Ticket] = {}
    refused: dict[str, str] = {}
    accounts = dict[str, int]()
    for wish in wishes:
        if wish.worker in line.tickets or wish.worker in given:
            continue
        held = line.accounts.get(wish.account, 0) + accounts.get(wish.account, 0)
        if len(line) + len(given) >= length:
            refused[wish.worker] = f"The league is full, and {length:,} wait already: ask again in some minutes."
        elif held >= PER_ACCOUNT:
            refused[wish.worker] = (
                f"The league is full, and {held} machines of this account wait already: more than {PER_ACCOUNT} of one "
                "account do not wait at a time. Let one of them leave, or ask again later."
            )
        else:
            given[wish.worker] = Ticket(line.next_number + len(given), wish.worker, wish.account)
            accounts[wish.account] = accounts.get(wish.account, 0) + 1
    return tuple(given.values()), refused


def poll_after(position: int) -> float:
    """Seconds until somebody at that position should ask again: the front often, the others so that 10,000 of them
    ask 30 times a second together, for most of these questions are a handshake. Where many seats become free at once,
    two of them are taken in a second."""
    return min(LATEST, max(SOONEST, _PER_PLACE * position))


def absent_after(position: int) -> float:
    """Seconds of silence after which somebody at that position is not waited for."""
    return 2 * poll_after(position) + _SLACK


def called(line: Line, free: int, *, seated: Container[str], absent: Container[str]) -> tuple[str, ...]:
    """Whose turn it is when `free` seats are free: the first of those who are there and have no seat yet."""
    turn: list[str] = []
    for worker in line.tickets if free > 0 else ():
        if worker not in seated and worker not in absent:
            turn.append(worker)
            if len(turn) == free:
                break
    return tuple(turn)


def _but(counts: Mapping[str, int], gone: set[str]) -> Mapping[str, int]:
    return {key: count for key, count in counts.items() if key not in gone} if counts else counts
