"""Node keys: an Ed25519 key is a node's address, its TLS identity and its signature (RFC 8032).

A node key is disposable, one per machine; who owns the machine is another matter, settled by a pass.
Every signature names its domain, so bytes signed for one purpose never count for another.
Knows nothing of transports, runs or accounts.
"""

from __future__ import annotations

import os
import secrets
from functools import lru_cache
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from koinon.errors import KeyUnsafe, room
from koinon.units import PeerId

_SECRET_BYTES: Final = 32
_CONTEXT: Final = b"koinon signature 1"


class NodeKey:
    """An Ed25519 key pair. Never printed, never pickled; `raw` is for the transport alone."""

    def __init__(self, raw: bytes) -> None:
        self._private = Ed25519PrivateKey.from_private_bytes(raw)
        self.raw: Final = raw
        self.peer_id: Final = PeerId(self._private.public_key().public_bytes_raw().hex())

    @classmethod
    def generate(cls) -> NodeKey:
        return cls(secrets.token_bytes(_SECRET_BYTES))

    @classmethod
    def load_or_create(cls, path: Path) -> NodeKey:
        """The key kept at `path`, made on first use with mode 0600. Raises KeyUnsafe when others may read it, DiskFull.

        Two processes that start at once agree: whoever links its file first wins, the other reads it.
        """
        if not path.exists():
            with room(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                _create_once(path, secrets.token_bytes(_SECRET_BYTES).hex())
        return cls(_read_secret(path))

    def sign(self, domain: str, message: bytes) -> bytes:
        """A 64-byte signature over the message in that domain."""
        return self._private.sign(_framed(domain, message))

    def __repr__(self) -> str:
        return f"NodeKey({self.peer_id[:10]})"

    def __reduce__(self) -> str:
        raise TypeError("A node key stays in its process: pass its path or its raw bytes on purpose.")


def verify(peer: PeerId, domain: str, message: bytes, signature: bytes) -> bool:
    """Whether `peer` signed this message in this domain. False, never an error, for ids and signatures of any shape."""
    try:
        _public(peer).verify(signature, _framed(domain, message))
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


@lru_cache(maxsize=4096)
def _public(peer: PeerId) -> Ed25519PublicKey:
    """Reading a key costs as much as a tenth of a verification, and the same few peers sign everything."""
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(peer))


def is_peer_id(text: str) -> bool:
    """Whether this is 64 lower-case hexadecimal digits."""
    return len(text) == 2 * _SECRET_BYTES and all(c in "0123456789abcdef" for c in text)


def _framed(domain: str, message: bytes) -> bytes:
    name = domain.encode()
    return _CONTEXT + len(name).to_bytes(2, "big") + name + message


def _create_once(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)
    except FileExistsError:
        pass  # another process was first: its key is the key
    finally:
        draft.unlink()


def _read_secret(path: Path) -> bytes:
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise KeyUnsafe(f"{path} can be read by others (mode {mode:04o}). Run `chmod 600 {path}`, or delete it.")
    try:
        raw = bytes.fromhex(path.read_text().strip())
    except ValueError:
        raw = b""
    if len(raw) != _SECRET_BYTES:
        raise KeyUnsafe(f"{path} holds no node key (64 hexadecimal digits). Restore it, or delete it to get a new one.")
    return raw
