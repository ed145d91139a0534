"""What really crosses a boundary: a few steps of a league of real processes, and the frames that its workers sent.

Counted are whole frames, headers and token ids included, as they are handed to the socket, over the tokens (times
directions) that they carried. Knows nothing of losses.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.harness import progress
from koinon.local import League
from koinon.model.config import ModelConfig
from koinon.run.spec import RunSpec

STEPS = 4
SETTLED = 1.5
"""Seconds after which every worker has told of its last step: heartbeats come once a second."""


def bytes_crossed(model: ModelConfig, batch: int) -> float:
    """Bytes per token, boundary and direction, with steps of `batch` sequences in one microbatch."""
    spec = RunSpec.of(
        name="crossing",
        model=asdict(model),
        train={"steps": STEPS, "batch": batch, "microbatch": batch, "eval_every": 0, "eval_sequences": 1},
        league={"replicas": 1},
        data={"max_bytes": 400_000},
    )
    with TemporaryDirectory(prefix="koinon-bench-") as folder:
        crossed = asyncio.run(_trained(spec, Path(folder) / "run"))
    progress(f"{model.form}, {model.boundary_width} numbers in {model.codec}: {crossed:.2f} bytes in frames")
    return crossed


async def _trained(spec: RunSpec, folder: Path) -> float:
    async with League(spec, folder) as league:
        await league.finished()
        await asyncio.sleep(SETTLED)
        told = list(league.telemetry.values())
    return sum(t.boundary_bytes for t in told) / sum(t.boundary_tokens for t in told)
