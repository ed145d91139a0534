"""Terms: who may write the run log, since when, and until when.

    term = (number, holder's node key, lease, place of the log that it begins from)

A coordinator writes under a numbered term. Whoever wants the next one *takes* it from the term store, which gives each
number once; the holder renews its lease while it lives. A record of a term that the store has passed is void.
`TermStore` is the seam: here lie the rules, as pure functions over a `Book`; `run.termfile` keeps a book in a file that
processes of one machine share, and the chain will keep the same book in a contract, behind the same interface.
Knows nothing of transport and of what the log says.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Annotated, Protocol

import msgspec

from koinon.errors import Fenced, TermRefused
from koinon.run.policies.deadlines import History, deadline
from koinon.run.record import Equivocation, Head, check_equivocation, decode_record
from koinon.units import PeerId, RunId, Seconds

LEASE_FLOOR = Seconds(4.0)
"""No lease is shorter: four missed renewals."""
RENEW_EVERY = Seconds(1.0)
SILENCE_FLOOR = Seconds(3.0)
"""No holder is called silent before that: three probes without an answer."""

GUESTS = 64
"""As many as the book names; the newest replace the oldest."""

_Hex = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
_Address = Annotated[str, msgspec.Meta(max_length=256)]
_Number = Annotated[int, msgspec.Meta(ge=1, le=2**53)]


class Term(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    number: _Number
    holder: _Hex
    addresses: Annotated[tuple[_Address, ...], msgspec.Meta(max_length=16)] = ()
    """Where the holder can be dialled: how those find it who only knew the one before."""
    not_after: float
    """Unix time by the store's clock at which the lease runs out."""
    seq: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0
    """The last record of the history that the term continues. Final once `begun`."""
    head: Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{64})?$")] = ""
    """Its hash."""
    begun: bool = False
    """The holder has gathered what others hold and goes on from `seq`: nothing is signed in the term before that."""
    revoked: bool = False


class Proof(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Two records that one key signed for one place, as they travel."""

    issuer: _Hex
    first: Annotated[bytes, msgspec.Meta(max_length=2**17)]
    second: Annotated[bytes, msgspec.Meta(max_length=2**17)]


class Book(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All terms of one run, oldest first, and the proofs against holders. The last term is the current one."""

    run: str
    terms: Annotated[tuple[Term, ...], msgspec.Meta(max_length=10_000)] = ()
    proofs: Annotated[tuple[Proof, ...], msgspec.Meta(max_length=64)] = ()
    guests: Annotated[tuple[_Hex, ...], msgspec.Meta(max_length=GUESTS)] = ()
    """Nodes without a seat that read the log: those that stand by, or look on. Every door of the run lets them in."""

    @property
    def current(self) -> Term | None:
        return self.terms[-1] if self.terms else None

    @property
    def convicted(self) -> frozenset[str]:
        return frozenset(proof.issuer for proof in self.proofs)

    def holder_of(self, number: int) -> PeerId | None:
        """Who signs in that term. Terms older than the book were its first holder's: the run was alone then."""
        if self.terms and number < self.terms[0].number:
            return PeerId(self.terms[0].holder)
        return next((PeerId(t.holder) for t in reversed(self.terms) if t.number == number), None)

    def fork_after(self, term: int) -> Term | None:
        """The first term after `term` that has begun: where a history that stopped heeding terms there went astray."""
        return next((t for t in self.terms if t.number > term and t.begun), None)


class TermStore(Protocol):
    """Gives each term to one holder. Errors are StateErrors: TermRefused, Fenced, TermStoreCorrupt."""

    @property
    def grace(self) -> Seconds:
        """How far clocks (or blocks) may be apart: a lease counts as run out that much later."""

    def now(self) -> float:
        """The store's time."""

    async def book(self) -> Book:
        """As it stands, or as it stood a moment ago; it never goes back."""

    async def take(self, term: Term, *, after: int, lease: Seconds) -> Term:
        """Compare and set: `term` follows number `after` (0: there is none yet), or TermRefused says why not."""

    async def renew(self, number: int, holder: PeerId, *, lease: Seconds, begins: Head | None = None) -> Term:
        """Extend the holder's lease; `begins` fixes where its history starts. Raises Fenced if the term is over."""

    async def enrol(self, guest: PeerId) -> None:
        """Note a node that will ask for the log though it has no seat. Twice is once."""

    async def revoke(self, proof: Equivocation) -> Term:
        """End the term of a holder that signed two histories, and bar its key. Raises TermRefused for no proof."""


# --- the rules, shared by every store


def taken(book: Book, term: Term, *, after: int, now: float, lease: Seconds, grace: Seconds) -> Book:
    """The book with `term` as its newest. Raises TermRefused."""
    current = book.current
    if (current.number if current else 0) != after:
        raise TermRefused(
            f"Term {term.number} was to follow term {after}, but the term store is at "
            f"{f'term {current.number}' if current else 'none'}: look again, and follow its holder."
        )
    if term.number <= after:
        raise TermRefused(f"Term {term.number} cannot follow term {after}: take a higher number.")
    if term.holder in book.convicted:
        raise TermRefused(
            f"{term.holder[:10]} signed two histories of this run and holds no term again: use another key."
        )
    if current and current.holder != term.holder and not current.revoked and not is_expired(current, now, grace):
        raise TermRefused(
            f"Term {current.number} is held by {current.holder[:10]} for another "
            f"{Seconds(current.not_after + grace.value - now)}: wait, and follow it meanwhile."
        )
    fresh = msgspec.structs.replace(term, not_after=now + lease.value, revoked=False)
    return msgspec.structs.replace(book, terms=(*book.terms, fresh))


def renewed(book: Book, number: int, holder: str, *, now: float, lease: Seconds, begins: Head | None) -> Book:
    """The book with a longer lease of its newest term. Raises Fenced. What has begun begins nowhere else."""
    current = book.current
    if current is None or current.number != number or current.holder != holder or current.revoked:
        raise Fenced(number, current.number if current else 0, current.holder if current else "")
    extended = msgspec.structs.replace(current, not_after=max(current.not_after, now + lease.value))
    if begins is not None and not current.begun:
        extended = msgspec.structs.replace(extended, seq=begins.seq, head=begins.hash.hex(), begun=True)
    return msgspec.structs.replace(book, terms=(*book.terms[:-1], extended))


def revoked(book: Book, proof: Equivocation) -> Book:
    """The book with the proof in it, and its newest term ended if the culprit holds it. Twice is once."""
    if check_equivocation(proof.first, proof.second, run=RunId(book.run), issuer=proof.issuer) is None:
        raise TermRefused("These two records prove nothing: they must be signed by one key for one place of this run.")
    if book.holder_of(proof.first.term) != proof.issuer:
        raise TermRefused(
            f"{proof.issuer[:10]} did not hold term {proof.first.term}: its records there count for nothing."
        )
    current = book.current
    assert current is not None, "somebody held a term"
    if proof.issuer not in book.convicted:
        book = msgspec.structs.replace(book, proofs=(*book.proofs, packed(proof)))
    if current.holder == proof.issuer and not current.revoked:
        book = msgspec.structs.replace(
            book, terms=(*book.terms[:-1], msgspec.structs.replace(current, revoked=True))
        )  # fmt: skip
    return book


def enrolled(book: Book, guest: str) -> Book:
    """The book with that guest in it."""
    if guest in book.guests:
        return book
    return msgspec.structs.replace(book, guests=(*book.guests, guest)[-GUESTS:])


def packed(proof: Equivocation) -> Proof:
    return Proof(proof.issuer, proof.first.encode(), proof.second.encode())


def unpacked(proof: Proof, run: RunId) -> Equivocation | None:
    """The evidence that these bytes are, checked; None if they convict nobody. Raises FrameMalformed."""
    first, second = decode_record(proof.first), decode_record(proof.second)
    return check_equivocation(first, second, run=run, issuer=PeerId(proof.issuer))


# --- policies: nodes, tests and a simulator call the same ones


def is_expired(term: Term, now: float, grace: Seconds) -> bool:
    return now > term.not_after + grace.value


def lease_length(renewals: History) -> Seconds:
    """For how long a holder asks, given how far apart its renewals were: a busy machine gets longer leases."""
    return deadline(renewals, floor=LEASE_FLOOR)


def may_take(
    term: Term | None,
    *,
    me: PeerId,
    now: float,
    grace: Seconds,
    silent: Seconds,
    silences: History,
    convicted: Container[str] = (),
) -> bool:
    """Whether a standby may take the term after `term`.

    now, grace: the store's. silent: for how long the standby has not heard the holder. silences: the same, as it was
    before. Both must hold: the lease ran out *and* the holder is silent; a store that is slow to note a renewal
    replaces nobody, and neither does a cut between two machines. A term that was revoked needs no waiting.
    """
    if me in convicted or term is None or (term.holder == me and term.begun):
        return False  # a run without a term has a coordinator that asked for none; one's own is no successor's
    if term.revoked:
        return True
    return is_expired(term, now, grace) and silent > deadline(silences, floor=SILENCE_FLOOR)


ANSWER_FLOOR = Seconds(1.0)
"""No seat that is asked for its tail is given up before that."""
_PATIENCE = 3.0


def has_enough(took: Sequence[float], asked: int, waited: Seconds) -> bool:
    """Whether a successor may go on with the tails it has. took: seconds that each answer needed, of `asked` seats.

    All of them: at once. Two thirds: when the others are late by what the answers show. Fewer: only after three times
    that, for a league that lost most of its machines must not stand still for ever. None: never, for whoever reaches
    nobody would go on from its own copy alone; `is_alone` says when it gives the term up.
    """
    if len(took) >= asked or not took:
        return len(took) >= asked
    allowed = deadline(History(tuple(took)), floor=ANSWER_FLOOR).value
    return waited.value > (allowed if 3 * len(took) >= 2 * asked else _PATIENCE * allowed)


def is_alone(answers: int, asked: int, waited: Seconds) -> bool:
    """Whether a successor has waited in vain for a first seat: another standby may reach them, so its lease lapses."""
    return answers == 0 < asked and waited > LEASE_FLOOR
