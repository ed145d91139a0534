"""The post of the in-memory twin: carries encoded frames between nodes of one process, and spoils them on purpose.

What happens to the n-th letter from one peer to another is drawn from a generator seeded with (seed, from, to, n):
one seed, one history, and traffic elsewhere changes nothing. Corruption flips a byte where any reader must notice
(the length prefix or the first byte of the header), so the real decoder refuses it: QUIC would have caught any other.
Runs under any event loop; with `clock.run_virtual`, in virtual time. Knows nothing of services.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from random import Random
from typing import Any, Final

from koinon.units import BitsPerSecond, PeerId, Seconds

_SPOILT_BYTES: Final = 5
_HISTORY: Final = 100_000


@dataclass(frozen=True, slots=True)
class Faults:
    """How an edge treats letters. Probabilities are per letter; a late one arrives after those sent behind it."""

    delay: Seconds = field(default=Seconds(0.001))
    jitter: Seconds = field(default=Seconds(0.0))
    loss: float = 0.0
    duplicate: float = 0.0
    late: float = 0.0
    corrupt: float = 0.0
    rate: BitsPerSecond | None = None


class Part(Enum):
    ASK = "ask"
    """A request's frame; without its body if that is large."""
    BODY = "body"
    """A large body, once it was asked for."""
    WORD = "word"
    """Back to the asker: a reply, or the word to send the body."""


@dataclass(frozen=True, slots=True)
class Letter:
    """One frame under way. `connection` names both ends' boots: a restarted node ignores letters to its former self."""

    sender: PeerId
    recipient: PeerId
    connection: str
    alpn: str
    exchange: int
    part: Part
    data: bytes


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of one letter: the delays after which copies of it arrive (none: lost), and the byte flipped."""

    sender: PeerId
    recipient: PeerId
    number: int
    arrivals: tuple[float, ...]
    flipped: tuple[int, int] | None


class Hub:
    """Joins the memory transports of one process."""

    def __init__(self, seed: int = 0, faults: Faults | None = None) -> None:
        self.seed, self.faults = seed, faults or Faults()
        self.history: deque[Fate] = deque(maxlen=_HISTORY)
        self.members: dict[str, Any] = {}
        """Who listens at which address."""
        self._special: dict[tuple[PeerId, PeerId], Faults] = {}
        self._blocked: set[tuple[PeerId, PeerId]] = set()
        self._numbers: Counter[tuple[PeerId, PeerId]] = Counter()
        self._inboxes: dict[PeerId, Callable[[Letter], None]] = {}

    def set_faults(self, sender: PeerId, recipient: PeerId, faults: Faults) -> None:
        """Treat this direction of this edge otherwise than the rest."""
        self._special[sender, recipient] = faults

    def block(self, sender: PeerId, recipient: PeerId) -> None:
        """Cut one direction. Letters under way are lost, too."""
        self._blocked.add((sender, recipient))

    def partition(self, *groups: Iterable[PeerId]) -> None:
        """Cut every path between the groups, both ways."""
        sides = [list(group) for group in groups]
        for i, here in enumerate(sides):
            for there in sides[i + 1 :]:
                self._blocked |= {(a, b) for a in here for b in there} | {(b, a) for a in here for b in there}

    def heal(self) -> None:
        """Undo every cut."""
        self._blocked.clear()

    def is_cut(self, sender: PeerId, recipient: PeerId) -> bool:
        return (sender, recipient) in self._blocked

    def attach(self, peer: PeerId, inbox: Callable[[Letter], None]) -> None:
        self._inboxes[peer] = inbox

    def detach(self, peer: PeerId, inbox: Callable[[Letter], None]) -> None:
        """Nothing is delivered there any more. A successor under the same key stays attached."""
        if self._inboxes.get(peer) == inbox:
            del self._inboxes[peer]

    def send(self, letter: Letter) -> None:
        """Post a letter; copies of it arrive, or none, as drawn."""
        fate = self._draw(letter.sender, letter.recipient, len(letter.data))
        self.history.append(fate)
        data = _flip(letter.data, fate.flipped)
        spoilt = Letter(
            letter.sender, letter.recipient, letter.connection, letter.alpn, letter.exchange, letter.part, data
        )
        loop = asyncio.get_running_loop()
        for delay in fate.arrivals:
            loop.call_later(delay, self._deliver, spoilt)

    def trip(self, sender: PeerId, recipient: PeerId) -> Seconds:
        """How long a handshake's packet takes that way. Handshakes are repeated below us until they get through."""
        faults = self._special.get((sender, recipient), self.faults)
        return faults.delay

    def _deliver(self, letter: Letter) -> None:
        inbox = self._inboxes.get(letter.recipient)
        if inbox is not None and not self.is_cut(letter.sender, letter.recipient):
            inbox(letter)

    def _draw(self, sender: PeerId, recipient: PeerId, nbytes: int) -> Fate:
        number = self._numbers[sender, recipient]
        self._numbers[sender, recipient] += 1
        faults = self._special.get((sender, recipient), self.faults)
        random = Random(f"{self.seed}/{sender}/{recipient}/{number}")
        lost, twice, late, spoilt = (
            random.random() < p for p in (faults.loss, faults.duplicate, faults.late, faults.corrupt)
        )
        copies = 0 if lost else 2 if twice else 1
        arrivals = tuple(_delay(faults, nbytes, random, late=late) for _ in range(copies))
        flip = (random.randrange(_SPOILT_BYTES), 1 << random.randrange(8)) if spoilt else None
        return Fate(sender, recipient, number, arrivals, flip)


def _delay(faults: Faults, nbytes: int, random: Random, *, late: bool) -> float:
    transfer = Seconds(0.0) if faults.rate is None else Seconds(8 * nbytes / faults.rate.value)
    extra = 10 * faults.delay.value if late else 0.0
    return faults.delay.value + transfer.value + extra + faults.jitter.value * random.random()


def _flip(data: bytes, at: tuple[int, int] | None) -> bytes:
    if at is None:
        return data
    place, bit = at
    return data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]
