"""What does it cost to send 64 times fewer bytes across a boundary?

ratio: bytes per token, boundary and direction of the uncompressed fp32 stream over the candidate's, scales included.
ratio_in_frames: the same over all that crosses, headers and token ids included, as a league's processes hand it to the
socket (for the candidate; the uncompressed side is its bare 4 d bytes).
gap_<corpus>_<tokens>: (candidate's held-out loss / its uncompressed twin's) - 1, the mean over seeds; the twin has the
same local tables, as many trained parameters and the same tokens in the same order, and its own tuned rates.
seeds: how many seeds the thinnest of those means has.

    python -m bench.compression               finished rows are used, what is missing is measured (CPU hours for all)
    python -m bench.compression --minutes 30  the same, but begins nothing new after that time
    python -m bench.compression --no-resume   measures everything anew, behind the rows that are there
    python -m bench.compression --report      measures nothing
    python -m bench.compression --quick       one point, within a minute; writes nothing

Rows: bench/results/compression.jsonl, one per variant, corpus, seed and horizon. Picture: docs/images/compression.svg.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.compression_sweep import plan
from bench.compression_sweep.corpora import CORPORA, open_corpus
from bench.compression_sweep.crossing import bytes_crossed
from bench.compression_sweep.page import picture, text
from bench.compression_sweep.plan import Job, bytes_of
from bench.compression_sweep.rows import Row, Rows, gaps
from bench.compression_sweep.training import Training
from bench.compression_sweep.wires import WIRES
from bench.harness import Figure, environment, progress, result
from koinon.model.layout import trained_count

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "compression.jsonl"
PICTURE = HERE.parent / "docs" / "images" / "compression.svg"


def measured(job: Job) -> Iterator[Row]:
    """The rows of one training, as its horizons are reached."""
    variant, config = job.variant, job.variant.model
    tokens = plan.BATCH * config.context
    wire = WIRES[variant.wire] if variant.wire else None
    training = Training(config, variant.muon_lr, variant.adamw_lr, open_corpus(job.corpus), job.seed, wire, plan.BATCH)
    for end in training.ends(job.horizons):
        yield Row(
            variant=variant.name,
            digest=variant.digest(plan.BATCH),
            corpus=job.corpus,
            seed=job.seed,
            steps=end.steps,
            tokens=end.steps * tokens,
            loss=round(end.loss, 5),
            bytes=bytes_of(variant, tokens),
            parameters=trained_count(config),
            muon_lr=variant.muon_lr,
            adamw_lr=variant.adamw_lr,
            model=plan.shown(config),
            cpu_seconds=round(end.cpu, 1),
            commit=_commit(),
            cpu=environment()["cpu"],
        )


def sweep(rows: Rows, *, resume: bool, minutes: float) -> None:
    """Measure what the plan wants, row by row into the file."""
    until = time.monotonic() + 60 * minutes
    for job in plan.jobs():
        wanted = list(job.horizons)
        if resume:
            wanted = rows.missing(job.variant.digest(plan.BATCH), job.corpus, job.seed, wanted)
        if not wanted:
            continue
        if time.monotonic() > until:
            progress("out of time; run it again to go on")
            return
        progress(f"{job.variant.name}, {job.corpus}, seed {job.seed}")
        for row in measured(Job(job.variant, job.corpus, job.seed, wanted)):
            rows.add(row)
            progress(f"  {row.tokens:,} tokens: {row.loss:.4f} in {row.cpu_seconds:.0f} s of CPU")


def figures(rows: Rows) -> Iterator[Figure]:
    tokens = plan.BATCH * plan.CANDIDATE.model.context
    spent = bytes_of(plan.CANDIDATE, tokens)
    yield Figure("bytes_per_token", spent)
    yield Figure("ratio", round(bytes_of(plan.TWIN, tokens) / spent, 1), at_least=64)
    yield from _in_frames()
    found = gaps(rows, plan.CANDIDATE.digest(plan.BATCH), plan.TWIN.digest(plan.BATCH))
    for gap in found:
        place = f"{gap.corpus}_{gap.steps * tokens / 1e6:.2f}M"
        yield Figure(f"gap_{place}", round(gap.mean, 5), at_most=0.01)
        yield Figure(f"gap_{place}_seeds", [round(share, 5) for share in gap.shares])
    yield Figure("horizons", min((sum(g.corpus == c for g in found) for c in CORPORA), default=0), at_least=3)
    yield Figure("seeds", min((len(gap.shares) for gap in found), default=0), at_least=3)


def _in_frames() -> Iterator[Figure]:
    crossed = bytes_crossed(plan.CANDIDATE.model, plan.BATCH)
    yield Figure("bytes_in_frames", round(crossed, 2))
    yield Figure("ratio_in_frames", round(bytes_of(plan.TWIN, 1) / crossed, 1), at_least=64)


def quick() -> Iterator[Figure]:
    """One point, too early in training for the target to mean anything: every part moves."""
    candidate, twin, other = (next(measured(job)) for job in plan.quick())
    yield Figure("bytes_per_token", candidate.bytes)
    yield Figure("ratio", round(twin.bytes / candidate.bytes, 1), at_least=64)
    yield from _in_frames()
    yield Figure(f"gap_code_{twin.tokens / 1e6:.2f}M", round(candidate.loss / twin.loss - 1, 5))
    yield Figure(f"{other.variant}_bytes_per_token", other.bytes)
    yield Figure(f"{other.variant}_gap", round(other.loss / twin.loss - 1, 5))


def whole(arguments: argparse.Namespace) -> dict[str, Any]:
    rows = Rows(RESULTS)
    if not arguments.report:
        sweep(rows, resume=arguments.resume, minutes=arguments.minutes)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(picture(rows), encoding="utf-8")
    return {**result("compression", list(figures(rows))), "text": text(rows)}


def _commit() -> str:
    """HEAD, and whether anything that decides a result differs from it."""
    decides = ["bench/compression_sweep", *(f"src/koinon/{part}" for part in ("model", "optim", "data", "cost.py"))]
    changed = _git("status", "--porcelain", "--", *decides)
    return _git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compression")
    parser.add_argument("--quick", action="store_true", help="one point within a minute")
    parser.add_argument("--report", action="store_true", help="only what is in the file")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="use finished rows")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no training after that")
    arguments = parser.parse_args()
    done = result("compression", list(quick())) if arguments.quick else whole(arguments)
    print(json.dumps(done), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
