"""When a claim is asked, and when a granted one lets an item run."""

from __future__ import annotations

import numpy as np

from koinon.nodes.messages import Kind, Lease
from koinon.nodes.workbench import ClaimState, Item, JobKind, Workbench

MIDDLE, LAST, STAGES = 1, 2, 3


def bench_of(stage: int) -> Workbench:
    return Workbench(member=stage, stage=stage, stages=STAGES, step=5)


def leased(bench: Workbench) -> Item:
    """An item that is known by its lease alone."""
    return bench.lease(Lease(Kind.TRAIN, 5, 0, 1, (0, 1, 2), 0b111, 64))


def entered(item: Item) -> None:
    item.ids, item.entered = np.zeros((1, 5), np.int64), b"coefficients"


def test_a_claim_is_asked_as_soon_as_the_lease_is_known() -> None:
    for stage in (MIDDLE, LAST):
        bench = bench_of(stage)
        item = leased(bench)
        assert list(bench.claimable()) == [item]
        item.claim = ClaimState.ASKED
        assert not list(bench.claimable())


def test_nothing_runs_before_its_input_is_here_however_early_it_was_claimed() -> None:
    bench = bench_of(LAST)
    item = leased(bench)
    item.claim = ClaimState.GRANTED
    assert bench.next_job() is None
    entered(item)
    job = bench.next_job()
    assert job is not None
    assert job.kind is JobKind.FINISH


def test_a_gradient_that_finds_the_claim_granted_is_folded_at_once() -> None:
    bench = bench_of(MIDDLE)
    item = leased(bench)
    entered(item)
    item.left, item.claim = b"coefficients", ClaimState.GRANTED
    item.gradient = b"gradient"
    job = bench.next_job()
    assert job is not None
    assert (job.kind, job.item) == (JobKind.BACKWARD, item)


def test_a_dropped_item_is_not_folded_however_early_it_was_claimed() -> None:
    bench = bench_of(MIDDLE)
    item = leased(bench)
    entered(item)
    item.left, item.claim, item.gradient = b"coefficients", ClaimState.GRANTED, b"gradient"
    bench.drop(5, 0)
    assert bench.next_job() is None
    assert not bench.has_open_items()
