"""A record of the run log: one event in its place in a signed, hash-chained history.

    hash(n)      = sha256(prev | seq | term | event bytes),  prev = hash(n - 1), integers as 8 bytes, big-endian
    signature(n) = Ed25519 of the coordinator of the term over (genesis | hash(n))

The genesis names the run, so a coordinator of two runs never signs the same place twice, and two signed records of
one place are always evidence. Records count from 1; the head of an empty log is the genesis, at 0.
Knows nothing of files and not what an event means.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Protocol, TypeAlias

import msgspec

from koinon.errors import ChainBroken, FrameMalformed, LogGap, SignatureInvalid, TermPassed, TwoHeads
from koinon.net.identity import verify
from koinon.units import PeerId, RunId

DOMAIN = "koinon/run-log/1"
REMEMBERED = 1024
"""Records that a follower keeps in memory to recognise a second head; older ones are looked up in a log."""

Digest: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Number: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Issuer: TypeAlias = PeerId | Callable[[int], PeerId | None]
"""Who may sign: one key for all terms, or a function from a term to its coordinator's key (None: nobody yet)."""


class Signer(Protocol):
    """A node's key, as far as this module needs it."""

    @property
    def peer_id(self) -> PeerId: ...

    def sign(self, domain: str, message: bytes, /) -> bytes: ...


class Record(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """One place of the log. On disk and on the wire: a msgpack array of the fields in this order."""

    seq: Number
    term: Number
    prev: Digest
    event: bytes
    """The event's own msgpack encoding, never re-encoded: the hash is over these bytes."""
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]

    def encode(self) -> bytes:
        """The bytes that lie in the file and travel to followers. Inverse: `decode_record`."""
        return _encoder.encode(self)

    @property
    def hash(self) -> bytes:
        return _digest(self.prev, self.seq, self.term, self.event)

    @property
    def head(self) -> Head:
        return Head(self.seq, self.term, self.hash)


@dataclass(frozen=True, slots=True)
class Head:
    """Where a history stands: number, term and hash of its last record. Nodes with equal heads agree on all of it."""

    seq: int
    term: int
    hash: bytes

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash.hex()[:12]}"


@dataclass(frozen=True, slots=True)
class Equivocation:
    """Two records for one place, both signed by `issuer`: proof that needs no other witness."""

    run: RunId
    issuer: PeerId
    first: Record
    second: Record


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Record)


def decode_record(data: bytes | memoryview) -> Record:
    """The record of these bytes, from a disk or a peer; nothing about it is trusted yet. Raises FrameMalformed."""
    try:
        return _decoder.decode(data)
    except msgspec.DecodeError as error:
        raise FrameMalformed(f"{len(data)} bytes are not a run log record: {error}.") from error


def genesis(run: RunId) -> Head:
    """The head of the empty log of a run."""
    return Head(0, 0, hashlib.sha256(f"{DOMAIN}\0{run}".encode()).digest())


def seal(head: Head, term: int, event: bytes, *, run: RunId, key: Signer) -> Record:
    """The signed record of `event` that follows `head`. Raises TermPassed if the head is of a later term."""
    if term < head.term:
        raise TermPassed(head.term, term)
    seq = head.seq + 1
    message = genesis(run).hash + _digest(head.hash, seq, term, event)
    return Record(seq, term, head.hash, event, key.sign(DOMAIN, message))


def check_follows(head: Head, record: Record) -> None:
    """Raises TermPassed, LogGap or ChainBroken unless `record` is the next one after `head`."""
    if record.term < head.term:
        raise TermPassed(head.term, record.term)
    if record.seq > head.seq + 1:
        raise LogGap(head.seq + 1, record.seq)
    if record.seq != head.seq + 1 or record.prev != head.hash:
        raise ChainBroken(record.seq)


def is_signed(record: Record, *, run: RunId, issuer: Issuer) -> bool:
    """Whether the coordinator of the record's term signed it, for this run."""
    signer = issuer(record.term) if callable(issuer) else issuer
    if signer is None:
        return False
    return verify(signer, DOMAIN, genesis(run).hash + record.hash, record.signature)


def check_signed(record: Record, *, run: RunId, issuer: Issuer) -> None:
    if not is_signed(record, run=run, issuer=issuer):
        raise SignatureInvalid(record.seq, record.term)


def check_equivocation(first: Record, second: Record, *, run: RunId, issuer: PeerId) -> Equivocation | None:
    """Evidence that `issuer` signed two histories: same term and seq, other hashes, both signatures valid.

    None if the records agree, stand in different places, or one of them is not the issuer's: a forged
    conflict convicts nobody.
    """
    if (first.seq, first.term) != (second.seq, second.term) or first.hash == second.hash:
        return None
    if not (is_signed(first, run=run, issuer=issuer) and is_signed(second, run=run, issuer=issuer)):
        return None
    return Equivocation(run, issuer, first, second)


@dataclass(slots=True)
class Follower:
    """Receives the records that a coordinator pushes, and believes only one unbroken history.

    `head`: what is already held (from a log on disk, say); by default nothing.
    """

    run: RunId
    issuer: Issuer
    head: Head = field(default=Head(0, 0, b""))
    _recent: deque[Record] = field(default_factory=lambda: deque(maxlen=REMEMBERED), repr=False)

    def __post_init__(self) -> None:
        if self.head.seq == 0:
            self.head = genesis(self.run)

    def accept(self, record: Record) -> bool:
        """Take the next record: True if it is new, False if it is a twin of one that is held.

        Raises SignatureInvalid, TermPassed, LogGap (ask again from `expected`), ChainBroken, or TwoHeads with the
        evidence. After any of these the head is what it was. A place further back than REMEMBERED is taken for a
        twin: whoever keeps the log can hold it against that with `check_equivocation`.
        """
        check_signed(record, run=self.run, issuer=self.issuer)
        if record.seq <= self.head.seq:
            return self._meet_again(record)
        check_follows(self.head, record)
        self._recent.append(record)
        self.head = record.head
        return True

    def accept_all(self, records: Sequence[Record]) -> int:
        """Take a batch of consecutive records; returns how many of them, from the first, are twins of what is held.

        The last one's signature vouches for all before it of its term, through the chain: a batch costs one
        verification for each term in it. Errors as in `accept`, and then nothing of the batch was taken.
        """
        twins = sum(record.seq <= self.head.seq for record in records)
        for record in records[:twins]:
            check_signed(record, run=self.run, issuer=self.issuer)
            self._meet_again(record)
        head, last = self.head, None
        for record in records[twins:]:
            check_follows(head, record)
            if last is not None and last.term != record.term:
                check_signed(last, run=self.run, issuer=self.issuer)
            head, last = record.head, record
        if twins < len(records):
            check_signed(records[-1], run=self.run, issuer=self.issuer)
            self._recent.extend(records[twins:])
            self.head = head
        return twins

    def recent(self, first: int) -> list[Record]:
        """Held records from place `first` on, as far as they are remembered; none if the first one is forgotten."""
        if not self._recent or first < self._recent[0].seq:
            return []
        return [record for record in self._recent if record.seq >= first]

    def clash(self, record: Record) -> Equivocation | None:
        """What a record that somebody else holds proves beside ours for the same place."""
        held = self._held(record.seq) if 0 < record.seq <= self.head.seq else None
        signer = self.issuer(record.term) if callable(self.issuer) else self.issuer
        if held is None or signer is None:
            return None
        return check_equivocation(held, record, run=self.run, issuer=signer)

    def _meet_again(self, record: Record) -> bool:
        """A place that is held already: a harmless twin, a second head, or a coordinator of another term."""
        held = self._held(record.seq)
        known = held.hash if held else self.head.hash if record.seq == self.head.seq else None
        if known is None or known == record.hash:
            return False
        if held and held.term == record.term:
            raise TwoHeads(record.seq, record.term, Equivocation(self.run, self._signer(record), held, record))
        if record.term < self.head.term:
            raise TermPassed(self.head.term, record.term)
        raise ChainBroken(record.seq)

    def _held(self, seq: int) -> Record | None:
        index = seq - self.head.seq - 1
        return self._recent[index] if -index <= len(self._recent) else None

    def _signer(self, record: Record) -> PeerId:
        signer = self.issuer(record.term) if callable(self.issuer) else self.issuer
        assert signer is not None, "its signature has just been checked"
        return signer


def _digest(prev: bytes, seq: int, term: int, event: bytes) -> bytes:
    return hashlib.sha256(prev + seq.to_bytes(8, "big") + term.to_bytes(8, "big") + event).digest()
