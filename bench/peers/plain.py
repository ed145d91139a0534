"""One process, one thread, plain PyTorch: the whole model in one autograd graph, gradients accumulated.

By default the dense model, which a league's model is cut from: same blocks, same tables, no narrow boundaries and no
codec.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from bench.meter import read_tree
from bench.peers.work import Outcome, Text, Work, outcome, run
from koinon.model.monolith import Microbatch, Monolith, Optimizer
from koinon.nodes.control import stage_secret
from koinon.optim.whole import WholeOptimizer
from koinon.run.spec import RunSpec


class TorchAdamW:
    """torch's own fused AdamW on every tensor: less arithmetic than Muon, for orientation."""

    def __init__(self, spec: RunSpec, model: Monolith) -> None:
        optim = spec.optim
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=optim.adamw_lr, betas=optim.betas, eps=optim.eps, fused=True
        )

    def step(self, tokens: int) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()


def train(work: Work, folder: Path) -> Outcome:
    torch.set_num_threads(1)
    spec = work.spec
    config = spec.model.dense() if work.form == "dense" else spec.model
    model = Monolith(config, [stage_secret(spec, stage) for stage in range(config.stages)])
    optimizer: Optimizer = (
        TorchAdamW(spec, model) if work.updates == "adamw" else WholeOptimizer(spec.optim, model.stages)
    )
    text = Text(spec, folder)
    began, loss = read_tree(os.getpid()), 0.0
    for step in range(work.warmup + work.steps):
        if step == work.warmup:
            began = read_tree(os.getpid())
        batch = [Microbatch(torch.from_numpy(i), torch.from_numpy(t)) for i, t in text.step(step)]
        loss = model.train_step(batch, optimizer)
    spent = read_tree(os.getpid()) - began
    return outcome(work, spent, loss=loss, parameters=sum(p.numel() for p in model.parameters()))


if __name__ == "__main__":
    run(train)
