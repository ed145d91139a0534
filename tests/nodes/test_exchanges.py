"""What a step costs in exchanges, and what items that are leased ahead may and may not do."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from koinon.nodes.messages import Kind, Lease
from koinon.nodes.workbench import JobKind, Workbench
from koinon.run.state import Phase
from tests.nodes.leagues import Paced, Rehearsal, assert_each_item_once, run_league, spec_of


def asked(league: Rehearsal) -> Counter[str]:
    transports = [league.control.transport, *(one.transport for one in league.workers.values())]
    return sum((transport.asked for transport in transports), Counter())


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_step_takes_few_exchanges_beside_those_that_carry_tensors(tmp_path: Path, replicas: int) -> None:
    steps, stages, first, last = 12, 3, 4, 10
    spec = spec_of(replicas, stages, train={"steps": steps, "batch": 12, "microbatch": 2})
    counts: list[Counter[str]] = []

    async def count(league: Rehearsal) -> None:
        for step in first, last:
            await league.until(lambda state, step=step: state.step >= step)
            counts.append(asked(league))

    league = run_league(spec, tmp_path, count, make_compute=Paced)
    members, measured = replicas * stages, last - first
    each = {kind: n / measured / members for kind, n in (counts[1] - counts[0]).items()}
    crossings = spec.train.microbatches * (stages - 1) / members
    assert each["Forward"] == pytest.approx(crossings, rel=0.2)
    assert each["Backward"] == pytest.approx(crossings, rel=0.2)
    assert each["Offer"] <= 1.2, "one for all of a step's items"
    assert each["Claims"] <= 2.4, "one that asks, one that tells"
    assert each["Held"] <= 1.2
    assert each["Records"] <= 4, "a reduce that opens, a step that is taken, and what has waited for company"
    assert_each_item_once(league)


def test_more_items_than_may_be_leased_keep_coming_and_few_are_begun(tmp_path: Path) -> None:
    spec = spec_of(1, 2, train={"steps": 4, "batch": 48, "microbatch": 2}, league={"in_flight": 4})
    most = {"begun": 0, "known": 0}

    async def watch(league: Rehearsal) -> None:
        await league.ready()
        while league.state.step < spec.train.steps:
            bench = league.workers[0, 0].worker._bench
            most["begun"] = max(most["begun"], bench._begun())
            open_ = [i for i in bench.items.values() if not i.is_done and i.lease.step == bench.step]
            most["known"] = max(most["known"], len(open_))
            await asyncio.sleep(0.01)

    league = run_league(spec, tmp_path, watch, make_compute=Paced)
    assert league.state.phase is Phase.COMPLETE
    assert 2 <= most["begun"] <= 3, "as many as compute, and one on its way"
    assert most["begun"] < most["known"] <= 4
    jobs = spec.train.steps * spec.train.microbatches * 2
    assert league.ended_at < 1.5 * jobs * 0.05, "the first stage, with two jobs an item, hardly ever waits"
    assert_each_item_once(league)


def test_a_sample_that_is_asked_for_in_the_middle_of_a_step_does_not_wait_for_its_end(tmp_path: Path) -> None:
    spec = spec_of(1, 2, train={"steps": 3, "batch": 80}, league={"in_flight": 40})
    took: list[float] = []

    async def sample(league: Rehearsal) -> None:
        await league.until(lambda state: state.step == 1)
        clock = asyncio.get_running_loop().time
        await asyncio.sleep(0.5)
        for draw in range(4):
            began = clock()
            await league.control.trainer.sample([1, 2, 3], temperature=0.0, seed=draw)
            took.append(clock() - began)

    run_league(spec, tmp_path, sample, make_compute=Paced)
    assert max(took) < 1.0, "a step takes four seconds"


def lease(step: int, microbatch: int) -> Lease:
    return Lease(Kind.TRAIN, step, microbatch, 1, (0, 1), 0b11, 64)


def test_items_of_a_later_step_do_not_keep_out_those_of_an_earlier_one() -> None:
    """They cannot be computed before it: with leases known ahead, both would wait for ever."""
    bench = Workbench(member=1, stage=1, stages=2, step=3, capacity=2)
    for microbatch in range(2):
        bench.lease(lease(4, microbatch)).entered = b"."
    assert bench.admits(lease(4, 1).key), "a twin"
    assert not bench.admits(lease(4, 2).key)
    assert bench.admits(lease(3, 0).key)
    bench.lease(lease(3, 0)).entered = b"."
    bench.lease(lease(3, 1)).entered = b"."
    bench.lease(lease(3, 2))
    assert not bench.admits(lease(3, 2).key), "a lease that is known takes no room of its own"


def test_the_first_stage_begins_as_many_as_it_may_and_another_when_one_is_folded_or_dropped() -> None:
    bench = Workbench(member=0, stage=0, stages=2, begun_at_once=2)
    for microbatch in range(5):
        bench.lease(lease(0, microbatch)).ids = "ids"
    begun = []
    while (job := bench.next_job()) is not None:
        assert job.kind is JobKind.FORWARD
        job.item.left = b"."
        begun.append(job.microbatch)
    assert begun == [0, 1]
    bench.items[0, 0, 0].is_done = True
    assert bench.next_job().microbatch == 2
    bench.next_job().item.left = b"."
    assert bench.next_job() is None
    bench.drop(0, 1)
    assert bench.next_job().microbatch == 3
    assert [item.key[2] for item in bench.claimable()] == [2, 3, 4]
