"""No queue size deadlocks: every order of events of a small league is tried, and chance orders of larger ones.

The model is the league with nothing but its flow of items: S stages of R replicas with a bounded number of slots, a
trainer with a window, workers that die and forget. It runs the rules that workers run (`policies.schedule`).

    an item at a stage:  absent -> admitted -> forwarded -> done        (at the last stage: admitted -> done)
    admit     the stage before has forwarded it (it keeps the bytes), and the worker has a slot
    forward   the worker computes; what comes out is kept until the stage after has room: nobody waits while sending
    backward  the stage after is done: its gradient is taken in, always, and the slot is free when it is folded
    death     the worker forgets its items, done ones too; each goes to some replica, which starts from kept bytes

Without deaths each event moves an item forward for good, so a league that is never stuck finishes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import product
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koinon.run.policies.routes import window
from koinon.run.policies.schedule import Item, Slots, admit_backward, admit_forward, finish, pick_job


class Phase(IntEnum):
    ABSENT = 0
    ADMITTED = 1
    FORWARDED = 2
    DONE = 3


Place = tuple[Phase, int]
"""An item at one stage: how far it is, and which replica has it."""
League = tuple[tuple[Place, ...], ...]
"""places[item][stage]"""


@dataclass(frozen=True)
class Rules:
    """What is modelled. `admit_gradient`: the rule under test for gradients."""

    replicas: tuple[int, ...]
    capacity: int
    admit_gradient: Callable[[Slots, Item], Slots | None] = admit_backward

    @property
    def stages(self) -> int:
        return len(self.replicas)

    @property
    def window(self) -> int:
        return window(self.replicas, self.capacity)


@dataclass(frozen=True)
class Job:
    microbatch: int
    is_backward: bool
    step: int = 0


def moved(league: League, item: int, stage: int, place: Place) -> League:
    places = league[item]
    return (*league[:item], (*places[:stage], place, *places[stage + 1 :]), *league[item + 1 :])


def slots_of(league: League, rules: Rules, stage: int, replica: int) -> Slots:
    held = {
        Item(0, item)
        for item, places in enumerate(league)
        if places[stage][1] == replica and places[stage][0] in (Phase.ADMITTED, Phase.FORWARDED)
    }
    return Slots(rules.capacity, frozenset(held))


def successors(league: League, rules: Rules) -> Iterator[League]:
    """Every league that one event makes of this one, deaths aside."""
    yield from _admissions(league, rules)
    for stage, replicas in enumerate(rules.replicas):
        for replica in range(replicas):
            job = pick_job(_jobs(league, rules, stage, replica))
            if job is not None:
                yield _computed(league, rules, stage, replica, job)


def _admissions(league: League, rules: Rules) -> Iterator[League]:
    under_way = sum(_is_under_way(places) for places in league)
    for item, places in enumerate(league):
        for stage, (phase, replica) in enumerate(places):
            has_input = places[stage - 1][0] >= Phase.FORWARDED if stage else True
            if phase is not Phase.ABSENT or not has_input:
                continue
            if stage == 0 and not _is_under_way(places) and under_way >= rules.window:
                continue  # only the trainer waits
            if admit_forward(slots_of(league, rules, stage, replica), Item(0, item)) is not None:
                yield moved(league, item, stage, (Phase.ADMITTED, replica))


def _is_under_way(places: tuple[Place, ...]) -> bool:
    phases = {phase for phase, _ in places}
    return phases != {Phase.ABSENT} and phases != {Phase.DONE}


def _jobs(league: League, rules: Rules, stage: int, replica: int) -> Iterator[Job]:
    slots = slots_of(league, rules, stage, replica)
    for item, places in enumerate(league):
        phase, holder = places[stage]
        if holder != replica:
            continue
        if phase is Phase.ADMITTED:
            yield Job(item, is_backward=stage == rules.stages - 1)
        elif (
            phase is Phase.FORWARDED
            and places[stage + 1][0] is Phase.DONE
            and rules.admit_gradient(slots, Item(0, item))
        ):
            yield Job(item, is_backward=True)


def _computed(league: League, rules: Rules, stage: int, replica: int, job: Job) -> League:
    before = slots_of(league, rules, stage, replica)
    phase = Phase.DONE if job.is_backward else Phase.FORWARDED
    after = moved(league, job.microbatch, stage, (phase, replica))
    if job.is_backward:  # and the slot is free by the worker's own rule
        assert slots_of(after, rules, stage, replica) == finish(before, Item(0, job.microbatch))
    return after


def deaths(league: League, rules: Rules) -> Iterator[League]:
    """A worker forgets everything; each of its items goes to the next replica (with one replica: itself, restarted)."""
    for stage, replicas in enumerate(rules.replicas):
        for replica in range(replicas):
            after = league
            for item, places in enumerate(league):
                if places[stage][1] == replica and places[stage][0] is not Phase.ABSENT:
                    after = moved(after, item, stage, (Phase.ABSENT, (replica + 1) % replicas))
            if after != league:
                yield after


def starts(rules: Rules, items: int) -> Iterator[League]:
    """Every routing of the items, whatever a routing policy would choose."""
    routes = list(product(*(range(replicas) for replicas in rules.replicas)))
    for chosen in product(routes, repeat=items):
        yield tuple(tuple((Phase.ABSENT, replica) for replica in route) for route in chosen)


def is_finished(league: League) -> bool:
    return all(phase is Phase.DONE for places in league for phase, _ in places)


def stuck(rules: Rules, items: int, mortal: int = 0) -> League | None:
    """A league in which nothing can happen and something is unfinished; None if no order of events leads to one.

    `mortal`: how many deaths may happen, at any moments.
    """
    seen = {(start, mortal) for start in starts(rules, items)}
    waiting = list(seen)
    while waiting:
        league, lives = waiting.pop()
        following = {(after, lives) for after in successors(league, rules)}
        if not following and not is_finished(league):
            return league
        if lives:
            following |= {(after, lives - 1) for after in deaths(league, rules)}
        waiting.extend(following - seen)
        seen |= following
    return None


@pytest.mark.parametrize("capacity", [1, 2])
@pytest.mark.parametrize(
    ("replicas", "items"),
    [((1,), 3), ((1, 1), 4), ((1, 1, 1), 4), ((2, 1), 3), ((1, 2), 3), ((2, 2), 3), ((3, 1), 4), ((1, 1, 1, 1), 4)],
)
def test_no_order_of_events_gets_stuck(replicas: tuple[int, ...], items: int, capacity: int) -> None:
    assert stuck(Rules(replicas, capacity), items) is None


@pytest.mark.parametrize(("replicas", "items"), [((1, 1), 4), ((1, 1, 1), 3), ((2, 1), 3), ((1, 2), 3), ((2, 2, 1), 2)])
def test_no_death_at_any_moment_gets_the_others_stuck(replicas: tuple[int, ...], items: int) -> None:
    assert stuck(Rules(replicas, 1), items, mortal=2) is None


def as_another_item(slots: Slots, item: Item) -> Slots | None:
    """The rule that is not ours: a gradient needs a slot of its own."""
    return admit_forward(slots, item._replace(step=item.step + 1))


def test_the_search_finds_the_deadlock_of_gradients_that_need_room() -> None:
    """The model test can fail: without the reserved slot, a full worker refuses the gradient that would empty it."""
    assert stuck(Rules((1, 1), 1, admit_gradient=as_another_item), 2) is not None
    assert stuck(Rules((1, 1), 2, admit_gradient=as_another_item), 4) is not None


@given(
    replicas=st.lists(st.integers(1, 3), min_size=1, max_size=6),
    capacity=st.integers(1, 4),
    items=st.integers(1, 16),
    random=st.randoms(use_true_random=False),
    mortal=st.integers(0, 5),
)
def test_larger_leagues_finish_in_chance_orders(
    replicas: list[int], capacity: int, items: int, random: Random, mortal: int
) -> None:
    rules = Rules(tuple(replicas), capacity)
    league: League = tuple(tuple((Phase.ABSENT, random.randrange(count)) for count in replicas) for _ in range(items))
    at_most = 3 * items * len(replicas)  # events of a league without deaths, and again after each
    for _ in range(at_most * (mortal + 1)):
        following = list(successors(league, rules))
        if not following:
            break
        league = random.choice(following)
        if mortal and random.random() < 0.05 and (dead := list(deaths(league, rules))):
            league, mortal = random.choice(dead), mortal - 1
    assert is_finished(league)


@given(replicas=st.lists(st.integers(1, 4), min_size=1, max_size=5), capacity=st.integers(1, 4))
def test_the_window_never_promises_more_than_a_stage_can_hold(replicas: list[int], capacity: int) -> None:
    rules = Rules(tuple(replicas), capacity)
    assert all(rules.window <= capacity * count for count in replicas)
    assert replace(rules, capacity=capacity + 1).window >= rules.window
