"""What do internet links cost a league? Tokens per second over 80 Mbit/s and 50 ms, against near links.

    python -m bench.straw [--quick]

Four stages of one worker each and a control process, every one on a host of its own: a network namespace behind an
access link of `bench.wan`. The same processes go on training while their links change under them, in turns: near (no
delay, no loss, any rate), straw (80 Mbit/s up and down, 50 ms between any two), lossy (the same, and 1% of packets lost
each way). A step after each change is not measured. So that five machines fit on two cores, each worker has a core of
its own that is SLOWER times slower than this machine's: see `bench.peers.hosted`. A turn in which the network was late
or a worker's core was not there is repeated.

straw_80mbit       tokens per second, straw over near: median of the ratios of single turns
straw_80mbit_1pct  the same, lossy over near
bytes_per_token    per boundary and direction: frames as handed to the socket; and what hosts put on the wire for them,
                   QUIC, IP, acknowledgements and (downwards) the token ids included
dense_*            the same league uncompressed, for contrast: dense form, fp32 (full runs only)
link_carries       tokens per second that 80 Mbit/s would carry at these bytes
twin               true where no namespaces can be made: then nodes, frames and arithmetic are real, in one process, and
                   links and compute take time on a virtual clock. It has no packets: a lost one is a letter that comes
                   250 ms late
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from bench.harness import Figure, main, median, progress, ratios, spread
from bench.hosted import Hosted, Step, hosted
from bench.twin import twin_turns
from bench.wan import Stats, Wan, why_not
from koinon.run.spec import RunSpec

LINKS: Final[dict[str, dict[str, str | float]]] = {
    "near": {"rate": "unlimited", "rtt": 0, "loss": 0},
    "straw": {"rate": "80mbit", "rtt": "50ms", "loss": 0},
    "lossy": {"rate": "80mbit", "rtt": "50ms", "loss": "1%"},
}
RATE: Final = 80e6
STAGES: Final = 4
SLOWER: Final = 10.0
"""An item then takes a stage about as long as one of an 8B model takes a single GPU: some 150 ms."""
DISTURBED: Final = 0.01
"""Share of late packets, or of time that a worker's core was not there, from which a turn is repeated."""


@dataclass(frozen=True, slots=True)
class Plan:
    """repeats: turns of all three links. steps: measured per turn. batch: sequences per step, two to an item.
    tries: how often a turn is measured at most."""

    repeats: int
    steps: int
    batch: int
    dense_repeats: int
    tries: int

    def spec(self, form: Literal["stream", "dense"]) -> RunSpec:
        codec = {"stream": "int8", "dense": "fp32"}[form]
        return RunSpec.of(
            name=f"straw-{form}",
            seed=1,
            model={"stages": STAGES, "size": 128, "layers": 4, "table": 512, "form": form, "codec": codec},
            train={"steps": 10_000, "batch": self.batch, "microbatch": 2, "eval_every": 0, "snapshot_every": 100},
            league={"replicas": 1},
        )


QUICK: Final = Plan(repeats=1, steps=1, batch=64, dense_repeats=0, tries=1)
FULL: Final = Plan(repeats=5, steps=2, batch=80, dense_repeats=2, tries=3)


@dataclass(frozen=True, slots=True)
class Turn:
    """Some steps over one kind of links."""

    per_second: float
    """Tokens."""
    down: float = 0.0
    """Bytes per token on the wire, from a stage to the next, mean of all boundaries."""
    up: float = 0.0
    frames: float = 0.0
    """Bytes per token, boundary and direction, as handed to the socket."""
    late: float = 0.0
    """Share of packets."""
    absent: float = 0.0
    """Share of time that workers' cores were not there."""

    @property
    def is_disturbed(self) -> bool:
        return max(self.late, self.absent) > DISTURBED


Turns = dict[str, list[Turn]]


@dataclass(slots=True)
class Track:
    """A league at work, and where its links can be changed."""

    wan: Wan
    league: Hosted
    spec: RunSpec
    last: Step
    links: str = "near"
    discarded: int = 0

    def turn(self, links: str, steps: int, tries: int) -> Turn:
        """Change the links, let a step pass, measure; anew while this machine was too busy to be five."""
        if links != self.links:
            self.wan.set(**LINKS[links])
            self.links, self.last = links, self.league.next_step()
        for left in reversed(range(tries)):
            began = self.last
            before, absent = self.wan.stats(), self.league.overrun()
            for _ in range(steps):
                self.last = self.league.next_step()
            found = self._turn(began, self.last, self.wan.stats() - before, self.league.overrun() - absent)
            progress(
                f"{links}: {found.per_second:.0f} tokens per second, late {found.late:.2%}, absent {found.absent:.2%}"
            )
            if not found.is_disturbed:
                break
            self.discarded += left > 0
        return found

    def _turn(self, began: Step, ended: Step, carried: Stats, absent: float) -> Turn:
        wall = ended.at - began.at
        tokens = (ended.step - began.step) * self.spec.step_tokens
        boundaries = range(1, STAGES)
        down = sum(carried.nbytes.get((host, host + 1), 0) for host in boundaries)
        up = sum(carried.nbytes.get((host + 1, host), 0) for host in boundaries)
        crossed = ended.boundary_tokens - began.boundary_tokens
        return Turn(
            per_second=tokens / wall,
            down=down / tokens / len(boundaries),
            up=up / tokens / len(boundaries),
            frames=(ended.boundary_bytes - began.boundary_bytes) / max(1, crossed),
            late=carried.late_share,
            absent=absent / (STAGES * wall),
        )


def taken(wan: Wan, spec: RunSpec, repeats: int, steps: int, tries: int) -> tuple[Turns, int]:
    """All turns of one league, and how many were discarded."""
    turns: Turns = {links: [] for links in LINKS}
    wan.set(**LINKS["near"])
    with hosted(wan, spec, slower=SLOWER) as league:
        track = Track(wan, league, spec, league.next_step())  # the first step founds, and is not measured
        for turn in range(repeats):
            progress(f"{spec.name}: turn {turn + 1} of {repeats}")
            for links, found in turns.items():
                found.append(track.turn(links, steps, tries))
    return turns, track.discarded


def speeds(turns: Mapping[str, list[Turn]]) -> dict[str, list[float]]:
    return {links: [turn.per_second for turn in found] for links, found in turns.items()}


def compared(per_second: Mapping[str, list[float]], prefix: str, *, targets: bool) -> Iterator[Figure]:
    """The two ratios and what they were made of."""
    for links, name, target in ("straw", "80mbit", 0.95), ("lossy", "80mbit_1pct", 0.85):
        found = ratios(per_second[links], per_second["near"])
        yield Figure(f"{prefix}_{name}", median(found), at_least=target if targets else None)
        yield Figure(f"{prefix}_{name}_spread", spread(found))
    medians = {links: round(median(found), 1) for links, found in per_second.items()}
    yield Figure(f"{prefix}_tokens_per_second", medians)


def weighed(turns: Turns, prefix: str) -> Iterator[Figure]:
    """Bytes per token, boundary and direction."""
    straw = turns["straw"]
    frames, down, up = (median([get(turn) for turn in straw]) for get in _WEIGHTS)
    weights = {"frames": frames, "wire_down": down, "wire_up": up}
    yield Figure(f"{prefix}_bytes_per_token", {name: round(value, 2) for name, value in weights.items()})
    yield Figure(f"{prefix}_link_carries", round(RATE / 8 / max(down, up)))


_WEIGHTS: Final[tuple[Callable[[Turn], float], ...]] = (lambda t: t.frames, lambda t: t.down, lambda t: t.up)


def over_wan(plan: Plan) -> Iterator[Figure]:
    with Wan(hosts=STAGES + 1, seed=1) as wan:
        spec = plan.spec("stream")
        turns, discarded = taken(wan, spec, plan.repeats, plan.steps, plan.tries)
        yield from compared(speeds(turns), "straw", targets=True)
        yield from weighed(turns, "straw")
        yield Figure("step_seconds", round(spec.step_tokens / median(speeds(turns)["near"]), 2))
        if plan.dense_repeats:
            dense, more = taken(wan, plan.spec("dense"), plan.dense_repeats, 1, plan.tries)
            yield from compared(speeds(dense), "dense", targets=False)
            yield from weighed(dense, "dense")
            discarded += more
        every = [turn for found in turns.values() for turn in found]
        yield Figure("late_share", round(max(turn.late for turn in every), 5))
        yield Figure("absent_share", round(max(turn.absent for turn in every), 5))
        yield Figure("discarded_turns", discarded)
        yield Figure("disturbed_turns", sum(turn.is_disturbed for turn in every))


def over_twin(plan: Plan) -> Iterator[Figure]:
    per_second = twin_turns(plan.spec("stream"), plan.repeats, plan.steps, slower=SLOWER)
    yield from compared(per_second, "straw", targets=True)


def measure(quick: bool) -> Iterator[Figure]:
    plan, reason = QUICK if quick else FULL, why_not()
    if reason is not None:
        progress(f"{reason} So this is the in-memory twin on a virtual clock.")
    yield Figure("twin", reason is not None)
    yield Figure("reference", "the same processes on the same hosts, without delay and loss, at any rate")
    yield from over_twin(plan) if reason is not None else over_wan(plan)


if __name__ == "__main__":
    sys.exit(main("straw", measure))
