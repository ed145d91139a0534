"""The switch: what becomes of each packet, and when. Pure: packets and time come in, deliveries go out.

A packet crosses the sender's up line, its delay and jitter, then the switch (cut? lost?), the receiver's down line and
its delay. Loss is drawn from a generator per (seed, sender, receiver), so that other traffic does not change it.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from random import Random
from typing import Final, NamedTuple

from bench.wan.access import Access, Line
from bench.wan.cuts import Cuts
from bench.wan.stats import LATE, Stats

NETWORK: Final = bytes([10, 77, 0])


def address(host: int) -> str:
    return ".".join(map(str, (*NETWORK, host)))


class Delivery(NamedTuple):
    receiver: int
    packet: bytes


class _Event(NamedTuple):
    """Ordered by time, then by order of arrival. At the switch, or, once it has crossed, at the receiver."""

    due: float
    ticket: int
    sender: int
    receiver: int
    packet: bytes
    has_crossed: bool


class Switch:
    """`accesses`: host numbers (1 to 254) and what their links are like; may be changed at any time."""

    def __init__(self, accesses: Mapping[int, Access], seed: int = 0) -> None:
        self.accesses = dict(accesses)
        self.cuts = Cuts(self.accesses)
        self._hosts = {NETWORK + bytes([number]): number for number in self.accesses}
        self._up = {number: Line() for number in self.accesses}
        self._down = {number: Line() for number in self.accesses}
        self._dice = {pair: Random(f"{seed}:{pair[0]}:{pair[1]}") for pair in itertools.permutations(self.accesses, 2)}
        self._latest: defaultdict[tuple[int, int], float] = defaultdict(float)  # keeps jitter from reordering
        self._tickets = itertools.count()
        self._events: list[_Event] = []
        self._counts: Counter[str] = Counter()
        self._nbytes: Counter[tuple[int, int]] = Counter()

    @property
    def next_due(self) -> float | None:
        """When `advance` will have something to do."""
        return self._events[0].due if self._events else None

    def stats(self) -> Stats:
        return Stats(**self._counts, nbytes=dict(self._nbytes))

    def take(self, now: float, sender: int, packet: bytes) -> None:
        """A host sends an IPv4 packet; anything else is counted and dropped."""
        receiver = self._hosts.get(packet[16:20]) if packet[:1] and packet[0] >> 4 == 4 else None
        if receiver is None or receiver == sender:
            self._counts["unroutable"] += 1
            return
        access, pair = self.accesses[sender], (sender, receiver)
        left = self._up[sender].carry(now, len(packet), access.up, access.queue)
        if left is None:
            self._counts["queue_full"] += 1
            return
        due = max(left + access.delay + self._dice[pair].random() * access.jitter, self._latest[pair])
        self._latest[pair] = due
        self._push(due, sender, receiver, packet, has_crossed=False)

    def advance(self, now: float) -> Iterator[Delivery]:
        """Do all that is due, and hand out what has arrived."""
        while self._events and self._events[0].due <= now:
            event = heapq.heappop(self._events)
            if event.has_crossed:
                self._counts["delivered"] += 1
                self._counts["late"] += now - event.due > LATE
                self._nbytes[event.sender, event.receiver] += len(event.packet)
                yield Delivery(event.receiver, event.packet)
            else:
                self._cross(event)

    def _cross(self, event: _Event) -> None:
        pair = event.sender, event.receiver
        sender, receiver = self.accesses[event.sender], self.accesses[event.receiver]
        if self.cuts.is_cut(*pair):
            self._counts["blocked"] += 1
        elif self._dice[pair].random() < max(sender.loss, receiver.loss):
            self._counts["lost"] += 1
        else:
            line = self._down[event.receiver]
            left = line.carry(event.due, len(event.packet), receiver.down, receiver.queue)
            if left is None:
                self._counts["queue_full"] += 1
            else:
                self._push(left + receiver.delay, *pair, event.packet, has_crossed=True)

    def _push(self, due: float, sender: int, receiver: int, packet: bytes, *, has_crossed: bool) -> None:
        heapq.heappush(self._events, _Event(due, next(self._tickets), sender, receiver, packet, has_crossed))
