"""Is a league's training one machine's training?

gradient_<form>: the gradient of a step that ran through stages, microbatch by microbatch, over encoded bytes and secret
frames, against one autograd graph without boundaries: ‖difference‖ / ‖gradient‖ of the worst tensor, fp32.
cost_<form>: that gradient against central differences of J, penalty included, in fp64 with step 1e-4:
‖numeric - gradient‖ / (‖numeric‖ + ‖gradient‖) over probed entries of the worst tensor. Every trained tensor is probed.
final_loss_<replicas>x: |league - one process| of the last step's training loss, real processes, in nats.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from bench.harness import Figure, main, progress
from koinon import LocalSwarm, RunSpec
from koinon.cli.single import losses
from koinon.cost import penalty_gradient
from koinon.model.codec import decode, encode
from koinon.model.config import Form, ModelConfig
from koinon.model.stage import Stage
from koinon.model.subspace import Edges
from koinon.nodes.rundir import RunDir
from koinon.run.events import StepMeasured

FORMS: tuple[Form, ...] = ("stream", "writer", "dense")
PENALTY, STEP = 0.1, 1e-4


def measure(quick: bool) -> Iterator[Figure]:
    torch.set_num_threads(1)
    for form in FORMS:
        config = ModelConfig.from_dial(128, form=form, codec="fp32", vocab=256, context=128)
        yield Figure(f"gradient_{form}", gradient_error(config), at_most=2e-6)
    for form in FORMS:
        small = ModelConfig.from_dial(32, form=form, codec="fp32", vocab=64, context=16, layers=6, stages=3)
        yield Figure(f"cost_{form}", difference_error(small, probes=4 if quick else 20), at_most=1e-6)
    for replicas in (1, 2):
        yield Figure(f"final_loss_{replicas}x", loss_difference(replicas, steps=20 if quick else 200), at_most=1e-4)


def loss_difference(replicas: int, *, steps: int) -> float:
    """|training loss of the last step, league - one process|, in nats: same seed, same text, fp32 on the wire."""
    spec = RunSpec.of(
        name="exactness",
        model={"size": 64, "layers": 4, "stages": 4, "context": 64, "codec": "fp32"},
        train={"steps": steps, "batch": 8, "microbatch": 2, "eval_every": 0, "eval_sequences": 4},
        league={"replicas": replicas},
    )
    with TemporaryDirectory() as folder:
        with LocalSwarm(spec, folder) as swarm:
            league = {e.step: e.loss for e in swarm.events() if isinstance(e, StepMeasured)}
        one = list(losses(RunDir(Path(folder))))
    worst = max(abs(league[step] - loss) for step, loss in enumerate(one))
    progress(f"{replicas} workers per stage, {steps} steps: the losses are never further apart than {worst:.1e} nats")
    return abs(league[steps - 1] - one[-1])


def founded(config: ModelConfig) -> list[Stage]:
    return [Stage.found(config, index, bytes([index]) * 32) for index in range(config.stages)]


def text(config: ModelConfig, sequences: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab, (sequences, config.context + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def gradient_error(config: ModelConfig) -> float:
    """The worst tensor's relative difference between a pipeline over bytes and one graph."""
    ids, targets = text(config, 8)
    league, one = founded(config), without_frames(founded(config))
    for i, t in zip(ids.split(2), targets.split(2), strict=True):
        over_bytes(league, i, t, ids.numel())
    in_one_graph(one, ids, targets).div(ids.numel()).backward()  # type: ignore[no-untyped-call]
    pairs = zip(_gradients(league), _gradients(one), strict=True)
    return max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs)


def without_frames(stages: list[Stage]) -> list[Stage]:
    """The same functions with nothing hidden: each link B_s A_{s+1} on one side, the identity on the other."""
    for before, after in pairwise(stages):
        if (way_out := before.edges.exit) is not None and (way_in := after.edges.entry) is not None:
            after.edges = Edges(way_out @ way_in, after.edges.exit)
            before.edges = Edges(before.edges.entry, torch.eye(len(way_out), dtype=torch.float64))
    return stages


def over_bytes(stages: Sequence[Stage], ids: Tensor, targets: Tensor, m: int) -> None:
    """One microbatch forth and back; what passes between stages is bytes."""
    config, crossings = stages[0].config, []
    shape = (ids.numel(), config.boundary_width)
    c: Tensor | None = None
    for stage in stages[:-1]:
        sent = stage(ids, c)
        c = decode(encode(sent, config.codec), config.codec, *shape).requires_grad_()
        crossings.append((sent, c))
    stages[-1].loss_sum(ids, c, targets).div(m).backward()  # type: ignore[no-untyped-call]
    for sent, received in reversed(crossings):
        assert received.grad is not None
        sent.backward(decode(encode(received.grad, config.codec), config.codec, *shape))


def in_one_graph(stages: Sequence[Stage], ids: Tensor, targets: Tensor) -> Tensor:
    c: Tensor | None = None
    for stage in stages[:-1]:
        c = stage(ids, c)
    return stages[-1].loss_sum(ids, c, targets)


def difference_error(config: ModelConfig, probes: int) -> float:
    """The worst tensor's error against central differences."""
    config = replace(config, stages=3)
    stages = [_stirred(stage).double() for stage in founded(config)]
    ids, targets = text(config, 2)
    m = ids.numel()
    in_one_graph(stages, ids, targets).div(m).backward()  # type: ignore[no-untyped-call]
    errors = []
    for stage in stages:
        for name, weight in stage.trained().items():
            assert weight.grad is not None
            gradient = weight.grad
            if stage.penalised(name):
                gradient = gradient + penalty_gradient(weight.detach(), PENALTY, m)
            errors.append(_probed(stages, ids, targets, weight.data.view(-1), gradient.reshape(-1), probes))
    return max(errors)


def _probed(
    stages: Sequence[Stage], ids: Tensor, targets: Tensor, weight: Tensor, gradient: Tensor, probes: int
) -> float:
    """At random entries, of those whose gradient is not lost in rounding: a table row that no token names has none."""
    live = (gradient.abs() > 1e-3 * gradient.abs().max()).nonzero().flatten()
    at = live[torch.randperm(len(live), generator=torch.Generator().manual_seed(0))[:probes]]
    numeric = []
    for entry in at:
        kept, ends = weight[entry].clone(), []
        for step in (STEP, -STEP):
            weight[entry] = kept + step
            ends.append(_cost(stages, ids, targets))
        weight[entry] = kept
        numeric.append((ends[0] - ends[1]) / (2 * STEP))
    found, expected = torch.tensor(numeric, dtype=torch.float64), gradient[at]
    return float((found - expected).norm() / (found.norm() + expected.norm()))


@torch.no_grad()
def _cost(stages: Sequence[Stage], ids: Tensor, targets: Tensor) -> float:
    squares = sum(w.square().sum() for s in stages for name, w in s.trained().items() if s.penalised(name))
    return float((in_one_graph(stages, ids, targets) + PENALTY / 2 * squares) / ids.numel())


def _stirred(stage: Stage) -> Stage:
    """Weights as large as in training, so that no gradient is next to nothing."""
    generator = torch.Generator().manual_seed(stage.index)
    for weight in stage.trained().values():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return stage


def _gradients(stages: Sequence[Stage]) -> list[Tensor]:
    return [weight.grad for stage in stages for weight in stage.trained().values() if weight.grad is not None]


if __name__ == "__main__":
    sys.exit(main("exactness", measure))
