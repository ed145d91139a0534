"""One machine that holds the whole model, trained on what a league trains on: `python -m koinon.cli.single DIR`.

It reads the league's spec and data, founds the same stages and takes the same steps in one process and one autograd
graph, and prints a line of JSON per step: {"step": 0, "loss": 5.6}. It loads torch, so it is a process of its own; it
ends when nobody reads it any more. Knows nothing of the league that it is compared with.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from koinon.nodes.rundir import RunDir
from koinon.run.spec import RunSpec


def losses(directory: RunDir) -> Iterator[float]:
    """Training loss of each step of the run in `directory`. Raises SpecError, DataError."""
    import torch

    from koinon.data import Dataset
    from koinon.model.monolith import Microbatch, Monolith
    from koinon.nodes.control import sampling_seed, stage_secret
    from koinon.optim.whole import WholeOptimizer

    spec = RunSpec.load(directory.spec)
    dataset, seed, train = Dataset.open(directory.data), sampling_seed(spec), spec.train
    model = Monolith(spec.model, [stage_secret(spec, stage) for stage in range(spec.model.stages)])
    optimizer = WholeOptimizer(spec.optim, model.stages)
    for step in range(train.steps):
        drawn = dataset.batch(seed, step, train.batch, train.microbatch, spec.model.context)
        batch = [Microbatch(torch.from_numpy(b.ids).long(), torch.from_numpy(b.targets).long()) for b in drawn]
        yield model.train_step(batch, optimizer)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m koinon.cli.single", description="Repeat a run in one process.")
    parser.add_argument("directory", type=Path, help="the directory of a run")
    parser.add_argument("--nice", type=int, default=0, help="how much others go first, 0 to 19")
    asked = parser.parse_args()
    os.nice(asked.nice)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started us, and then reads no more
    for step, loss in enumerate(losses(RunDir(asked.directory))):
        print(json.dumps({"step": step, "loss": loss}), flush=True)


if __name__ == "__main__":
    main()
