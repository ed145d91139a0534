"""Routes, windows, draws, deadlines and the order of work: what holds for every snapshot."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise, permutations, product
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koinon.run.policies.deadlines import KEPT, History, deadline, missed, observe
from koinon.run.policies.draws import StageLoad, draw, shuffled, stage_for_joiner
from koinon.run.policies.routes import DIAL, PARTNERS, WorkerLoad, pick_route, replacement, window
from koinon.run.policies.schedule import Item, Slots, admit_backward, admit_forward, finish, pick_job
from koinon.units import PeerId, Seconds

seeds = st.binary(max_size=40)
durations = st.floats(0, 1000, allow_nan=False)


def peer(stage: int, replica: int) -> PeerId:
    return PeerId(f"{stage}.{replica}")


def loads_of(*queues: list[int], seconds: float = 1.0) -> list[list[WorkerLoad]]:
    return [
        [WorkerLoad(peer(s, r), queued=q, seconds_per_item=seconds) for r, q in enumerate(stage)]
        for s, stage in enumerate(queues)
    ]


# --- routes


@st.composite
def leagues(draw: st.DrawFn) -> list[list[WorkerLoad]]:
    """Up to 4 stages of up to 3 workers with any loads, links and connections."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    quarters = st.integers(0, 40).map(lambda n: n / 4)  # exact in binary: sums do not depend on their order
    stages = []
    for s, size in enumerate(sizes):
        before = [peer(s - 1, r) for r in range(sizes[s - 1])] if s else []
        stages.append(
            [
                WorkerLoad(
                    peer(s, r),
                    queued=draw(st.integers(0, 5)),
                    seconds_per_item=draw(quarters),
                    crossing={b: draw(quarters) for b in before},
                    before=draw(st.sets(st.sampled_from(before))) if before else frozenset(),
                )
                for r in range(size)
            ]
        )
    return stages


def expected_finish(route: tuple[WorkerLoad, ...]) -> float:
    seconds = sum(load.finish for load in route)
    for left, right in pairwise(route):
        known = left.worker in right.before or right.worker in left.after
        seconds += right.crossing.get(left.worker, 0.0) + (0.0 if known else DIAL)
    return seconds


@given(leagues(), st.integers(0, 99), st.integers(0, 99))
def test_no_route_finishes_earlier_than_the_one_picked(stages: list[list[WorkerLoad]], step: int, number: int) -> None:
    picked = pick_route(step, number, stages)
    by_name = {load.worker: load for stage in stages for load in stage}
    found = expected_finish(tuple(by_name[worker] for worker in picked))
    assert [worker.split(".")[0] for worker in picked] == [str(s) for s in range(len(stages))]
    assert found == pytest.approx(min(map(expected_finish, product(*stages))), abs=1e-9)


@given(leagues(), st.randoms(use_true_random=False))
def test_a_route_does_not_depend_on_the_order_of_workers(stages: list[list[WorkerLoad]], random: object) -> None:
    turned = [list(reversed(stage)) for stage in stages]
    assert pick_route(3, 5, stages) == pick_route(3, 5, turned)


def test_items_leased_one_by_one_spread_evenly_over_equal_workers() -> None:
    stages = loads_of([0] * 3, [0] * 3, [0] * 2)
    for microbatch in range(36):
        route = pick_route(0, microbatch, stages)
        stages = [[replace(w, queued=w.queued + (w.worker in route)) for w in stage] for stage in stages]
    assert [[w.queued for w in stage] for stage in stages] == [[12] * 3, [12] * 3, [18] * 2]


def test_ties_are_spread_even_without_any_news_of_queues() -> None:
    stages = loads_of([0, 0], [0, 0])
    routes = Counter(pick_route(step, microbatch, stages) for step in range(10) for microbatch in range(40))
    assert len(routes) == 4
    assert min(routes.values()) > 60  # of 400; 100 expected


def test_a_worker_twice_as_fast_gets_twice_the_work() -> None:
    fast, slow = WorkerLoad(PeerId("fast"), 0, 1.0), WorkerLoad(PeerId("slow"), 0, 2.0)
    for microbatch in range(30):
        (worker,) = pick_route(0, microbatch, [[fast, slow]])
        fast = replace(fast, queued=fast.queued + (worker == "fast"))
        slow = replace(slow, queued=slow.queued + (worker == "slow"))
    assert (fast.queued, slow.queued) == (20, 10)


def test_workers_keep_to_their_partners_where_it_costs_little() -> None:
    stages = loads_of([0, 0], [0, 0], seconds=DIAL / 2)
    stages[1] = [
        replace(stages[1][0], before=frozenset({peer(0, 0)})),
        replace(stages[1][1], before=frozenset({peer(0, 1)})),
    ]
    routes = {pick_route(0, microbatch, stages) for microbatch in range(50)}
    assert routes == {(peer(0, 0), peer(1, 0)), (peer(0, 1), peer(1, 1))}
    stages[1][0] = replace(stages[1][0], queued=50)
    assert {pick_route(0, m, stages)[1] for m in range(50)} == {peer(1, 1)}


def test_no_worker_has_more_than_its_partners_when_a_league_grows() -> None:
    """12 workers a stage, each pair that is routed becomes a connection."""
    stages = loads_of([0] * 12, [0] * 12, [0] * 12)
    after: dict[PeerId, set[PeerId]] = {w.worker: set() for stage in stages for w in stage}
    before: dict[PeerId, set[PeerId]] = {w.worker: set() for stage in stages for w in stage}
    for microbatch in range(600):
        route = pick_route(0, microbatch, stages)
        for left, right in pairwise(route):
            after[left].add(right)
            before[right].add(left)
        stages = [
            [
                replace(w, queued=w.queued + (w.worker in route), before=before[w.worker], after=after[w.worker])
                for w in stage
            ]
            for stage in stages
        ]
    assert max(map(len, after.values())) <= PARTNERS
    assert max(map(len, before.values())) <= PARTNERS
    queues = [w.queued for stage in stages for w in stage]
    assert max(queues) - min(queues) <= 10  # of 50 each: the limit does not starve anybody


def test_beyond_the_partner_limit_there_is_still_a_route() -> None:
    stages = loads_of([0], [0])
    stages[0] = [replace(stages[0][0], after=frozenset(map(PeerId, "abcd")))]
    assert pick_route(0, 0, stages) == (peer(0, 0), peer(1, 0))


def test_an_empty_stage_has_no_route() -> None:
    for stages in ([], [[]], loads_of([0], [])):
        with pytest.raises(ValueError, match="every stage"):
            pick_route(0, 0, stages)


@given(leagues(), st.sets(st.integers(0, 2)))
def test_a_replacement_is_the_first_to_finish_of_those_not_excluded(
    stages: list[list[WorkerLoad]], gone: set[int]
) -> None:
    stage, excluding = stages[0], {peer(0, r) for r in gone}
    able = [load for load in stage if load.worker not in excluding]
    chosen = replacement(stage, excluding)
    assert (chosen is None) == (not able)
    if able:
        assert next(load.finish for load in able if load.worker == chosen) == min(load.finish for load in able)


# --- the window


@given(st.lists(st.integers(1, 20), min_size=1, max_size=10), st.integers(1, 20), st.floats(0, 10))
def test_a_window_keeps_every_worker_busy_and_overfills_none(replicas: list[int], held: int, crossing: float) -> None:
    size = window(replicas, held, crossing=crossing)
    assert 1 <= size <= held * min(replicas)
    assert size >= min(sum(replicas), held * min(replicas))
    assert size <= window(replicas, held, crossing=crossing + 1)
    assert size <= window([r + 1 for r in replicas], held, crossing=crossing)


def test_without_links_a_window_is_the_depth_of_1f1b_per_pipeline() -> None:
    assert window([1] * 4, 100) == 4
    assert window([2] * 4, 100) == 8
    assert window([2] * 4, 3) == 6
    assert window([1] * 4, 100, crossing=1.0) == 10  # 4 computes and 6 crossings, each as long


def test_a_stage_without_workers_has_no_window() -> None:
    for replicas, held in (([], 1), ([1, 0], 1), ([1], 0)):
        with pytest.raises(ValueError, match="under way"):
            window(replicas, held)


# --- draws


@given(seeds, st.integers(1, 2**64), st.integers(0, 100))
def test_a_draw_is_repeatable_and_in_range(seed: bytes, n: int, counter: int) -> None:
    assert 0 <= draw(seed, n, counter) < n
    assert draw(seed, n, counter) == draw(seed, n, counter)


def test_draws_are_the_same_on_every_machine() -> None:
    """Figures that another implementation must reproduce."""
    assert [draw(b"koinon", 1000, counter) for counter in range(4)] == [871, 756, 851, 299]
    assert shuffled(b"koinon", range(6)) == (5, 2, 4, 3, 0, 1)


def test_every_number_is_drawn_equally_often() -> None:
    seen = Counter(draw(b"fair", 7, counter) for counter in range(7000))
    assert set(seen) == set(range(7))
    assert all(abs(count - 1000) < 120 for count in seen.values())  # 4 standard deviations


@given(seeds, st.lists(st.integers(), max_size=30))
def test_shuffling_loses_and_adds_nothing(seed: bytes, items: list[int]) -> None:
    assert sorted(shuffled(seed, items)) == sorted(items)


def test_every_order_is_drawn() -> None:
    orders = Counter(shuffled(bytes([a, b]), "abcd") for a in range(16) for b in range(256))
    assert set(orders) == set(permutations("abcd"))
    assert all(abs(count - 4096 / 24) < 65 for count in orders.values())


@given(st.lists(st.floats(0.1, 9), min_size=1, max_size=12), seeds)
def test_a_joiner_sits_in_one_of_the_three_neediest_stages(capacities: list[float], seed: bytes) -> None:
    stages = [StageLoad(index, capacity) for index, capacity in enumerate(capacities)]
    chosen = capacities[stage_for_joiner(stages, seed)]
    assert sum(capacity < chosen for capacity in capacities) < 3


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=9), seeds)
def test_an_empty_stage_comes_first(capacities: list[float], seed: bytes) -> None:
    stages = [StageLoad(index, capacity) for index, capacity in enumerate(capacities)]
    if 0.0 in capacities:
        assert capacities[stage_for_joiner(stages, seed)] == 0.0


@given(st.lists(st.floats(0, 9), min_size=1, max_size=12), seeds, seeds)
def test_the_draw_follows_the_indices_given(capacities: list[float], seed: bytes, other: bytes) -> None:
    stages = [StageLoad(10 + index, capacity) for index, capacity in enumerate(capacities)]
    assert stage_for_joiner(stages, seed) in {stage.index for stage in stages}
    assert stage_for_joiner(stages, seed) == stage_for_joiner(stages, seed)


def test_nobody_can_count_on_a_stage() -> None:
    """All three neediest come up equally often, and of equal ones every stage does."""
    stages = [StageLoad(0, 5), StageLoad(1, 1), StageLoad(2, 3), StageLoad(3, 2), StageLoad(4, 9)]
    drawn = Counter(stage_for_joiner(stages, n.to_bytes(2, "big")) for n in range(3000))
    assert set(drawn) == {1, 2, 3}
    assert all(abs(count - 1000) < 110 for count in drawn.values())
    level = [StageLoad(index, 1) for index in range(8)]
    assert {stage_for_joiner(level, n.to_bytes(2, "big")) for n in range(200)} == set(range(8))


def test_nothing_can_be_drawn_from_nothing() -> None:
    with pytest.raises(ValueError, match="0 choices"):
        stage_for_joiner([], b"")


# --- deadlines


def history_of(seconds: list[float]) -> History:
    history = History()
    for took in seconds:
        history = observe(history, Seconds(took))
    return history


@given(st.lists(durations, max_size=100), st.floats(0.01, 10))
def test_a_deadline_is_never_below_the_floor_nor_the_median(seconds: list[float], floor: float) -> None:
    allowed = deadline(history_of(seconds), floor=Seconds(floor)).value
    assert allowed >= floor
    if seconds:
        assert allowed >= median(seconds[-KEPT:])


@given(st.lists(durations, max_size=200))
def test_a_history_is_bounded(seconds: list[float]) -> None:
    assert history_of(seconds).seconds == tuple(seconds[-KEPT:])


def test_before_anything_was_seen_the_floor_holds() -> None:
    assert deadline(History(), floor=Seconds(3)) == Seconds(3)


def test_one_stall_does_not_lengthen_the_next_deadline() -> None:
    steady = history_of([1.0, 1.1, 0.9] * 10)
    stalled = observe(steady, Seconds(600))
    assert deadline(stalled).value < 1.2 * max(deadline(steady).value, 2.0)


def test_a_missed_deadline_makes_the_next_longer_and_an_answer_ends_that() -> None:
    history = history_of([1.0] * 10)
    before = deadline(history, floor=Seconds(2))
    again = missed(missed(history))
    assert deadline(again, floor=Seconds(2)).value == 4 * before.value
    assert deadline(observe(again, Seconds(1.0)), floor=Seconds(2)) == before


def test_a_peer_that_became_ten_times_slower_is_soon_waited_for_again() -> None:
    history, misses = history_of([1.0, 1.1, 0.9] * 20), 0
    for _ in range(200):
        if deadline(history).value < 10.0:
            history, misses = missed(history), misses + 1
        else:
            history = observe(history, Seconds(10.0))
    assert misses <= 4
    assert deadline(history).value >= 10.0


def test_patience_has_an_end() -> None:
    history = History()
    for _ in range(100):
        history = missed(history)
    assert deadline(history, floor=Seconds(1)).value <= 100


# --- the order of work


@dataclass(frozen=True)
class Work:
    step: int
    microbatch: int
    is_backward: bool


work = st.builds(Work, st.integers(0, 3), st.integers(0, 3), st.booleans())


@given(st.lists(work, max_size=10))
def test_backward_comes_before_forward_then_the_older_step_then_the_lower_number(queue: list[Work]) -> None:
    job = pick_job(queue)
    assert (job is None) == (not queue)
    if job is not None:
        same = [other for other in queue if other.is_backward == job.is_backward]
        assert job.is_backward or not any(other.is_backward for other in queue)
        assert (job.step, job.microbatch) == min((other.step, other.microbatch) for other in same)


@given(st.integers(1, 4), st.lists(st.tuples(st.sampled_from("fbd"), st.integers(0, 6)), max_size=40))
def test_forwards_never_overfill_and_backwards_are_never_refused(capacity: int, script: list[tuple[str, int]]) -> None:
    slots = Slots(capacity)
    for action, number in script:
        item, held = Item(0, number), slots.held
        match action:
            case "f":
                admitted = admit_forward(slots, item)
                assert (admitted is None) == (item not in held and len(held) >= capacity)
                slots = admitted or slots
            case "b":
                slots = admit_backward(slots, item)
                assert slots.held == held | {item}
            case _:
                slots = finish(slots, item)
                assert slots.held == held - {item}
        assert slots.free == max(0, capacity - len(slots.held))


def test_a_forward_admitted_means_its_backward_adds_nothing() -> None:
    full = admit_forward(Slots(1), Item(0, 0))
    assert full is not None
    assert admit_backward(full, Item(0, 0)) == full
    assert admit_forward(full, Item(0, 0)) == full
    assert admit_forward(full, Item(0, 1)) is None
    assert finish(full, Item(0, 0)) == Slots(1)


def test_a_worker_that_holds_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="0 items"):
        Slots(0)
