"""A coordinator that tells one worker another history than the rest is caught by that worker, which keeps the proof."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from koinon.errors import Fenced, Refused, TermRefused
from koinon.nodes import messages as m
from koinon.nodes.control import Control
from koinon.run import events as ev
from koinon.run.events import Member
from koinon.run.evidence import proof_in
from koinon.run.record import Equivocation, Head, check_equivocation, genesis, seal
from koinon.run.state import Phase
from koinon.run.terms import Term
from koinon.units import Seconds
from tests.nodes.leagues import Paced, Rehearsal, assert_each_item_once, assert_whole, run_league, spec_of


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return run_league(spec_of(1), tmp_path_factory.mktemp("calm"), make_compute=Paced).losses()


@pytest.mark.parametrize("place", [1, 4, -1], ids=["first record", "fourth record", "newest record"])
def test_two_heads_are_caught_kept_as_proof_and_never_folded(
    tmp_path: Path, undisturbed: dict[int, float], place: int
) -> None:
    proofs: list[Equivocation] = []

    async def lie(league: Rehearsal) -> None:
        await league.until(lambda state: state.step == 1)
        log, key, run = league.control.run_.log, league.control.run_.key, league.spec.run_id
        victim = league.workers[1, 0]
        follower = victim.worker._follower
        while follower.next_seq <= log.head.seq:
            await asyncio.sleep(0.01)
        honest = log.record(place if place > 0 else log.head.seq)
        forged = seal(_head_before(league, honest.seq), honest.term, FORGERY, run=run, key=key)
        before, held = follower.state, follower.next_seq
        with pytest.raises(Refused, match="signed two different records"):
            await league.control.transport.request(
                victim.transport.me, m.CTL, m.Records(forged.seq, (forged.encode(),))
            )
        if follower.next_seq == held:
            assert follower.state is before
        assert Member(99) not in follower.state.seats
        [proof] = follower.evidence
        assert isinstance(proof, Equivocation)
        assert check_equivocation(proof.first, proof.second, run=run, issuer=key.peer_id) is not None
        proofs.append(proof)

    league = run_league(spec_of(2), tmp_path, lie, make_compute=Paced)
    assert len(proofs) == 1
    assert_whole(league, undisturbed)


FORGERY = ev.encode(ev.Seated(member=Member(99), worker="f" * 64, account="nobody", stage=0, seat=9, addresses=()))


def _head_before(league: Rehearsal, seq: int) -> Head:
    log = league.control.run_.log
    return genesis(league.spec.run_id) if seq == 1 else log.record(seq - 1).head


async def tell_another_story(league: Rehearsal) -> None:
    """The coordinator writes on for most, and tells one worker another record instead of the next."""
    await league.until(lambda state: state.step == 1)
    log, key, run = league.control.run_.log, league.control.run_.key, league.spec.run_id
    victim, control = league.workers[1, 0], league.control
    follower = victim.worker._follower
    while follower.next_seq <= log.head.seq:
        await asyncio.sleep(0.001)
    forged = seal(log.head, log.term, FORGERY, run=run, key=key)
    control.coordinator._publisher.remove(victim.transport.me)
    await control.transport.request(victim.transport.me, m.CTL, m.Records(forged.seq, (forged.encode(),)))
    assert Member(99) in follower.state.seats, "it believes it: nobody else has told it anything yet"


def test_followers_that_compare_heads_convict_a_coordinator_and_a_standby_replaces_it(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    culprits: list[Control] = []

    async def lie(league: Rehearsal) -> None:
        culprits.append(league.control)
        await tell_another_story(league)
        while not league.succeeded:
            await asyncio.sleep(0.05)
        with pytest.raises(Fenced):
            await culprits[0].ended()
        await culprits[0].close()
        book = await league.store().book()
        assert book.convicted == {culprits[0].run_.key.peer_id}
        again = Term(number=9, holder=culprits[0].run_.key.peer_id, not_after=0.0)
        with pytest.raises(TermRefused, match="holds no term again"):
            await league.store().take(again, after=book.current.number, lease=Seconds(1.0))

    spec = spec_of(2, train={"steps": 12})
    league = run_league(spec, tmp_path, lie, make_compute=Paced, standbys=1)
    assert league.state.phase is Phase.COMPLETE
    assert_each_item_once(league)
    [event] = [event for event in league.events if isinstance(event, ev.Equivocated)]
    proof = proof_in(event, league.spec.run_id)
    assert proof is not None and proof.issuer == culprits[0].run_.key.peer_id
    assert league.state.convicted == {proof.issuer}
    assert Member(99) not in league.state.seats, "the story that fewer were told"
    assert {step: league.losses()[step] for step in (0, 1)} == pytest.approx(
        {step: undisturbed[step] for step in (0, 1)}, abs=1e-4
    )
