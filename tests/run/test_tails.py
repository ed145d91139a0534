"""Which history a successor adopts, and what two histories prove."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from koinon.net.identity import NodeKey
from koinon.run import events as ev
from koinon.run.evidence import as_event, proof_in
from koinon.run.record import Equivocation, Head, Record, genesis, seal
from koinon.run.state import RunState, fold
from koinon.run.tails import adopt, contradiction, sound_part
from koinon.units import PeerId, RunId

RUN = RunId("r" * 64)
HOLDERS = {1: NodeKey(b"1" * 32), 2: NodeKey(b"2" * 32)}
STRANGER = NodeKey(b"3" * 32)


def issuer(term: int) -> PeerId | None:
    return HOLDERS[term].peer_id if term in HOLDERS else None


def history(head: Head, events: Sequence[bytes], term: int, key: NodeKey | None = None) -> list[Record]:
    records = []
    for event in events:
        record = seal(head, term, event, run=RUN, key=key or HOLDERS[term])
        records.append(record)
        head = record.head
    return records


TRUE = history(genesis(RUN), [b"%d" % n for n in range(12)], 1)
LATER = history(TRUE[5].head, [b"later %d" % n for n in range(3)], 2)
lengths = st.lists(st.integers(0, 12), max_size=5)


@given(st.integers(0, 12), lengths)
def test_the_longest_of_honest_tails_is_adopted_whole(mine: int, held: list[int]) -> None:
    base = TRUE[mine - 1].head if mine else genesis(RUN)
    found = adopt(base, [TRUE[mine:length] for length in held], run=RUN, issuer=issuer)
    assert list(found.records) == TRUE[mine : max([mine, *held])]
    assert not found.proofs


@given(lengths, st.integers(1, 3))
def test_a_later_term_beats_a_longer_history_of_an_older_one(held: list[int], seen: int) -> None:
    tails = [*(TRUE[:length] for length in held), TRUE[:6] + LATER[:seen]]
    assert list(adopt(genesis(RUN), tails, run=RUN, issuer=issuer).records) == TRUE[:6] + LATER[:seen]


@given(st.integers(0, 11), st.sampled_from(["signature", "event", "gap", "stranger", "unknown term"]))
def test_a_tail_is_believed_as_far_as_it_is_signed_and_unbroken(place: int, lie: str) -> None:
    told, before = list(TRUE), TRUE[place - 1].head if place else genesis(RUN)
    match lie:
        case "signature":
            told = [*TRUE[:place], Record(*_fields(TRUE[place], signature=bytes(64)))]
        case "event":
            told[place] = Record(*_fields(TRUE[place], event=b"a lie"))
        case "gap":
            del told[place]
        case "stranger":
            told = TRUE[:place] + history(before, [b"lie"] * 20, 1, STRANGER)
        case _:
            told = TRUE[:place] + history(before, [b"lie"] * 20, 7, STRANGER)
    believed = sound_part(genesis(RUN), told, run=RUN, issuer=issuer)
    assert list(believed) == TRUE[: len(believed)], "nothing but the truth"
    if lie != "event" or place == 0:
        assert len(believed) == place


@given(st.integers(0, 11), st.integers(1, 4))
def test_two_tails_that_part_convict_whoever_signed_both(fork: int, length: int) -> None:
    before = TRUE[fork - 1].head if fork else genesis(RUN)
    other = TRUE[:fork] + history(before, [b"to others"] * length, 1)
    found = adopt(genesis(RUN), [TRUE, other], run=RUN, issuer=issuer)
    [proof] = found.proofs
    assert proof.issuer == HOLDERS[1].peer_id and proof.first.seq == fork + 1
    assert contradiction(TRUE, TRUE[:fork], run=RUN, issuer=issuer) is None


def test_a_forged_history_convicts_nobody() -> None:
    forged = history(genesis(RUN), [b"lie"] * 3, 1, STRANGER)
    assert adopt(genesis(RUN), [TRUE, forged], run=RUN, issuer=issuer).proofs == ()


# --- in the log


def _fields(record: Record, **other: object) -> list[object]:
    return [other.get(name, getattr(record, name)) for name in Record.__struct_fields__]


def proven(term: int = 1) -> Equivocation:
    first, second = (history(genesis(RUN), [event], term)[0] for event in (b"one", b"another"))
    return Equivocation(RUN, HOLDERS[term].peer_id, first, second)


def opened() -> RunState:
    holder = HOLDERS[1].peer_id
    return fold([ev.RunOpened(RUN, "spec", holder, holder, 2, 3, "commitment")])


def test_proof_in_the_log_bars_the_key_and_anybody_can_check_it() -> None:
    event = as_event(proven())
    assert proof_in(ev.decode(ev.encode(event)), RUN) == proven()  # type: ignore[arg-type]
    state = fold([event], opened())
    assert state.convicted == {HOLDERS[1].peer_id}
    again = ev.TermBegan(2, HOLDERS[1].peer_id, HOLDERS[1].peer_id, "it wants to")
    assert fold([again], state) == state


def test_what_is_no_proof_changes_nothing() -> None:
    state, whole = opened(), as_event(proven())
    for fake in (
        as_event(proven(2)),  # it never held term 2
        ev.Equivocated(1, HOLDERS[1].peer_id, whole.first, whole.first),
        ev.Equivocated(1, HOLDERS[2].peer_id, whole.first, whole.second),
        ev.Equivocated(2, HOLDERS[1].peer_id, whole.first, whole.second),
        ev.Equivocated(1, HOLDERS[1].peer_id, b"", whole.second),
    ):
        assert fold([fake], state) == state


def test_a_new_term_voids_what_the_open_step_had_and_nothing_else() -> None:
    members = tuple(ev.Member(n) for n in range(2))
    seats = [ev.Seated(who, f"w{who}", f"a{who}", who, 0, ()) for who in members]
    ready = [ev.SeatReady(who, 0, "root") for who in members]
    done = [ev.ReduceOpened(0, 0, 0, (members[0],), (b"\x07",)), ev.Contributed(members[0], 0, 0, b"\x07", 30, 300),
            ev.StageStepped(0, 0, 0, "next", 1.0, 0.0)]  # fmt: skip
    half = [ev.ReduceOpened(1, 0, 0, (members[1],), (b"\x07",)), ev.Contributed(members[1], 1, 0, b"\x07", 30, 300)]
    before = fold([*seats, *ready, *done, *half], opened())
    heir = HOLDERS[2].peer_id
    state = fold([ev.TermBegan(2, heir, heir, "silent")], before)
    assert (state.coordinator, state.trainer, state.term) == (heir, heir, 2)
    assert state.seats == before.seats and [s.step for s in state.stages] == [1, 0]
    assert state.stages[1].reduce is None and state.stages[1].attempt == 1
    assert state.credit["a0"].items == 3 and state.credit["a1"].items == 0
    assert (state.holder_of(1), state.holder_of(2), state.holder_of(9)) == (HOLDERS[1].peer_id, heir, heir)
