"""What strangers and the control process say to each other before anybody has a seat: on `koinon/join/1` alone.

Whoever may ask these has proven nothing but a node key, and keys are free: every answer is bounded in size, and
`reception` bounds how often it is given. Knows nothing of what a seat is.
"""

from __future__ import annotations

from koinon.net.frames import NBytes
from koinon.net.passes import AddressRecord
from koinon.nodes.messages import Message

PROBE_LIMIT = 1 << 20
"""Bytes of one probe's body."""
ADDRESS_LIMIT = 4
"""Addresses that one `Reach` may name."""


class Knock(Message, frozen=True):
    """What is this run, and is there room?"""

    nbytes: int = 0


class Opened(Message, frozen=True):
    """Answer to a knock. `spec`: TOML. `now`: Unix time there. `has_seat`: whether the asker has one already.

    `whereabouts`: where the coordinator can be reached, signed by it; seats carry it on to those who ask `Whereabouts`.
    """

    run: str
    spec: str
    phase: str
    reason: str
    step: int
    now: float
    taken: int
    places: int
    has_seat: bool
    protocol: tuple[int, int]
    build: str
    whereabouts: AddressRecord
    nbytes: int = 0


class Probe(Message, frozen=True):
    """Measures the link: the body is thrown away, and `back` bytes come with the answer."""

    back: NBytes = 0
    nbytes: NBytes = 0


class Probed(Message, frozen=True):
    nbytes: NBytes = 0


class Reach(Message, frozen=True):
    """Can you see me? The asker listens at these addresses, and answers `Wave` there."""

    addresses: tuple[str, ...]
    nbytes: int = 0


class Reached(Message, frozen=True):
    """What each address answered to somebody whom it had not called before; "" where the asker was there."""

    answers: tuple[str, ...]
    nbytes: int = 0


class Wave(Message, frozen=True):
    """From the address that `Reach` was asked about."""

    nbytes: int = 0


class Waved(Message, frozen=True):
    nbytes: int = 0


class Whereabouts(Message, frozen=True):
    """Where is the coordinator of this run? Asked of any member, by those who hold an old invitation."""

    run: str
    nbytes: int = 0


class Known(Message, frozen=True):
    """What the member holds: signed by the coordinator, so whoever carries it can keep it back but not forge it."""

    record: AddressRecord
    nbytes: int = 0
