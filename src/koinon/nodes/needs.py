"""What a worker of each stage needs of a machine: memory and disk, as a pure function of the spec.

Memory is counted at the worst moment, which is a reduce: old, current and new weights, gradients, the slices of all
members, optimizer state before and after, a snapshot being written; beside them the graphs and the bytes that crossed
boundaries in this step. Real workers of 40 to 190 million numbers took 0.9 to 1.0 of it, small ones (where the process
itself is most of it) 0.7. Knows no machine; imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from koinon.model.sizing import frozen_bytes, graph_bytes, head_bytes, optimizer_bytes, trained_bytes
from koinon.run.spec import RunSpec
from koinon.units import Bytes

PROCESS = Bytes.mib(260)
"""Python, torch and the transport, before any tensor: measured on Linux with the CPU build of torch 2.13."""
SPARE_SNAPSHOTS = 3
"""Beyond those kept: two that other stages have not reached yet, and the draft of the next."""


@dataclass(frozen=True, slots=True)
class Need:
    """Of a worker of one stage. `state`: what a newcomer downloads."""

    stage: int
    state: Bytes
    memory: Bytes
    disk: Bytes


def need(spec: RunSpec, stage: int) -> Need:
    """What a worker of that stage needs, if the stage has as many replicas as the spec begins with."""
    model, replicas = spec.model, spec.league.replicas
    weights, frozen = trained_bytes(model, stage).count, frozen_bytes(model, stage).count
    share = min(1.0, 2 / replicas)  # of the tensors, it owns one part and seconds another
    moments = share * optimizer_bytes(model, stage).count
    snapshot = weights + frozen + moments
    versions = 3 * weights + frozen  # the current weights, those of the step before, and the next
    gradients = weights + share * weights * (replicas + 1)  # its own, every member's slice, and their sum
    messages = weights + share * weights  # slices and updated bytes under way
    reduce = versions + gradients + messages + 2 * moments + 2 * snapshot  # which is gathered, then encoded
    memory = PROCESS.count + reduce + _graphs(spec, stage) + _crossed(spec, stage)
    kept = spec.train.keep_snapshots + SPARE_SNAPSHOTS
    return Need(stage, Bytes(weights + frozen), Bytes(int(memory)), Bytes(int(kept * snapshot)))


def needs(spec: RunSpec) -> tuple[Need, ...]:
    """Of every stage, in order."""
    return tuple(need(spec, stage) for stage in range(spec.model.stages))


def _graphs(spec: RunSpec, stage: int) -> int:
    """Graphs kept between forward and backward, within the spec's budget, and the one being computed."""
    model, size = spec.model, spec.train.microbatch
    one = graph_bytes(model, stage, size).count
    if stage == model.stages - 1:
        return 2 * one + head_bytes(model, size).count
    budget = spec.league.graph_budget_mib * 2**20
    return min(budget, spec.league.in_flight * one) + 2 * one


def _crossed(spec: RunSpec, stage: int) -> int:
    """Ids and encoded bytes of a step's items, kept until every stage has taken the step."""
    model, train = spec.model, spec.train
    tokens = -(-train.microbatches // spec.league.replicas) * train.microbatch * model.context
    sides = (stage > 0) + (stage < model.stages - 1)
    return tokens * (8 + 2 * sides * model.bytes_per_token)
