"""What convicts a coordinator: two records that it signed for one place. Pure; anybody can check it from the log alone.

Knows nothing of who found it.
"""

from __future__ import annotations

from koinon.errors import FrameMalformed
from koinon.run import events as ev
from koinon.run.record import Equivocation, check_equivocation, decode_record
from koinon.units import PeerId, RunId


def as_event(proof: Equivocation) -> ev.Equivocated:
    """For the log. Inverse: `proof_in`."""
    return ev.Equivocated(proof.first.term, proof.issuer, proof.first.encode(), proof.second.encode())


def proof_in(event: ev.Equivocated, run: str) -> Equivocation | None:
    """The proof that the event holds; None if its records do not convict the key and term that it names."""
    try:
        first, second = decode_record(event.first), decode_record(event.second)
    except FrameMalformed:
        return None
    if first.term != event.term:
        return None
    return check_equivocation(first, second, run=RunId(run), issuer=PeerId(event.coordinator))


def convicts(event: ev.Equivocated, run: str) -> bool:
    return proof_in(event, run) is not None
