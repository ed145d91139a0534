"""Which workers a microbatch visits, one per stage, and how many microbatches are under way at once.

A snapshot of measured loads in, a decision out; the same snapshot gives the same decision everywhere.
Knows nothing of leases, transport or time beyond the measured seconds it is given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from math import ceil

from koinon.units import PeerId

PARTNERS = 4
"""Neighbours that a worker keeps on each side: every pair costs connections, and shows two nodes to each other."""
DIAL = 0.05
"""Seconds that a pair must save to be worth a new connection; a handshake over 50 ms takes 0.06-0.08 s (measured)."""

Cost = tuple[int, float, int]
"""Compared in this order: pairs beyond a partner limit, expected seconds, a drawn number that spreads ties."""


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """A worker as routing sees it.

    `queued`: items it was leased and has not finished. `seconds_per_item`: measured, forward and backward.
    `crossing`: seconds that one item takes to come over from a worker of the stage before, where measured.
    `before`, `after`: the workers of the neighbouring stages that it is connected with.
    """

    worker: PeerId
    queued: int = 0
    seconds_per_item: float = 0.0
    crossing: Mapping[PeerId, float] = field(default_factory=dict)
    before: Set[PeerId] = frozenset()
    after: Set[PeerId] = frozenset()

    @property
    def finish(self) -> float:
        """Seconds until one more item would be finished here."""
        return (self.queued + 1) * self.seconds_per_item


@dataclass(frozen=True, slots=True)
class _Path:
    cost: Cost
    workers: tuple[WorkerLoad, ...]


def pick_route(step: int, microbatch: int, stages: Sequence[Sequence[WorkerLoad]]) -> tuple[PeerId, ...]:
    """The route with the earliest expected finish: queues, speeds and crossings summed over its stages.

    The best of all routes, by dynamic programming (workers squared per boundary). A worker that has PARTNERS on a
    side gets no new one there unless there is no other route. Equal routes are spread by a hash of the item, so
    that trainers with the same snapshot agree and idle workers share evenly. Raises ValueError if a stage is empty.
    """
    if not stages or not all(stages):
        raise ValueError("a route needs a worker in every stage")
    paths = [_Path(_cost_of(load, step, microbatch), (load,)) for load in stages[0]]
    for stage in stages[1:]:
        paths = [
            min((_extended(path, load, _cost_of(load, step, microbatch)) for path in paths), key=lambda p: p.cost)
            for load in stage
        ]
    return tuple(load.worker for load in min(paths, key=lambda path: path.cost).workers)


def replacement(stage: Sequence[WorkerLoad], excluding: Set[PeerId]) -> PeerId | None:
    """The worker of this stage that would finish one more item first; None if all are excluded."""
    able = [load for load in stage if load.worker not in excluding]
    return min(able, key=lambda load: (load.finish, load.queued, load.worker)).worker if able else None


def window(replicas: Sequence[int], in_flight: int, *, crossing: float = 0.0) -> int:
    """How many microbatches to have under way, so that every worker has work and none more than it can hold.

    replicas: workers per stage. in_flight: items that one worker can hold. crossing: seconds of one crossing per
    second of one item's compute at a stage. An item is computed S times and crosses 2 (S - 1) times on its way down and
    up, so by Little's law it takes one per worker, and more by the share of time spent on links: the depth of 1F1B
    (arXiv:2104.04473) per pipeline where links cost nothing. At least 1. Raises ValueError if a stage is empty.
    """
    if not replicas or min(replicas) < 1 or in_flight < 1:
        raise ValueError(f"no microbatch can be under way with {list(replicas)} workers holding {in_flight} items each")
    stages = len(replicas)
    wanted = ceil(sum(replicas) * (1 + crossing * 2 * (stages - 1) / stages))
    return min(wanted, in_flight * min(replicas))


def started(replicas: Sequence[int], in_flight: int, *, crossing: float = 0.0) -> int:
    """How many microbatches to have begun: one more for each pipeline than computes, so that a worker whose item is on
    its way has another. Memory for graphs follows from it. Arguments and errors as of `window`."""
    return min(window(replicas, in_flight, crossing=crossing) + min(replicas), in_flight * min(replicas))


def _extended(path: _Path, load: WorkerLoad, here: Cost) -> _Path:
    last = path.workers[-1]
    are_partners = last.worker in load.before or load.worker in last.after
    beyond = not are_partners and (len(last.after) >= PARTNERS or len(load.before) >= PARTNERS)
    link = load.crossing.get(last.worker, 0.0) + (0.0 if are_partners else DIAL)
    cost = (path.cost[0] + beyond + here[0], path.cost[1] + link + here[1], path.cost[2] + here[2])
    return _Path(cost, (*path.workers, load))


def _cost_of(load: WorkerLoad, step: int, microbatch: int) -> Cost:
    drawn = hashlib.sha256(f"{step}:{microbatch}:{load.worker}".encode()).digest()
    return 0, load.finish, int.from_bytes(drawn[:8], "big")
