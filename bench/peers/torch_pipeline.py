"""torch.distributed.pipelining: a process per stage, 1F1B over gloo on the loopback, the dense model.

Every stage reads the text itself, because every stage has tables that are indexed by token ids; activations and their
gradients cross in fp32 at full width, as the library sends them. Updates are the league's, stage by stage.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.multiprocessing.spawn import spawn

from bench.meter import read_tree
from bench.peers.work import Outcome, Text, Work, outcome, run
from koinon.cost import softmax_sum
from koinon.model.stage import Stage
from koinon.nodes.control import stage_secret
from koinon.optim.whole import WholeOptimizer
from koinon.run.spec import RunSpec

RESULT = "outcome.json"


class Part(nn.Module):
    """A stage in the library's shape: positional arguments cross the boundary, keywords come from this process."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, *crossing: Tensor, ids: Tensor) -> Tensor:
        out: Tensor = self.stage(ids, None if self.stage.is_first else crossing[0])
        return out


class Member:
    """One process of the pipeline."""

    def __init__(self, spec: RunSpec, rank: int, folder: Path) -> None:
        config = spec.model.dense()
        self.spec, self.text = spec, Text(spec, folder / f"rank-{rank}")
        stage = Stage.found(config, rank, stage_secret(spec, rank))
        self.optimizer = WholeOptimizer(spec.optim, [stage])
        self.parameters = sum(p.numel() for p in stage.parameters())
        self.is_first, self.is_last = stage.is_first, stage.is_last
        part = PipelineStage(Part(stage), rank, config.stages, torch.device("cpu"))
        self._schedule = Schedule1F1B(part, spec.train.microbatches, loss_fn=self._cost, scale_grads=False)

    def step(self, number: int) -> float:
        """One step; the mean loss in the last stage, 0 elsewhere."""
        ids, targets = (torch.from_numpy(np.concatenate(part)) for part in zip(*self.text.step(number), strict=True))
        losses: list[Tensor] = []
        more: dict[str, Any] = {"target": targets, "losses": losses} if self.is_last else {}
        self._schedule.step(*([ids] if self.is_first else []), ids=ids, **more)
        self.optimizer.step(self.spec.step_tokens)
        return float(torch.stack(losses).detach().sum()) if losses else 0.0

    def _cost(self, logits: Tensor, targets: Tensor) -> Tensor:
        return softmax_sum(logits.flatten(0, 1), targets.flatten(), None) / self.spec.step_tokens


def member(rank: int, work: Work, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    spec = work.spec
    dist.init_process_group("gloo", rank=rank, world_size=spec.model.stages)
    mine = Member(spec, rank, folder)
    began, loss = read_tree(os.getppid()), 0.0
    for number in range(work.warmup + work.steps):
        if number == work.warmup:
            dist.barrier()
            began = read_tree(os.getppid())
            dist.barrier()
        loss = mine.step(number)
    dist.barrier()
    parameters = torch.tensor(mine.parameters)
    spent = read_tree(os.getppid()) - began
    dist.reduce(parameters, spec.model.stages - 1)
    if mine.is_last:
        done = outcome(work, spent, loss=loss, parameters=int(parameters))
        (folder / RESULT).write_text(json.dumps(asdict(done)))
    dist.barrier()
    dist.destroy_process_group()


def train(work: Work, folder: Path) -> Outcome:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(member, (work, port, folder), nprocs=work.spec.model.stages)  # type: ignore[no-untyped-call]
    return Outcome(**json.loads((folder / RESULT).read_text()))


if __name__ == "__main__":
    run(train)
