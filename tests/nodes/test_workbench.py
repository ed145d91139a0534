"""When a claim is asked, and what its answer still means when it comes."""

from __future__ import annotations

import numpy as np
import pytest

from koinon.nodes.messages import Kind, Lease
from koinon.nodes.workbench import ClaimState, Item, JobKind, Workbench

MIDDLE, LAST, STAGES = 1, 2, 3


def bench_of(stage: int) -> Workbench:
    return Workbench(member=stage, stage=stage, stages=STAGES, step=5)


def leased(bench: Workbench, revision: int = 1) -> Item:
    """An item with its input on the bench."""
    item = bench.lease(Lease(Kind.TRAIN, 5, 0, revision, (0, 1, 2), 0b111, 64))
    item.ids, item.entered = np.zeros((1, 5), np.int64), b"coefficients"
    return item


def with_forward(bench: Workbench) -> Item:
    item = leased(bench)
    item.left = b"coefficients"
    return item


def test_a_claim_is_asked_once_the_forward_is_done_and_not_only_when_the_gradient_is_here() -> None:
    bench = bench_of(MIDDLE)
    item = leased(bench)
    assert not list(bench.claimable())
    item.left = b"coefficients"
    assert list(bench.claimable()) == [item]
    assert bench.next_job() is None


def test_the_last_stage_asks_as_soon_as_it_knows_of_an_item_and_computes_when_the_input_is_here() -> None:
    bench = bench_of(LAST)
    item = leased(bench)
    item.entered = None
    bench.heed(bench.ask(), (0,))
    assert bench.next_job() is None
    item.entered = b"coefficients"
    job = bench.next_job()
    assert job is not None
    assert job.kind is JobKind.FINISH


def test_a_gradient_that_finds_the_claim_granted_is_folded_at_once() -> None:
    bench = bench_of(MIDDLE)
    item = with_forward(bench)
    bench.heed(bench.ask(), (0,))
    item.gradient = b"gradient"
    job = bench.next_job()
    assert job is not None
    assert (job.kind, job.item) == (JobKind.BACKWARD, item)


def test_what_was_asked_is_not_asked_again() -> None:
    bench = bench_of(MIDDLE)
    with_forward(bench)
    assert len(bench.ask().items) == 1
    assert not list(bench.claimable())


@pytest.mark.parametrize("granted", [(), (0,)])
def test_an_answer_from_before_everything_was_voided_says_nothing(granted: tuple[int, ...]) -> None:
    bench = bench_of(MIDDLE)
    item = with_forward(bench)
    before = bench.ask()
    bench.void(5)
    bench.emptied()
    bench.ask()  # asked anew, with the first answer still under way
    bench.heed(before, granted)
    assert item.claim is ClaimState.ASKED


@pytest.mark.parametrize("granted", [(), (0,)])
def test_an_answer_to_an_older_revision_says_nothing(granted: tuple[int, ...]) -> None:
    bench = bench_of(MIDDLE)
    item = with_forward(bench)
    before = bench.ask()
    leased(bench, revision=2)
    bench.ask()
    bench.heed(before, granted)
    assert item.claim is ClaimState.ASKED


def test_a_dropped_item_is_not_folded_however_early_it_was_claimed() -> None:
    bench = bench_of(MIDDLE)
    item = with_forward(bench)
    under_way = bench.ask()
    bench.drop(5, 0)
    bench.heed(under_way, (0,))
    item.gradient = b"gradient"
    assert bench.next_job() is None


def test_dropping_says_nothing_of_what_is_folded_already() -> None:
    bench = bench_of(MIDDLE)
    item = with_forward(bench)
    bench.heed(bench.ask(), (0,))
    item.is_done = True
    bench.drop(5, 0)
    assert item.claim is ClaimState.GRANTED
