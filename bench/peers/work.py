"""What every peer is given and what it reports: the model, the text, the steps. Imports no torch."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from bench.meter import Reading
from koinon.data import Dataset, prepare
from koinon.nodes.control import sampling_seed
from koinon.run.spec import RunSpec

SIZES: Final[dict[str, dict[str, int]]] = {
    "1M": {"size": 128, "layers": 4, "table": 512},
    "10M": {"size": 320, "layers": 8, "table": 512},
}
STAGES: Final = 4
Updates = Literal["league", "adamw"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """`warmup` steps that do not count, then `steps` that do.

    updates: "league" is Koinon's Muon and AdamW; "adamw" is torch's fused AdamW on all tensors (plain only).
    form: "dense" is the ordinary model; "stream" is the league's own model, narrow boundaries and codec included
    (plain only: what the form alone costs).
    """

    size: str
    warmup: int
    steps: int
    updates: Updates = "league"
    form: Literal["dense", "stream"] = "dense"

    @property
    def spec(self) -> RunSpec:
        """The run. One step more than is measured, so that the evaluation at the end is not."""
        return RunSpec.of(
            name=f"throughput-{self.size}",
            seed=1,
            model={"stages": STAGES, "context": 256, **SIZES[self.size]},
            train={"steps": self.warmup + self.steps + 2, "batch": 16, "microbatch": 2, "eval_every": 0},
            league={"replicas": 1},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """cpu, wall: seconds of the measured steps, cpu over the whole process tree. loss: of the last step, in nats."""

    tokens: int
    cpu: float
    wall: float
    loss: float
    parameters: int = 0
    recomputed: float = 0.0
    """Recomputed FLOPs per useful FLOP."""

    @property
    def per_cpu_second(self) -> float:
        return self.tokens / self.cpu

    @property
    def per_second(self) -> float:
        return self.tokens / self.wall


def outcome(work: Work, spent: Reading, **more: Any) -> Outcome:
    return Outcome(tokens=work.steps * work.spec.step_tokens, cpu=spent.cpu, wall=spent.wall, **more)


def run(train: Callable[[Work, Path], Outcome]) -> None:
    """Main of a peer: the work comes as JSON in the first argument, the outcome goes out as the last line."""
    work = Work(**json.loads(sys.argv[1]))
    with tempfile.TemporaryDirectory(prefix="koinon-bench-") as folder:
        done = train(work, Path(folder))
    print(json.dumps(asdict(done)), flush=True)


class Text:
    """The sequences of each step: the ones that a league with the same spec reads."""

    def __init__(self, spec: RunSpec, folder: Path) -> None:
        self._spec, self._seed = spec, sampling_seed(spec)
        self._dataset: Dataset = prepare(spec.data, folder, lambda *_: None)

    def step(self, number: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """(ids, targets) of each microbatch, both (sequences, context)."""
        train, context = self._spec.train, self._spec.model.context
        for batch in self._dataset.batch(self._seed, number, train.batch, train.microbatch, context):
            yield batch.ids.astype(np.int64), batch.targets.astype(np.int64)
