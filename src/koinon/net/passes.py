"""Passes and address records: small signed statements that let nodes believe each other without asking anyone.

A pass is signed by the coordinator of the current term: this node, of this account, has this seat until then.
An address record is signed by the node itself, so whoever carries it can withhold it but not forge it.
Times are seconds since 1970; a clock may be off by `GRACE`. Knows nothing of transports or of the run's state.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Final

import msgspec

from koinon.errors import Refused
from koinon.net.identity import NodeKey, is_peer_id, verify
from koinon.units import PeerId, Seconds

GRACE: Final = Seconds(60.0)
"""How long after its expiry a statement still counts: clocks differ, and a coordinator may be gone for a minute."""
_PASS_DOMAIN: Final = "pass"
_ADDRESS_DOMAIN: Final = "addresses"


class Pass(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Proof of membership, shown in the hello of every connection. Never logged."""

    run: str
    node: str
    account: str
    role: str
    stage: int | None
    term: int
    not_after: int
    member: int | None = None
    """Which incarnation of the node: another process under the same key has another pass."""
    signature: bytes = b""


class AddressRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where a node can be dialled. A higher `sequence` replaces a lower one."""

    run: str
    node: str
    addresses: tuple[str, ...]
    sequence: int
    expiry: int
    signature: bytes = b""


def issue(
    key: NodeKey,
    *,
    run: str,
    node: PeerId,
    account: str,
    role: str,
    stage: int | None,
    term: int,
    not_after: int,
    member: int | None = None,
) -> Pass:
    """A pass signed by the coordinator's key."""
    blank = Pass(
        run=run, node=node, account=account, role=role, stage=stage, term=term, not_after=not_after, member=member
    )
    return msgspec.structs.replace(blank, signature=key.sign(_PASS_DOMAIN, _signed_bytes(blank)))


def check(
    shown: Pass | None,
    *,
    issuer: PeerId,
    node: PeerId,
    run: str,
    now: float,
    term: int = 0,
    revoked: Container[str] = (),
) -> Pass:
    """The pass, if `node` may show it in this run at this time. Raises Refused with the reason.

    `term`: the newest that is known; passes of older ones are void. `revoked` holds node ids.
    Cheap checks come first: a stranger costs no signature check.
    """
    if shown is None:
        raise Refused("no pass was shown; join the run first")
    if shown.node != node:
        raise Refused(f"the pass belongs to {shown.node[:10]}, not to {node[:10]}")
    if shown.run != run:
        raise Refused(f"the pass is for run {shown.run[:10]}, this is run {run[:10]}")
    if node in revoked:
        raise Refused(f"the pass of {node[:10]} was revoked")
    if shown.term < term:
        raise Refused(f"the pass is of term {shown.term}, and the run is in term {term}: ask for a new one")
    if now > shown.not_after + GRACE.value:
        raise Refused(f"the pass expired {now - shown.not_after:.0f} s ago; renew it, or set this machine's clock")
    if not verify(issuer, _PASS_DOMAIN, _signed_bytes(shown), shown.signature):
        raise Refused(f"the pass was not signed by the coordinator {issuer[:10]} of this term")
    return shown


def announce(key: NodeKey, *, run: str, addresses: tuple[str, ...], sequence: int, expiry: int) -> AddressRecord:
    """An address record of the key's own node."""
    blank = AddressRecord(run=run, node=key.peer_id, addresses=addresses, sequence=sequence, expiry=expiry)
    return msgspec.structs.replace(blank, signature=key.sign(_ADDRESS_DOMAIN, _signed_bytes(blank)))


def verify_record(record: AddressRecord, *, run: str, now: float, known: AddressRecord | None = None) -> AddressRecord:
    """The record, if its node signed it and it is news. Raises Refused for a forged, expired, foreign or older one.

    `known` is the record held for that node, if any; the same record again is accepted.
    """
    if not is_peer_id(record.node) or not verify(
        PeerId(record.node), _ADDRESS_DOMAIN, _signed_bytes(record), record.signature
    ):
        raise Refused(f"the address record of {record.node[:10]} was not signed by that node")
    if record.run != run:
        raise Refused(f"the address record of {record.node[:10]} is for another run")
    if now > record.expiry + GRACE.value:
        raise Refused(f"the address record of {record.node[:10]} expired {now - record.expiry:.0f} s ago")
    if known is not None and known.node == record.node and _is_older(record, known):
        raise Refused(f"the address record of {record.node[:10]} is older than the one held ({known.sequence})")
    return record


def _is_older(record: AddressRecord, known: AddressRecord) -> bool:
    return record.sequence < known.sequence or (record.sequence == known.sequence and record != known)


def _signed_bytes(statement: Pass | AddressRecord) -> bytes:
    """Canonical: msgpack of the fields in declaration order, without the signature."""
    fields = [getattr(statement, name) for name in statement.__struct_fields__ if name != "signature"]
    return msgspec.msgpack.encode(fields)
