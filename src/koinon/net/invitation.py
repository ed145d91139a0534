"""An invitation: one line of text that leads to a run, whoever passes it on.

    koinon1 + base32( msgpack of the fields | 64-byte signature | crc-32 )

It holds the run's id, the coordinator's key, where to reach it and other peers that can say where it is, until when it
is good, and the protocol versions that the run speaks. The coordinator's key signs all of it, so nobody who passes it
on can lead a joiner elsewhere. Small letters and digits only (RFC 4648 without padding): base64 would be a sixth
shorter, but chats eat its `_` as italics and shells and double-clicks stop at its `-`. The checksum comes first, so
that a typing mistake is called one, and not a forgery.
Knows nothing of who asks, and nothing of runs beyond their id.
"""

from __future__ import annotations

import base64
import ipaddress
import re
import zlib
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

import msgspec

from koinon.errors import InvitationExpired, InvitationMalformed, InvitationUnsigned
from koinon.net.identity import NodeKey, verify
from koinon.net.passes import GRACE
from koinon.net.transport import PROTOCOL, NodeAddr
from koinon.units import PeerId, RunId

PREFIX: Final = "koinon1"
MAX_LENGTH: Final = 4096
"""Characters of the longest text that is read at all."""
MAX_ADDRESSES: Final = 8
MAX_INTRODUCERS: Final = 4
_DOMAIN: Final = "invitation"
_SIGNATURE, _CHECKSUM = 64, 4
_AGAIN: Final = "Copy it again, whole, from whoever sent it: one line that begins with koinon1."

_V4, _V6, _TEXT = b"4", b"6", b"t"
"""First byte of a packed address: an IP and a port follow, or text."""


class _Fields(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    run: bytes
    coordinator: bytes
    addresses: tuple[bytes, ...]
    introducers: tuple[tuple[bytes, tuple[bytes, ...]], ...]
    not_after: int
    protocol: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Invitation:
    """`not_after`: Unix seconds. `introducers`: other peers of the run, asked when the coordinator has moved."""

    run: RunId
    coordinator: PeerId
    addresses: tuple[str, ...]
    not_after: int
    introducers: tuple[NodeAddr, ...] = ()
    protocol: tuple[int, int] = PROTOCOL
    signature: bytes = b""

    @property
    def text(self) -> str:
        """What is passed on."""
        signed = _packed(self) + self.signature
        whole = signed + zlib.crc32(signed).to_bytes(_CHECKSUM, "big")
        return PREFIX + base64.b32encode(whole).decode().rstrip("=").lower()

    def check_time(self, now: float) -> None:
        """Raises InvitationExpired. A clock may be off by a minute."""
        if now > self.not_after + GRACE.value:
            raise InvitationExpired(
                f"This invitation was good until {day(self.not_after)}, and this machine's clock says {day(now)}. "
                f"Ask whoever runs the league for a new one; or set this machine's clock, if it is wrong."
            )


def invite(
    key: NodeKey,
    *,
    run: RunId,
    addresses: tuple[str, ...],
    not_after: int,
    introducers: tuple[NodeAddr, ...] = (),
    protocol: tuple[int, int] = PROTOCOL,
) -> Invitation:
    """An invitation signed by the coordinator's key, with at most `MAX_ADDRESSES` and `MAX_INTRODUCERS`."""
    few = tuple(replace(peer, addresses=peer.addresses[:2]) for peer in introducers[:MAX_INTRODUCERS])
    blank = Invitation(run, key.peer_id, addresses[:MAX_ADDRESSES], not_after, few, protocol)
    return replace(blank, signature=key.sign(_DOMAIN, _packed(blank)))


def read(text: str) -> Invitation:
    """The invitation in a text; white space and capitals do not matter. Whether it has expired is not looked at.

    Raises InvitationMalformed, InvitationUnsigned.
    """
    whole = _bytes_of(re.sub(r"\s", "", text).strip("'\"<>`").lower())
    packed, signature = whole[: -_SIGNATURE - _CHECKSUM], whole[-_SIGNATURE - _CHECKSUM : -_CHECKSUM]
    try:
        fields = msgspec.msgpack.decode(packed, type=_Fields)
        invitation = _unpacked(fields, signature)
    except (msgspec.DecodeError, ValueError, OverflowError) as error:
        raise InvitationMalformed(f"This invitation is whole, but says nothing sensible ({error}). {_AGAIN}") from error
    if not verify(invitation.coordinator, _DOMAIN, packed, signature):
        raise InvitationUnsigned(
            f"This invitation was not signed by the coordinator {invitation.coordinator[:10]} that it names: somebody "
            f"has changed it. Ask whoever runs the league for one, on another way than this came."
        )
    return invitation


def day(at: float) -> str:
    """A time for people, in UTC."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _bytes_of(text: str) -> bytes:
    """What the letters stand for, checksum and all. Raises InvitationMalformed."""
    if not text.startswith(PREFIX):
        if re.match(r"koinon\d", text):
            raise InvitationMalformed(
                "This invitation is of another version of koinon: upgrade koinon, or ask for an older invitation."
            )
        raise InvitationMalformed(f"This is no invitation: it does not begin with {PREFIX}. {_AGAIN}")
    letters = text.removeprefix(PREFIX)
    if odd := re.search("[^a-z2-7]", letters):
        raise InvitationMalformed(f"There is a typing mistake in the invitation: {odd[0]!r} never occurs. {_AGAIN}")
    if not _SIGNATURE < len(letters) <= MAX_LENGTH:
        raise InvitationMalformed(f"The invitation has {len(letters)} letters, which is not all of it. {_AGAIN}")
    try:
        whole = base64.b32decode(letters.upper() + "=" * (-len(letters) % 8))
    except ValueError:
        whole = b""
    is_canonical = base64.b32encode(whole).decode().rstrip("=").lower() == letters
    if not is_canonical or zlib.crc32(whole[:-_CHECKSUM]).to_bytes(_CHECKSUM, "big") != whole[-_CHECKSUM:]:
        raise InvitationMalformed(f"There is a typing mistake in the invitation, or a part is missing. {_AGAIN}")
    return whole


def _packed(invitation: Invitation) -> bytes:
    """Canonical: what is signed, and what travels."""
    return msgspec.msgpack.encode(
        _Fields(
            bytes.fromhex(invitation.run),
            bytes.fromhex(invitation.coordinator),
            _pack_all(invitation.addresses),
            tuple((bytes.fromhex(p.peer), _pack_all(p.addresses)) for p in invitation.introducers),
            invitation.not_after,
            invitation.protocol,
        )
    )


def _unpacked(fields: _Fields, signature: bytes) -> Invitation:
    """Raises ValueError for a field that cannot be."""
    low, high = fields.protocol
    keys = [fields.run, fields.coordinator, *(key for key, _ in fields.introducers)]
    lists = [fields.addresses, *(addresses for _, addresses in fields.introducers)]
    if any(len(key) != 32 for key in keys) or not 0 <= low <= high or not 0 <= fields.not_after < 1 << 40:
        raise ValueError("a key, a version or a time is out of range")
    if len(fields.introducers) > MAX_INTRODUCERS or any(len(addresses) > MAX_ADDRESSES for addresses in lists):
        raise ValueError("too many addresses")
    return Invitation(
        RunId(fields.run.hex()),
        PeerId(fields.coordinator.hex()),
        tuple(_unpack_address(a) for a in fields.addresses),
        fields.not_after,
        tuple(
            NodeAddr(PeerId(key.hex()), tuple(_unpack_address(a) for a in addresses))
            for key, addresses in fields.introducers
        ),
        fields.protocol,
        signature,
    )


def _pack_all(addresses: tuple[str, ...]) -> tuple[bytes, ...]:
    return tuple(_pack_address(address) for address in addresses)


def _pack_address(address: str) -> bytes:
    """An IP and a port in few bytes, if the same text comes out again."""
    host, _, port = address.rpartition(":")
    try:
        ip = ipaddress.ip_address(host.strip("[]"))
        packed = (_V4 if ip.version == 4 else _V6) + ip.packed + int(port).to_bytes(2, "big")
    except (ValueError, OverflowError):
        return _TEXT + address.encode()
    return packed if _unpack_address(packed) == address else _TEXT + address.encode()


def _unpack_address(packed: bytes) -> str:
    """Raises ValueError."""
    kind, rest = packed[:1], packed[1:]
    if kind == _TEXT:
        return rest.decode()
    if (kind, len(rest)) not in ((_V4, 6), (_V6, 18)):
        raise ValueError("an address of no known kind")
    ip, port = ipaddress.ip_address(rest[:-2]), int.from_bytes(rest[-2:], "big")
    return f"[{ip}]:{port}" if kind == _V6 else f"{ip}:{port}"


__all__ = ["Invitation", "day", "invite", "read"]
