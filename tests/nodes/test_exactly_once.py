"""Each item is in exactly one committed contribution of its stage, and whoever lists it has folded it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from koinon.errors import LogGap
from koinon.net.hub import Faults
from koinon.nodes import messages as m
from koinon.nodes.flight import NOBODY, Flight
from koinon.nodes.messages import Kind
from koinon.nodes.worker import Worker
from koinon.run import events as ev
from koinon.run.events import Member
from koinon.run.record import Head
from koinon.run.state import Phase, RunState, Seat, SeatStatus
from koinon.units import BitsPerSecond
from tests.nodes.leagues import Paced, Rehearsal, assert_whole, run_league, spec_of


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return run_league(spec_of(1), tmp_path_factory.mktemp("calm"), make_compute=Paced).losses()


def test_a_member_that_is_lost_twice_while_it_fetches_folds_nothing_that_is_then_thrown_away(
    tmp_path: Path,
) -> None:
    """Two returns are two reasons to fetch; the slower fetch must not empty what was folded after the faster one."""
    spec = spec_of(2, train={"steps": 4, "batch": 256, "microbatch": 2})

    async def lose_it_twice(league: Rehearsal) -> None:
        lost, other = (league.workers[0, seat].transport.me for seat in (0, 1))
        everybody = [one.transport.me for one in league.workers.values() if one.transport.me != lost]
        await league.until(lambda state: state.step == 1)
        league.hub.partition([lost], [*everybody, league.address.peer])
        await league.until(lambda state: state.step == 2)
        league.hub.set_faults(other, lost, Faults(rate=BitsPerSecond(70_000)))  # a fetch takes some seconds
        league.hub.heal()
        await league.until(lambda state: state.tally.unreachable == 1 and not unreachable(state))
        await asyncio.sleep(0.5)
        league.hub.partition([lost], [league.address.peer])
        await league.until(lambda state: state.tally.unreachable == 2)
        league.hub.heal()

    league = run_league(spec, tmp_path, lose_it_twice, make_compute=Paced)
    assert league.state.phase is Phase.COMPLETE
    assert league.state.tally.unreachable == 2


@pytest.mark.parametrize("replicas", [2, 3])
def test_a_member_that_is_excluded_in_the_middle_of_a_step_can_claim_nothing_more_of_it(
    tmp_path: Path, undisturbed: dict[int, float], replicas: int
) -> None:
    answers: list[tuple[int, ...]] = []

    async def exclude(league: Rehearsal) -> None:
        await league.until(lambda state: state.step == 2 and bool(claimed(league, 0)))
        flight = claimed(league, 0)[0]
        member = flight.route[0]
        asker = next(one for one in league.workers.values() if one.worker._bench.member == member)

        async def claim() -> None:
            voids, term = league.control.follower.state.seats[member].voids, league.state.term
            claims = m.Claims((m.Claim(flight.step, flight.microbatch, flight.revision),), (), voids, term)
            answers.append((await asker.transport.request(league.address.peer, m.CTL, claims)).header.granted)

        await claim()
        await claim()  # a late twin of a claim changes nothing
        league.control.coordinator.write(ev.Excluded(member, 2, "for the test"))
        await league.until(lambda _: any(isinstance(event, ev.Excluded) for event in league.events))
        await claim()

    league = run_league(spec_of(replicas), tmp_path, exclude, make_compute=Paced)
    assert answers == [(0,), (0,), ()]
    assert_whole(league, undisturbed)
    [released] = [event for event in league.events if isinstance(event, ev.ItemsReleased)]
    assert released.step == 2
    assert released.items


@dataclass
class Deaf:
    """Stands for a follower of the log that the log does not reach."""

    head: Head

    def accept_all(self, _records: object) -> int:
        raise LogGap(self.head.seq + 1, self.head.seq + 2)


@contextlib.contextmanager
def deaf(worker: Worker) -> Iterator[None]:
    """It is told of work, and answers; but it reads nothing of the log."""
    hearing = worker._follower._follower
    worker._follower._follower = Deaf(hearing.head)
    try:
        yield
    finally:
        worker._follower._follower = hearing


def test_work_that_overtakes_the_news_of_a_lost_gradient_is_not_folded_into_it(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    """A member was thought lost and is ready again before it has read of either: whatever it folds until then it throws
    away when it reads, so it must not be able to say before that it is folded."""

    async def lose_it_unheard(league: Rehearsal) -> None:
        await league.until(lambda state: state.step == 1 and bool(claimed(league, 0)))
        one, write = league.workers[0, 0], league.control.coordinator.write
        seat = league.state.member_of(one.transport.me)
        lost, back = ev.Unreachable(seat.member, "for the test"), ev.Returned(seat.member)
        write(lost)
        await league.until(lambda _: bool(unreachable(one.worker.state)))
        with deaf(one.worker):
            write(back, lost, back)
            twin = m.Ready(seat.member, seat.step, league.state.stages[0].root_at(seat.step))  # it said so long ago
            await one.transport.request(league.address.peer, m.CTL, twin)
            await asyncio.sleep(2.0)

    league = run_league(spec_of(1), tmp_path, lose_it_unheard, make_compute=Paced)
    assert league.state.tally.unreachable == 2
    assert_whole(league, undisturbed)


def claimed(league: Rehearsal, stage: int) -> list[Flight]:
    """Training flights whose item of that stage is claimed and not committed."""
    flights = league.control.trainer._flights.values()
    return [f for f in flights if f.kind is Kind.TRAIN and f.claimed[stage] and not f.committed[stage]]


def unreachable(state: RunState) -> list[Seat]:
    return [seat for seat in state.seats.values() if seat.status is SeatStatus.UNREACHABLE]


# --- a flight, by properties

MEMBERS = [Member(n) for n in range(4)]
"""Two per stage: 0 and 1 serve stage 0, 2 and 3 serve stage 1."""
ACCOUNTS = {member: f"account {member}" for member in MEMBERS}


class FlightMachine(RuleBasedStateMachine):
    """One microbatch in any order of claims, folds, losses, re-leases, twins and commits.

    The model: what each member's accumulator holds. A member folds once it has seen a grant; when it is lost, its
    accumulator is void; when its stage commits, what it holds is final.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flight = Flight(Kind.TRAIN, 0, 0, np.zeros((1, 2), np.int32), [MEMBERS[0], MEMBERS[2]], 0.0)
        for stage, member in enumerate(self.flight.route):
            self.flight.assign(stage, member)
        self.lives = dict.fromkeys(MEMBERS, 0)
        self.granted: set[tuple[int, Member, int]] = set()  # (stage, member, life)
        self.folded: set[tuple[int, Member, int]] = set()
        self.committed: list[tuple[int, Member]] = []

    members = st.sampled_from(MEMBERS)
    revisions = st.integers(0, 12)

    @rule(member=members, revision=revisions)
    def claims(self, member: Member, revision: int) -> None:
        stage = member // 2
        may = self.flight.route[stage] == member and not self.flight.committed[stage]
        granted = self.flight.claim(stage, member, min(revision, self.flight.revision))
        assert may or not granted
        if granted:
            self.granted.add((stage, member, self.lives[member]))

    @rule(member=members)
    def folds(self, member: Member) -> None:
        now = (member // 2, member, self.lives[member])
        if now in self.granted:
            self.folded.add(now)

    @rule(member=members, revision=revisions)
    def says_that_it_has_folded(self, member: Member, revision: int) -> None:
        stage = member // 2
        if (stage, member, self.lives[member]) in self.folded:
            self.flight.finish(stage, member, min(revision, self.flight.revision), 1.0 if stage else None)

    @rule(member=members)
    def is_lost(self, member: Member) -> None:
        """Excluded, unreachable or gone: what it folded is void, and so is every grant it had."""
        self.lives[member] += 1
        self.flight.unassign([member], ACCOUNTS)

    @rule(stage=st.integers(0, 1), other=st.integers(0, 1))
    def is_leased_again(self, stage: int, other: int) -> None:
        if self.flight.route[stage] == NOBODY:
            self.flight.assign(stage, MEMBERS[2 * stage + other])

    @rule()
    def is_offered_again(self) -> None:
        self.flight.revision += 1

    @precondition(lambda self: any(self.flight.done))
    @rule(stage=st.integers(0, 1))
    def the_stage_commits(self, stage: int) -> None:
        if self.flight.done[stage] and not self.flight.committed[stage]:
            self.committed.append((stage, self.flight.route[stage]))
            self.flight.committed[stage] = True

    @invariant()
    def no_two_living_accumulators_hold_it(self) -> None:
        for stage in 0, 1:
            if not self.flight.committed[stage]:
                holders = {m for s, m, life in self.folded if s == stage and life == self.lives[m]}
                assert len(holders) <= 1

    @invariant()
    def what_is_committed_is_held_by_the_one_who_is_named(self) -> None:
        stages = [stage for stage, _ in self.committed]
        assert len(stages) == len(set(stages))
        for stage, member in self.committed:
            assert member != NOBODY
            assert any((s, m) == (stage, member) for s, m, _ in self.folded)

    @invariant()
    def a_lease_names_only_who_may_fold(self) -> None:
        lease = self.flight.lease(1, 1)
        assert [lease.folds_at(s) for s in (0, 1)] == [not done for done in self.flight.committed]


TestFlight = FlightMachine.TestCase
TestFlight.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_claim_after_exclusion_is_refused() -> None:
    flight = Flight(Kind.TRAIN, 0, 0, np.zeros((1, 2), np.int32), [Member(0)], 0.0)
    flight.assign(0, Member(0))
    assert flight.claim(0, Member(0), 1)
    flight.unassign([Member(0)], ACCOUNTS)
    assert not flight.claim(0, Member(0), 1), "nobody has it"
    flight.assign(0, Member(1))
    assert not flight.claim(0, Member(0), 99), "somebody else has it"
    assert not flight.finish(0, Member(0), 99, None)
    flight.unassign([Member(1)], ACCOUNTS)
    flight.assign(0, Member(0))
    assert not flight.claim(0, Member(0), 1), "it was given to this member anew: the old lease is void"
    assert flight.claim(0, Member(0), flight.revision)
