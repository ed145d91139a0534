"""Terms: each number has one holder, whatever takers, clocks and crashes do; and the policies around them."""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import os
import signal
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from koinon.errors import Fenced, StateError, TermRefused, TermStoreCorrupt
from koinon.net.identity import NodeKey
from koinon.run.policies.deadlines import History
from koinon.run.record import Equivocation, Head, Record, genesis, seal
from koinon.run.termfile import FileTermStore
from koinon.run.terms import (
    LEASE_FLOOR,
    SILENCE_FLOOR,
    Book,
    Term,
    has_enough,
    is_alone,
    is_expired,
    lease_length,
    may_take,
    renewed,
    revoked,
    taken,
)
from koinon.units import PeerId, RunId, Seconds

RUN = RunId("r" * 64)
KEYS = [NodeKey(bytes([n]) * 32) for n in range(1, 4)]
LEASE, GRACE = Seconds(4.0), Seconds(0.5)


def term_of(number: int, holder: str) -> Term:
    return Term(number=number, holder=holder, not_after=0.0)


def two_heads(key: NodeKey, term: int, run: RunId = RUN) -> Equivocation:
    first, second = (seal(genesis(run), term, event, run=run, key=key) for event in (b"one", b"another"))
    return Equivocation(run, key.peer_id, first, second)


# --- the rules, under any sequence of wishes


class Wishes(RuleBasedStateMachine):
    """Three nodes that want terms, renew them and accuse each other, while time passes."""

    @initialize()
    def begin(self) -> None:
        self.book, self.now = Book(RUN), 0.0
        self.given: dict[int, str] = {}

    @rule(who=st.sampled_from(KEYS), number=st.integers(1, 12), after=st.integers(0, 11))
    def take(self, who: NodeKey, number: int, after: int) -> None:
        before = self.book.current
        try:
            self.book = taken(
                self.book, term_of(number, who.peer_id), after=after, now=self.now, lease=LEASE, grace=GRACE
            )  # fmt: skip
        except TermRefused:
            return
        assert number not in self.given, "a term is given once"
        assert who.peer_id not in self.book.convicted
        assert before is None or before.holder == who.peer_id or before.revoked or is_expired(before, self.now, GRACE)
        self.given[number] = who.peer_id

    @rule(who=st.sampled_from(KEYS), number=st.integers(1, 12))
    def renew(self, who: NodeKey, number: int) -> None:
        before = self.book.current
        try:
            self.book = renewed(self.book, number, who.peer_id, now=self.now, lease=LEASE, begins=Head(3, 1, b"h" * 32))
        except Fenced:
            assert before is None or before.revoked or (before.number, before.holder) != (number, who.peer_id)
        else:
            assert before is not None and self.book.current is not None
            assert self.book.current.not_after >= before.not_after
            assert self.book.current.begun

    @rule(who=st.sampled_from(KEYS), number=st.integers(1, 12))
    def accuse(self, who: NodeKey, number: int) -> None:
        try:
            self.book = revoked(self.book, two_heads(who, number))
        except TermRefused:
            assert self.book.holder_of(number) != who.peer_id
        else:
            assert who.peer_id in self.book.convicted

    @rule(seconds=st.floats(0.0, 6.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def numbers_grow_and_holders_stay(self) -> None:
        numbers = [term.number for term in self.book.terms]
        assert all(a < b for a, b in pairwise(numbers))
        assert {term.number: term.holder for term in self.book.terms} == self.given


Wishes.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestWishes = Wishes.TestCase


# --- the file


def store_at(path: Path, now: float = 0.0) -> FileTermStore:
    return FileTermStore(path / "terms", RUN, clock=lambda: now)


def test_a_guest_is_noted_once_and_before_there_is_a_term(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    for key in (*KEYS, KEYS[0]):
        asyncio.run(store.enrol(key.peer_id))
    assert store_at(tmp_path).read() == Book(RUN, guests=tuple(key.peer_id for key in KEYS))
    asyncio.run(store.take(term_of(1, KEYS[0].peer_id), after=0, lease=LEASE))
    assert len(store.read().guests) == len(KEYS)


def _take_all(path: str, who: int, count: int) -> None:
    """In a process of its own: take as many terms as one can get, in a race with others."""
    store = FileTermStore(Path(path), RUN)
    key = KEYS[who].peer_id

    async def race() -> None:
        while True:
            book = await store.book()
            number = len(book.terms)
            if number >= count:
                return
            try:
                await store.take(term_of(number + 1, key), after=number, lease=Seconds(-10.0))
            except TermRefused:
                continue

    asyncio.run(race())


def _processes(path: Path, count: int) -> list[multiprocessing.Process]:
    context = multiprocessing.get_context("fork")
    racers = [context.Process(target=_take_all, args=(str(path / "terms"), who, count)) for who in range(3)]
    for racer in racers:
        racer.start()
    return racers  # type: ignore[return-value]


def test_processes_that_race_get_each_term_once(tmp_path: Path) -> None:
    for racer in _processes(tmp_path, 30):
        racer.join(60)
        assert racer.exitcode == 0
    terms = store_at(tmp_path).read().terms
    assert [term.number for term in terms] == list(range(1, 31))


def test_processes_that_are_killed_while_they_write_leave_a_whole_book(tmp_path: Path) -> None:
    reader, seen = store_at(tmp_path), 0
    for _ in range(5):
        racers = _processes(tmp_path, 10_000)
        while (now := len(reader.read().terms)) < seen + 3:
            pass
        for racer in racers:
            os.kill(racer.pid or 0, signal.SIGKILL)
            racer.join()
        assert len(store_at(tmp_path).read().terms) >= now
        seen = now
    numbers = [term.number for term in store_at(tmp_path).read().terms]
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[:-9], "checksum"),
        (lambda data: b"", "checksum"),
        (lambda data: data.replace(b'"number":1', b'"number":2'), "checksum"),
        (lambda data: os.urandom(400), "checksum"),
        (lambda data: b"\0" * len(data), "checksum"),
    ],
    ids=["torn", "empty", "another number", "noise", "zeroes"],
)
def test_what_is_no_book_is_an_error_and_stays_as_it_is(tmp_path: Path, damage: object, says: str) -> None:
    asyncio.run(store_at(tmp_path).take(term_of(1, KEYS[0].peer_id), after=0, lease=LEASE))
    path = tmp_path / "terms"
    path.write_bytes(spoilt := damage(path.read_bytes()))  # type: ignore[operator]
    for act in (
        lambda store: store.book(),
        lambda store: store.take(term_of(2, KEYS[1].peer_id), after=1, lease=LEASE),
        lambda store: store.renew(1, KEYS[0].peer_id, lease=LEASE),
    ):
        with pytest.raises(TermStoreCorrupt, match=says):
            asyncio.run(act(store_at(tmp_path)))  # type: ignore[no-untyped-call]
    assert path.read_bytes() == spoilt


def _sealed(book: Book) -> bytes:
    body = msgspec.json.encode(book)
    return b"kointerms1 " + hashlib.sha256(body).hexdigest().encode() + b"\n" + body


HOLDER = KEYS[0].peer_id


@pytest.mark.parametrize(
    "book",
    [
        Book("another run", (term_of(1, HOLDER),)),
        Book(RUN, (term_of(2, HOLDER), term_of(1, HOLDER))),
        Book(RUN, (term_of(1, HOLDER), term_of(1, HOLDER))),
        Book(RUN, (term_of(0, HOLDER),)),
        Book(RUN, (term_of(1, "nobody"),)),
        Book(RUN, (Term(number=1, holder=HOLDER, not_after=0.0, addresses=("a" * 1000,)),)),
        Book(RUN, (Term(number=1, holder=HOLDER, not_after=0.0, head="x"),)),
    ],
    ids=["another run", "out of order", "twice", "no number", "no key", "long address", "no hash"],
)
def test_a_book_that_somebody_made_up_is_refused_even_with_its_checksum(tmp_path: Path, book: Book) -> None:
    (tmp_path / "terms").write_bytes(_sealed(book))
    with pytest.raises(TermStoreCorrupt):
        store_at(tmp_path).read()


def test_a_store_that_forgot_what_this_process_saw_is_an_error(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    asyncio.run(store.take(term_of(1, HOLDER), after=0, lease=LEASE))
    assert store.read().current
    (tmp_path / "terms").unlink()
    with pytest.raises(TermStoreCorrupt, match="gone"):
        store.read()
    with pytest.raises(TermRefused, match="at none"):
        asyncio.run(store_at(tmp_path).take(term_of(2, HOLDER), after=1, lease=LEASE))


def test_only_a_real_proof_convicts() -> None:
    book = taken(Book(RUN), term_of(1, HOLDER), after=0, now=0.0, lease=LEASE, grace=GRACE)
    honest, other = two_heads(KEYS[0], 1), two_heads(KEYS[1], 1)
    same = Equivocation(RUN, KEYS[0].peer_id, honest.first, honest.first)
    forged = Equivocation(RUN, KEYS[0].peer_id, other.first, other.second)
    elsewhere = two_heads(KEYS[0], 1, RunId("s" * 64))
    for proof in (same, forged, other, elsewhere, Equivocation(RUN, KEYS[0].peer_id, *_pair(elsewhere))):
        with pytest.raises(TermRefused):
            revoked(book, proof)
    convicted = revoked(book, honest)
    assert convicted.convicted == {HOLDER} and revoked(convicted, honest) == convicted
    with pytest.raises(TermRefused, match="holds no term again"):
        taken(convicted, term_of(2, HOLDER), after=1, now=99.0, lease=LEASE, grace=GRACE)
    with pytest.raises(Fenced):
        renewed(convicted, 1, HOLDER, now=0.0, lease=LEASE, begins=None)
    assert taken(convicted, term_of(2, KEYS[1].peer_id), after=1, now=0.0, lease=LEASE, grace=GRACE).current


def _pair(proof: Equivocation) -> tuple[Record, Record]:
    return proof.first, proof.second


# --- policies

ME = KEYS[1].peer_id
histories = st.lists(st.floats(0.0, 30.0), max_size=20).map(lambda seconds: History(tuple(seconds)))


@given(st.floats(0.0, 60.0), st.floats(0.0, 60.0), histories)
def test_a_term_is_taken_only_from_a_holder_that_is_silent_and_whose_lease_ran_out(
    now: float, silent: float, silences: History
) -> None:
    term = Term(number=1, holder=HOLDER, not_after=20.0, begun=True)
    may = may_take(term, me=ME, now=now, grace=GRACE, silent=Seconds(silent), silences=silences)
    if may:
        assert now > 20.0 + GRACE.value and silent > SILENCE_FLOOR.value
    if now > 20.5 and silent > 200.0:
        assert may
    ended = msgspec.structs.replace(term, revoked=True)
    assert may_take(ended, me=ME, now=now, grace=GRACE, silent=Seconds(silent), silences=silences)
    assert not may_take(ended, me=ME, now=now, grace=GRACE, silent=Seconds(silent), silences=silences, convicted={ME})


def test_an_undisturbed_second_by_second_holder_is_replaced_within_five_seconds_of_its_death() -> None:
    beats = History((1.0,) * 20)
    lease = lease_length(beats)
    assert lease == LEASE_FLOOR
    term = Term(number=1, holder=HOLDER, not_after=lease.value)
    waits = [t / 10 for t in range(200)]
    taken_after = next(
        t for t in waits if may_take(term, me=ME, now=t, grace=Seconds(0), silent=Seconds(t), silences=beats)
    )  # fmt: skip
    assert taken_after < 5.0


@given(histories)
def test_a_busy_machine_gets_longer_leases_and_never_shorter_ones(renewals: History) -> None:
    assert lease_length(renewals) >= LEASE_FLOOR
    assert lease_length(History((30.0,) * 20)).value >= 30.0


@given(st.lists(st.floats(0.0, 5.0), max_size=20), st.integers(0, 20), st.floats(0.0, 1000.0))
def test_a_successor_waits_for_all_then_for_two_thirds_and_never_for_ever(
    took: list[float], missing: int, waited: float
) -> None:
    asked = len(took) + missing
    enough = has_enough(took, asked, Seconds(waited))
    if missing == 0:
        assert enough
    elif waited <= 1.0:
        assert not enough
    if waited > 500.0 and took:
        assert enough
    if missing and not took:
        assert not enough and is_alone(0, asked, Seconds(waited)) == (waited > LEASE_FLOOR.value)
    if enough and missing and 3 * len(took) < 2 * asked:
        assert waited > 3.0


def test_every_refusal_is_a_state_error_with_a_sentence() -> None:
    for error in (Fenced(1, 2, HOLDER), Fenced(1, 1, HOLDER), Fenced(1, 0, "")):
        assert isinstance(error, StateError) and "standby" in str(error)
    assert PeerId(HOLDER)
