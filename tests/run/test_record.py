"""Records: what a follower believes, and what convicts a coordinator."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koinon.errors import ChainBroken, FrameMalformed, LogGap, SignatureInvalid, TermPassed, TwoHeads
from koinon.net.identity import NodeKey
from koinon.run.record import Equivocation, Follower, Record, check_equivocation, decode_record, genesis, seal
from koinon.units import PeerId
from tests.run.note import KEY, OTHER_RUN, RUN, key_of

IMPOSTOR = key_of("impostor")
SUCCESSOR = key_of("successor")


def history(*events: bytes, term: int = 0, key: NodeKey = KEY) -> list[Record]:
    head, records = genesis(RUN), []
    for event in events:
        records.append(seal(head, term, event, run=RUN, key=key))
        head = records[-1].head
    return records


def follower_of(records: list[Record]) -> Follower:
    follower = Follower(RUN, KEY.peer_id)
    for record in records:
        follower.accept(record)
    return follower


def issuer(term: int) -> PeerId | None:
    return {0: KEY.peer_id, 1: SUCCESSOR.peer_id}.get(term)


def test_a_follower_takes_an_unbroken_history_and_shows_its_head() -> None:
    records = history(b"a", b"b", b"c")
    follower = Follower(RUN, KEY.peer_id)
    assert [follower.accept(record) for record in records] == [True, True, True]
    assert follower.head == records[-1].head
    assert follower.head.seq == 3


@given(st.lists(st.integers(0, 5), max_size=30))
def test_twins_and_reordering_never_change_what_is_held(order: list[int]) -> None:
    records = history(*(bytes([n]) for n in range(6)))
    follower, held = Follower(RUN, KEY.peer_id), 0
    for index in order:
        if index > held:
            with pytest.raises(LogGap) as gap:
                follower.accept(records[index])
            assert gap.value.expected == held + 1
        else:
            assert follower.accept(records[index]) == (index == held)
            held = max(held, index + 1)
        assert follower.head == (records[held - 1].head if held else genesis(RUN))


def test_a_coordinator_that_signs_two_heads_is_caught_with_evidence_that_convinces_others() -> None:
    honest = history(b"a", b"b", b"c")
    forked = seal(honest[0].head, 0, b"B", run=RUN, key=KEY)
    follower = follower_of(honest)
    with pytest.raises(TwoHeads) as caught:
        follower.accept(forked)
    assert caught.value.evidence == Equivocation(RUN, KEY.peer_id, honest[1], forked)
    assert follower.head == honest[-1].head
    assert check_equivocation(honest[1], forked, run=RUN, issuer=KEY.peer_id) is not None


def test_two_signatures_convict_only_for_one_place_of_one_run() -> None:
    a = seal(genesis(RUN), 0, b"a", run=RUN, key=KEY)
    b = seal(genesis(RUN), 0, b"b", run=RUN, key=KEY)
    later = seal(a.head, 0, b"b", run=RUN, key=KEY)
    new_term = seal(genesis(RUN), 1, b"b", run=RUN, key=KEY)
    elsewhere = seal(genesis(OTHER_RUN), 0, b"b", run=OTHER_RUN, key=KEY)
    forged = seal(genesis(RUN), 0, b"b", run=RUN, key=IMPOSTOR)
    assert check_equivocation(a, b, run=RUN, issuer=KEY.peer_id) is not None
    for innocent in (a, later, new_term, elsewhere, forged):
        assert check_equivocation(a, innocent, run=RUN, issuer=KEY.peer_id) is None
        assert check_equivocation(innocent, a, run=RUN, issuer=KEY.peer_id) is None


def test_a_coordinator_of_two_runs_commits_no_offence() -> None:
    a = seal(genesis(RUN), 0, b"a", run=RUN, key=KEY)
    b = seal(genesis(OTHER_RUN), 0, b"b", run=OTHER_RUN, key=KEY)
    for run in (RUN, OTHER_RUN):
        assert check_equivocation(a, b, run=run, issuer=KEY.peer_id) is None


def test_nobody_else_can_append() -> None:
    records = history(b"a")
    with pytest.raises(SignatureInvalid):
        follower_of(records).accept(seal(records[0].head, 0, b"b", run=RUN, key=IMPOSTOR))


@given(st.integers(0, 6), st.integers(0, 2**16))
def test_no_field_of_a_signed_record_can_be_changed(which: int, salt: int) -> None:
    record = history(b"a", b"b")[1]
    changed = Record(
        record.seq + (which == 0),
        record.term + (which == 1),
        bytes(32) if which == 2 else record.prev,
        b"c%d" % salt if which >= 3 else record.event,
        record.signature,
    )
    with pytest.raises(SignatureInvalid):
        follower_of(history(b"a")).accept(changed)


def test_a_record_that_continues_another_history_is_refused() -> None:
    stranger = seal(seal(genesis(RUN), 0, b"x", run=RUN, key=KEY).head, 0, b"y", run=RUN, key=KEY)
    with pytest.raises(ChainBroken):
        follower_of(history(b"a")).accept(stranger)


def test_a_new_term_goes_on_under_another_key_and_the_old_one_is_then_refused() -> None:
    first = history(b"a", b"b")
    follower = Follower(RUN, issuer)
    for record in first:
        follower.accept(record)
    late = seal(first[-1].head, 0, b"late", run=RUN, key=KEY)  # by a coordinator that does not know it was replaced
    handed_over = seal(first[-1].head, 1, b"c", run=RUN, key=SUCCESSOR)
    assert follower.accept(handed_over)
    with pytest.raises(TermPassed):
        follower.accept(late)
    with pytest.raises(TermPassed):
        seal(handed_over.head, 0, b"d", run=RUN, key=KEY)
    assert follower.accept(first[1]) is False  # a twin from the old term is still only a twin


def test_a_term_that_nobody_holds_signs_nothing() -> None:
    with pytest.raises(SignatureInvalid):
        Follower(RUN, issuer).accept(seal(genesis(RUN), 7, b"a", run=RUN, key=KEY))


def test_a_successor_that_rewrites_what_is_held_is_told_from_one_that_continues_it() -> None:
    first = history(b"a", b"b")
    follower = Follower(RUN, issuer)
    for record in first:
        follower.accept(record)
    with pytest.raises(ChainBroken):
        follower.accept(seal(first[0].head, 1, b"B", run=RUN, key=SUCCESSOR))


def test_a_follower_can_start_from_a_head_that_it_kept() -> None:
    records = history(b"a", b"b", b"c")
    follower = Follower(RUN, KEY.peer_id, records[1].head)
    assert follower.accept(records[1]) is False
    assert follower.accept(records[2])


@given(st.binary(max_size=300))
def test_bytes_of_a_peer_are_a_record_or_malformed(data: bytes) -> None:
    try:
        record = decode_record(data)
    except FrameMalformed:
        return
    assert decode_record(record.encode()) == record


def test_a_record_survives_the_wire() -> None:
    record = history(b"event")[0]
    assert decode_record(record.encode()) == record
    with pytest.raises(FrameMalformed):
        decode_record(record.encode() + b"\0")
