"""What does the league cost? Tokens per CPU-second of a whole process tree, against one plain process.

    python -m bench.throughput [--quick] [--size 1M|10M|all] [--repeats 3]

The league (4 stages, one worker each, and its control process) takes turns with one plain PyTorch process of one thread
and with torch.distributed.pipelining (4 processes, 1F1B, gloo): same text, same global batch of 4096 tokens in
microbatches of 512, about equally many parameters, one torch thread per process, the same Muon and AdamW updates. The
plain model is the dense one that the league's is cut from. Measured from a moment after warm-up to the same moment some
steps later, with everything that belongs to the tree: control process, zygote, event loops, snapshots, hashes, log.

league_SIZE          tokens per CPU-second, league over plain: median of the ratios of single turns
against_pipeline_*   the same against torch.distributed.pipelining
recomputed_*         FLOPs that the league computed a second time, per useful FLOP
pipeline_SIZE        torch.distributed.pipelining over plain, for orientation; so are
adamw_SIZE           plain with torch's fused AdamW on all tensors instead, over plain (full runs only)
form_SIZE            plain with the league's own model, narrow boundaries and codec, over plain (full runs only)
wall_SIZE            tokens per second, league over plain: depends on the cores, so it has no target
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from bench.harness import Figure, median, progress, ratios, result, spread
from bench.peers.work import SIZES, Outcome, Work

TARGETS = {"1M": 0.80, "10M": 0.93}
QUICK = (2, 5)
"""Steps of warm-up, and steps that are measured."""
FULL = {"1M": (4, 24), "10M": (2, 6)}
LONGEST = 900
"""Seconds that one peer may take; more is a fault, not a slow machine."""

Turns = dict[str, list[Outcome]]


def contenders(work: Work, quick: bool) -> dict[str, Callable[[], Outcome]]:
    """By name, in the order of a turn."""
    runs = {
        "league": lambda: trained("league", work),
        "plain": lambda: trained("plain", work),
        "pipeline": lambda: trained("torch_pipeline", work),
    }
    if not quick:
        runs["adamw"] = lambda: trained("plain", replace(work, updates="adamw"))
        runs["form"] = lambda: trained("plain", replace(work, form="stream"))
    return runs


def trained(peer: str, work: Work) -> Outcome:
    """One run of a peer in a fresh process."""
    command = [sys.executable, "-m", f"bench.peers.{peer}", json.dumps(asdict(work))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        cwd=Path(__file__).parent.parent,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=LONGEST,
    )
    return Outcome(**json.loads(done.stdout.splitlines()[-1]))


def taken(work: Work, repeats: int, quick: bool) -> Turns:
    """Turn by turn, so that a machine that slows down slows all of them alike."""
    runs = contenders(work, quick)
    turns: Turns = {name: [] for name in runs}
    for turn in range(repeats):
        for name, run in runs.items():
            turns[name].append(run())
            last = turns[name][-1]
            progress(
                f"{work.size} turn {turn + 1} of {repeats}: {name} {last.per_cpu_second:.0f} tokens per CPU-second, "
                f"{last.per_second:.0f} per second, loss {last.loss:.4f}"
            )
    return turns


def figures(size: str, turns: Turns) -> Iterator[Figure]:
    """What the turns at one size come to."""
    per_cpu = {name: [one.per_cpu_second for one in outcomes] for name, outcomes in turns.items()}
    league, pipeline = ratios(per_cpu["league"], per_cpu["plain"]), ratios(per_cpu["league"], per_cpu["pipeline"])
    yield Figure(f"league_{size}", median(league), at_least=TARGETS[size])
    yield Figure(f"league_{size}_spread", spread(league))
    yield Figure(f"against_pipeline_{size}", median(pipeline), at_least=1.0)
    yield Figure(f"against_pipeline_{size}_spread", spread(pipeline))
    yield Figure(f"recomputed_{size}", max(one.recomputed for one in turns["league"]), at_most=0.0)
    for name in turns.keys() - {"league", "plain"}:
        yield Figure(f"{name}_{size}", median(ratios(per_cpu[name], per_cpu["plain"])))
    yield Figure(f"wall_{size}", median(ratios(*([one.per_second for one in turns[n]] for n in ("league", "plain")))))
    yield Figure(f"tokens_per_cpu_second_{size}", {name: round(median(found)) for name, found in per_cpu.items()})
    yield Figure(f"parameters_{size}", turns["plain"][0].parameters)


def measured(sizes: Sequence[str], repeats: int, quick: bool) -> Iterator[Figure]:
    for size in sizes:
        warmup, steps = QUICK if quick else FULL[size]
        work = Work(size=size, warmup=warmup, steps=steps)
        yield from figures(size, taken(work, repeats, quick))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.throughput")
    parser.add_argument("--quick", action="store_true", help="the small size, end within a minute on two cores")
    parser.add_argument("--size", choices=[*SIZES, "all"], help="by default all, or 1M when quick")
    parser.add_argument("--repeats", type=int, help="by default 3, or 1 when quick")
    chosen = parser.parse_args()
    size = chosen.size or ("1M" if chosen.quick else "all")
    repeats = chosen.repeats or (1 if chosen.quick else 3)
    found = list(measured(list(SIZES) if size == "all" else [size], repeats, chosen.quick))
    print(json.dumps(result("throughput", found)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
