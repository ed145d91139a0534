"""An invitation says what was put into it, and any change of it is refused and named."""

from __future__ import annotations

import base64
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koinon.errors import InvitationError, InvitationExpired, InvitationMalformed, InvitationUnsigned
from koinon.net.identity import NodeKey
from koinon.net.invitation import PREFIX, Invitation, _bytes_of, invite, read
from koinon.net.transport import NodeAddr
from koinon.units import RunId

KEY = NodeKey(bytes(range(32)))
ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
addresses = st.one_of(
    st.builds(lambda ip, port: f"{ip}:{port}", st.ip_addresses(v=4), st.integers(0, 65535)),
    st.builds(lambda ip, port: f"[{ip}]:{port}", st.ip_addresses(v=6), st.integers(0, 65535)),
    st.text(max_size=30),
)
peers = st.builds(
    lambda secret, where: NodeAddr(NodeKey(secret).peer_id, tuple(where)),
    st.binary(min_size=32, max_size=32),
    st.lists(addresses, max_size=2),
)
invitations = st.builds(
    lambda run, where, until, others, low, more: invite(
        KEY, run=RunId(run.hex()), addresses=tuple(where), not_after=until, introducers=tuple(others),
        protocol=(low, low + more),
    ),
    st.binary(min_size=32, max_size=32),
    st.lists(addresses, max_size=8),
    st.integers(0, 2**40 - 1),
    st.lists(peers, max_size=4),
    st.integers(0, 300),
    st.integers(0, 300),
)  # fmt: skip


def usual(**changes: object) -> Invitation:
    values = {"run": RunId("ab" * 32), "addresses": ("192.0.2.7:4774",), "not_after": 2_000_000_000} | changes
    return invite(KEY, **values)  # type: ignore[arg-type]


@given(invitations)
def test_what_was_put_in_comes_out(invitation: Invitation) -> None:
    assert read(invitation.text) == invitation


@given(invitations, st.data())
def test_any_single_changed_character_is_refused_as_a_mistake(invitation: Invitation, data: st.DataObject) -> None:
    text = invitation.text
    place = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.characters(codec="utf-8"))
    if other.lower() == text[place] or other.isspace() or other in "'\"<>`":
        return
    with pytest.raises(InvitationMalformed):
        read(text[:place] + other + text[place + 1 :])


def test_every_other_letter_at_every_place_is_refused() -> None:
    text = usual().text
    for place in range(len(PREFIX), len(text)):
        for other in set(ALPHABET) - {text[place]}:
            with pytest.raises(InvitationMalformed, match="typing mistake"):
                read(text[:place] + other + text[place + 1 :])


@given(invitations, st.integers(1, 300))
def test_a_part_of_it_is_refused(invitation: Invitation, cut: int) -> None:
    with pytest.raises(InvitationMalformed):
        read(invitation.text[:-cut])


@given(st.one_of(st.text(), st.text(ALPHABET).map(lambda t: PREFIX + t), st.binary().map(lambda b: _sealed(b))))
def test_any_text_is_read_or_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(InvitationError):
        read(text)


def test_what_a_chat_or_a_mail_does_to_a_line_does_no_harm() -> None:
    text = usual().text
    assert read(f"  '{text.upper()}'\n") == read(f"{text[:70]}\n{text[70:140]}\r\n {text[140:]}") == usual()


def test_it_is_safe_in_a_shell_and_short() -> None:
    text = usual().text
    assert text.isalnum()
    assert text.islower()
    assert len(text) < 260


def test_one_that_somebody_else_signed_or_changed_is_a_forgery_and_no_typing_mistake() -> None:
    for place in range(3, 100):
        raw = bytearray(_bytes_of(usual().text))
        raw[place] ^= 1
        with pytest.raises((InvitationUnsigned, InvitationMalformed)) as refused:
            read(_sealed(bytes(raw[:-4])))
        assert "typing" not in str(refused.value)


def test_an_expired_one_says_both_times() -> None:
    usual().check_time(2_000_000_059)
    with pytest.raises(InvitationExpired, match="until 2033-05-18 03:33 UTC, and this machine's clock says 2033"):
        usual().check_time(2_000_000_061)


def test_another_version_is_told_from_a_mistake() -> None:
    with pytest.raises(InvitationMalformed, match="upgrade koinon"):
        read("koinon2" + usual().text.removeprefix(PREFIX))


def _sealed(signed: bytes) -> str:
    """Any bytes with a right checksum."""
    whole = signed + zlib.crc32(signed).to_bytes(4, "big")
    return PREFIX + base64.b32encode(whole).decode().rstrip("=").lower()
