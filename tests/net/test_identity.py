"""Node keys: kept safe on disk, and signatures that count for one purpose only."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koinon.errors import KeyUnsafe
from koinon.net.identity import NodeKey, is_peer_id, verify
from koinon.units import PeerId
from tests.net.support import key

KEY = key("signer")


def test_a_key_is_made_once_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "node.key"
    first = NodeKey.load_or_create(path)
    assert NodeKey.load_or_create(path).peer_id == first.peer_id
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["node.key"]


def test_processes_that_start_at_once_agree_on_the_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda _: NodeKey.load_or_create(tmp_path / "node.key"), range(16)))
    assert len({k.peer_id for k in keys}) == 1


def test_a_key_that_others_can_read_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    NodeKey.load_or_create(path)
    for mode in (0o640, 0o604, 0o660):
        path.chmod(mode)
        with pytest.raises(KeyUnsafe, match=r"chmod 600"):
            NodeKey.load_or_create(path)


@pytest.mark.parametrize("content", ["", "zz", "ab" * 31, "ab" * 33])
def test_a_file_that_holds_no_key_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "node.key"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(KeyUnsafe, match="holds no node key"):
        NodeKey.load_or_create(path)


def test_a_key_does_not_leak_by_printing_or_pickling() -> None:
    assert KEY.raw.hex() not in repr(KEY)
    with pytest.raises(TypeError):
        pickle.dumps(KEY)


@given(st.binary(max_size=100), st.text(max_size=20))
def test_a_signature_holds_for_its_signer_domain_and_message_alone(message: bytes, domain: str) -> None:
    signature = KEY.sign(domain, message)
    assert verify(KEY.peer_id, domain, message, signature)
    assert not verify(KEY.peer_id, domain + "x", message, signature)
    assert not verify(KEY.peer_id, domain, message + b"x", signature)
    assert not verify(key("other").peer_id, domain, message, signature)


def test_domain_and_message_do_not_run_together() -> None:
    assert not verify(KEY.peer_id, "ab", b"c", KEY.sign("a", b"bc"))


@given(st.text(max_size=70), st.binary(max_size=70))
def test_any_id_and_signature_can_be_asked_about(peer: str, signature: bytes) -> None:
    assert not verify(PeerId(peer), "d", b"m", signature)


def test_a_peer_id_is_64_lower_case_hexadecimal_digits() -> None:
    assert is_peer_id(KEY.peer_id)
    assert not is_peer_id(KEY.peer_id.upper())
    assert not is_peer_id(KEY.peer_id[:-1])
    assert not is_peer_id("g" * 64)
