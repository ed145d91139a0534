"""One training with several ends: a trunk at a steady rate, and a short decay wherever a horizon lies.

With warm-up, stable rate and decay (arXiv:2404.06395) the trunk of a short run is the beginning of a longer one, so
three horizons cost little more than the longest. Knows nothing of what is compared.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.compression_sweep.wires import Wire
from bench.harness import progress
from koinon.data import Dataset
from koinon.data import dataset as data
from koinon.model.config import ModelConfig
from koinon.model.monolith import Microbatch, Monolith
from koinon.optim.config import OptimConfig
from koinon.optim.whole import WholeOptimizer

WARMUP, DECAY = 20, 0.2
EVALUATED = 256
"""Held-out sequences, the same ones for every run."""


@dataclass(frozen=True, slots=True)
class End:
    """A horizon reached. loss: held-out, nats per token. cpu: seconds of its trunk and its decay."""

    steps: int
    loss: float
    cpu: float


@dataclass(frozen=True, slots=True)
class Training:
    """Model, rates and seed, on the text of `dataset`. wire: what boundaries do, if not what the model says."""

    model: ModelConfig
    muon_lr: float
    adamw_lr: float
    dataset: Dataset
    seed: int
    wire: Wire | None = None
    batch: int = 8
    """Sequences per step, all in one microbatch."""

    def ends(self, horizons: Sequence[int]) -> Iterator[End]:
        """Train until each horizon, in steps."""
        with fast():
            yield from self._ends(sorted(horizons))

    def _ends(self, horizons: Sequence[int]) -> Iterator[End]:
        model = Monolith(self.model, [self._secret(f"stage {i}") for i in range(self.model.stages)], **self._hooks())
        optimizer = WholeOptimizer(self._optim(horizons[-1]), model.stages)
        spent = 0.0
        for horizon in horizons:
            began = time.process_time()
            self._advance(model, optimizer, decay_from(horizon))
            spent += time.process_time() - began
            trunk = Saved.of(model, optimizer)
            optimizer.config = self._optim(horizon)
            self._advance(model, optimizer, horizon)
            cpu = spent + time.process_time() - trunk.moment
            yield End(horizon, evaluated(model, self.dataset), cpu)
            trunk.restore(model, optimizer)

    def _advance(self, model: Monolith, optimizer: WholeOptimizer, until: int) -> None:
        while optimizer.done < until:
            drawn = self.dataset.batch(self._secret("text"), optimizer.done, self.batch, self.batch, self.model.context)
            loss = model.train_step(map(_tensors, drawn), optimizer)
            if optimizer.done % 100 == 0:
                progress(f"  step {optimizer.done}: {loss:.3f}")

    def _optim(self, steps: int) -> OptimConfig:
        return OptimConfig(
            muon_lr=self.muon_lr,
            adamw_lr=self.adamw_lr,
            schedule="wsd",
            steps=steps,
            warmup=WARMUP / steps,
            decay=DECAY,
        )

    def _secret(self, of: str) -> bytes:
        """Two models of one seed read the same text, and start alike where they have the same tensors."""
        return hashlib.sha256(f"compression/{self.seed}/{of}".encode()).digest()

    def _hooks(self) -> dict[str, Wire]:
        return {} if self.wire is None else {"forth": self.wire, "back": self.wire}


@dataclass(frozen=True, slots=True)
class Saved:
    """A moment of a training to come back to. Updates replace tensors and change none, so nothing is copied."""

    weights: list[dict[str, torch.Tensor]]
    states: list[dict[str, dict[str, torch.Tensor]]]
    config: OptimConfig
    done: int
    moment: float

    @classmethod
    def of(cls, model: Monolith, optimizer: WholeOptimizer) -> Saved:
        weights = [{name: weight.data for name, weight in stage.trained().items()} for stage in model.stages]
        states = [dict(states) for states in optimizer.states]
        return cls(weights, states, optimizer.config, optimizer.done, time.process_time())

    def restore(self, model: Monolith, optimizer: WholeOptimizer) -> None:
        for stage, weights in zip(model.stages, self.weights, strict=True):
            stage.load(weights)
        optimizer.states = [dict(states) for states in self.states]
        optimizer.config, optimizer.done = self.config, self.done


def decay_from(horizon: int) -> int:
    """The step at which the rate begins to fall."""
    return max(WARMUP, round((1 - DECAY) * horizon))


def evaluated(model: Monolith, dataset: Dataset) -> float:
    return model.evaluate(map(_tensors, dataset.heldout_batches(EVALUATED, 16, model.config.context)))


def _tensors(batch: data.Microbatch) -> Microbatch:
    return Microbatch(torch.from_numpy(batch.ids).long(), torch.from_numpy(batch.targets).long())


@contextmanager
def fast() -> Iterator[None]:
    """One thread, and what makes small matrices quick on it: together 1.6 times as many tokens per second (4,400 to
    7,000 at 2,048 tokens a step, AVX-512 without AMX), with products still within 2e-7 of fp64 there.

    "medium" lets torch hand fp32 products to oneDNN, which on a processor with AMX rounds them to bf16: for both sides
    of a comparison alike. The flash attention of torch becomes slow with it, and the plain one fast.
    """
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")
    _keep_freed_memory()
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def _keep_freed_memory() -> None:
    """Tell glibc not to give buffers of a megabyte back to the system after each operation: 3 to 5% here."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(parameter, 2**30)
