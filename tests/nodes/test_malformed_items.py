"""A neighbour that sends what is no item is refused at the door: it ends neither the worker nor the run.

The lease is sound in each case, as a lying worker's would be. And whatever bytes come under a node's own headers, only
frame errors come out of them.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import pytest

from koinon.errors import FrameError, PeerError, Refused
from koinon.model.codec import nbytes
from koinon.net.frames import NBytes, Wire, body_size
from koinon.nodes import messages as m
from koinon.nodes.flight import NOBODY
from koinon.nodes.switchboard import REPLIES, REQUESTS
from koinon.nodes.trainer import LEASE_DOMAIN
from tests.nodes.leagues import Paced, Rehearsal, assert_whole, run_league, spec_of

SPEC = spec_of(1)
CONTEXT, VOCAB = SPEC.model.context, SPEC.model.vocab
TOKENS = 2 * CONTEXT
COEFFICIENTS = nbytes(SPEC.model.codec, TOKENS, SPEC.model.boundary_width)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return run_league(SPEC, tmp_path_factory.mktemp("calm"), make_compute=Paced).losses()


def ids_of(sequences: int, length: int, width: int, value: int) -> tuple[m.Ids, bytes]:
    kinds = {1: "<u1", 2: "<u2", 4: "<u4"}
    content = np.full(sequences * length, value).astype(kinds.get(width, "<u1")).tobytes()
    return m.Ids(sequences, length, width), content if width in kinds else bytes(sequences * length * width)


MALFORMED = {
    "a token out of range": (ids_of(2, CONTEXT + 1, 2, VOCAB), COEFFICIENTS),
    "a width that no integer has": (ids_of(2, CONTEXT + 1, 3, 0), COEFFICIENTS),
    "a sequence longer than the context": (ids_of(1, 2 * CONTEXT + 1, 2, 0), COEFFICIENTS),
    "no token to predict": (ids_of(2, 1, 2, 0), 0),
    "sizes below nothing": ((m.Ids(-1, -8, 1), bytes(8)), COEFFICIENTS),
    "coefficients cut short": (ids_of(2, CONTEXT + 1, 2, 0), COEFFICIENTS - 4),
    "too many coefficients": (ids_of(2, CONTEXT + 1, 1, 0), COEFFICIENTS + 8),
    "no coefficients at all": (ids_of(2, CONTEXT + 1, 2, 0), 0),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_neighbour_that_sends_what_is_no_item_is_refused_and_nobody_ends(
    tmp_path: Path, undisturbed: dict[int, float], what: str
) -> None:
    (ids, packed), coefficients = MALFORMED[what]

    async def lie(league: Rehearsal) -> None:
        await league.until(lambda state: state.step == 1)
        liar, victim = league.workers[0, 0], league.workers[1, 0]
        route = tuple(one.worker._bench.member for one in (liar, victim))
        lease = m.Lease(m.Kind.TRAIN, 1, 77, 1, route, 0, TOKENS)
        lease = m.signed(lease, league.control.run_.key.sign(LEASE_DOMAIN, lease.unsigned()))
        body = bytes(coefficients) + packed
        with pytest.raises((Refused, FrameError)):
            await liar.transport.push(victim.transport.me, m.WORK, m.Forward(lease, ids, len(body)), body)

    league = run_league(SPEC, tmp_path, lie, make_compute=Paced)
    assert_whole(league, undisturbed)
    assert league.state.tally.vanished == 0, "the worker is the one that it was"
    assert NOBODY not in league.workers


@cache
def examples() -> dict[str, tuple[Wire, bytes]]:
    """A valid header of every message that a node takes, and the wire that it comes over."""
    lease = m.Lease(m.Kind.TRAIN, 1, 2, 3, (0, 1), 3, 64, None, b"s" * 64)
    ids, claim = m.Ids(2, 17, 2), m.Claim(1, 2, 3)
    values: dict[str, object] = {"lease": lease, "ids": ids, "claims": (claim,), "finished": (), "nbytes": 0}
    found = {}
    for kinds in (*REQUESTS.values(), *REPLIES.values()):
        for kind in kinds:
            fields = {f.name: values.get(f.name, _value(f.type)) for f in msgspec.structs.fields(kind)}
            found[kind.__name__] = (Wire(*kinds), msgspec.msgpack.encode(kind(**fields)))
    return found


def _value(kind: object) -> object:
    simple = {int: 7, bool: True, float: 0.5, str: "word", bytes: b"bytes"}
    if kind in simple:
        return simple[kind]  # type: ignore[index]
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return kind(**{f.name: _value(f.type) for f in msgspec.structs.fields(kind)})
    if kind is NBytes:
        return 7
    return (1, 1) if kind == tuple[int, int] else () if "tuple" in str(kind) else None


@pytest.mark.parametrize("name", [kind.__name__ for kinds in (*REQUESTS.values(), *REPLIES.values()) for kind in kinds])
def test_a_damaged_header_of_any_message_is_another_one_or_a_frame_error(name: str) -> None:
    wire, valid = examples()[name]
    assert type(wire.decode_header(valid)).__name__ == name
    random, refused = Random(name), 0
    for _ in range(2000):
        spoilt = bytearray(valid)
        for _ in range(random.randrange(1, 4)):
            spoilt[random.randrange(len(spoilt))] = random.randrange(256)
        if random.random() < 0.3:
            del spoilt[random.randrange(len(spoilt)) :]
        try:
            header = wire.decode_header(bytes(spoilt))
        except FrameError:
            refused += 1
        else:
            assert isinstance(header, wire.types)
            assert body_size(header) >= 0
    assert refused > 500
    assert issubclass(FrameError, PeerError)
