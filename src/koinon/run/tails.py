"""What a successor goes on from: the newest history that anybody who answers still holds. Pure.

A *tail* is the end of somebody's copy of the log, behind a head that both hold. Tails are compared as in Raft: by the
term of their last record, then by their length (Ongaro & Ousterhout, ATC 2014, section 5.4.1); what only a history of
an older term has was never agreed on. Knows nothing of how tails are fetched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from koinon.errors import RecordRefused
from koinon.run.record import Equivocation, Head, Issuer, Record, check_equivocation, check_follows, is_signed
from koinon.units import RunId


@dataclass(frozen=True, slots=True)
class Adoption:
    records: tuple[Record, ...]
    """To be appended as they are."""
    proofs: tuple[Equivocation, ...]
    """Tails that contradict each other, both signed: their coordinator told two stories."""


def adopt(base: Head, tails: Iterable[Sequence[Record]], *, run: RunId, issuer: Issuer) -> Adoption:
    """The best of the tails behind `base`. What does not continue it, or is not signed, is left out."""
    sound = [sound_part(base, tail, run=run, issuer=issuer) for tail in tails]
    best = max(sound, key=lambda tail: (tail[-1].term, tail[-1].seq) if tail else (0, 0), default=())
    proofs: dict[tuple[int, str], Equivocation] = {}
    for tail in sound:
        if (proof := contradiction(best, tail, run=run, issuer=issuer)) is not None:
            proofs.setdefault((proof.first.term, proof.issuer), proof)
    return Adoption(best, tuple(proofs.values()))


def sound_part(base: Head, tail: Sequence[Record], *, run: RunId, issuer: Issuer) -> tuple[Record, ...]:
    """As much of a tail, from its beginning, as continues `base` and ends each of its terms in a valid signature."""
    head, kept = base, list[Record]()
    for record in tail:
        try:
            check_follows(head, record)
        except RecordRefused:
            break
        if kept and kept[-1].term != record.term and not is_signed(kept[-1], run=run, issuer=issuer):
            break
        kept.append(record)
        head = record.head
    while kept and not is_signed(kept[-1], run=run, issuer=issuer):
        kept.pop()
    return tuple(kept)


def contradiction(
    mine: Sequence[Record], theirs: Sequence[Record], *, run: RunId, issuer: Issuer
) -> Equivocation | None:
    """Two signed records of one place, if the tails hold such."""
    held = {(record.seq, record.term): record for record in mine}
    for record in theirs:
        other = held.get((record.seq, record.term))
        if other is None or other.hash == record.hash:
            continue
        signer = issuer(record.term) if callable(issuer) else issuer
        if signer is not None and (found := check_equivocation(other, record, run=run, issuer=signer)) is not None:
            return found
    return None
