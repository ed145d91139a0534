"""A small event type, keys and a log to write: the run log must work with any events."""

from __future__ import annotations

from functools import partial
from hashlib import sha256
from pathlib import Path

import msgspec

from koinon.net.identity import NodeKey
from koinon.run.log import LogReader, RunLog
from koinon.units import RunId

RUN = RunId("aa" * 32)
OTHER_RUN = RunId("bb" * 32)


class Note(msgspec.Struct, frozen=True, tag=True):
    text: str


def key_of(name: str) -> NodeKey:
    """A key that is the same in every test run."""
    return NodeKey(sha256(name.encode()).digest())


KEY = key_of("coordinator")
encode = msgspec.msgpack.encode
decode = msgspec.msgpack.Decoder(Note).decode

create = partial(RunLog[Note].create, key=KEY, run=RUN, encode=encode, decode=decode)
reopen = partial(RunLog[Note].open, key=KEY, run=RUN, encode=encode, decode=decode)
reader = partial(LogReader[Note], run=RUN, decode=decode, issuer=KEY.peer_id)


def notes(*texts: str) -> list[Note]:
    return [Note(text) for text in texts]


def written(path: Path, texts: list[str]) -> bytes:
    """The bytes of a log of these notes, which is left at `path`, closed."""
    with create(path) as log:
        log.append_many(notes(*texts))
    return path.read_bytes()


def texts_of(log: RunLog[Note]) -> list[str]:
    return [note.text for note in log.events()]
