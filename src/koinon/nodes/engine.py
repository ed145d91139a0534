"""The arithmetic of one worker: forward, backward, fold, sum, update, snapshot. Called from its compute thread only.

A work item is a pure function of (weights, ids, incoming coefficients, outgoing gradient). Folding adds its weight
gradient to the accumulators in place, so it can never be taken back: whoever calls `backward` with `fold` holds a
claim. Weights change only in `commit`, by swapping in bytes that every member holds; the version before is kept until
the next commit, because a neighbour may still need an item re-executed with it.
Knows nothing of peers, leases or time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from koinon.errors import FrameMalformed, NonFiniteLoss
from koinon.model import codec
from koinon.model.config import ModelConfig
from koinon.model.snapshot import root
from koinon.model.stage import Stage
from koinon.optim.config import OptimConfig
from koinon.optim.update import State, clip_scale, cost_gradient, initial_state, square_norm, updated

Key = tuple[int, int, int]
SECOND_TOLERANCE = 1e-4
"""Relative difference of two updates from the same slices that different hardware may cause."""


@dataclass(slots=True)
class _Graph:
    """What backward needs: the leaf that the coefficients entered by (None in stage 0) and the output."""

    entered: Tensor | None
    left: Tensor


@dataclass(frozen=True, slots=True)
class Prepared:
    """The outcome of a reduce attempt, not applied yet."""

    step: int
    weights: dict[str, Tensor]
    momentum: dict[str, State]
    root: str


class Engine:
    """One stage's state and arithmetic. `step`: the step whose items the current weights are for."""

    def __init__(
        self,
        config: ModelConfig,
        optim: OptimConfig,
        stage: Stage,
        step: int,
        momentum: Mapping[str, State],
        graph_budget: int,
    ) -> None:
        """graph_budget: bytes that autograd graphs may hold; beyond it an item is recomputed from its input."""
        self.config, self.optim, self.stage, self.step = config, optim, stage, step
        self.momentum = dict(momentum)
        self.names = sorted(stage.trained())
        self.sizes = {name: p.numel() * 4 for name, p in stage.trained().items()}
        self.recomputed_items = 0
        self._previous: dict[str, Tensor] = {}
        self._graphs: dict[Key, _Graph] = {}
        self._graph_bytes = 0
        self._budget = graph_budget
        self.zero()

    @property
    def is_first(self) -> bool:
        return self.stage.index == 0

    @property
    def is_last(self) -> bool:
        return self.stage.index == self.config.stages - 1

    # --- items

    def forward(self, key: Key, step: int, ids: NDArray[np.int64], entered: bytes | None, *, train: bool) -> bytes:
        """Coefficients for the next stage, encoded. `ids` (b, T); `entered`: this stage's encoded input."""
        tokens = torch.from_numpy(ids)
        with self._weights_of(step):
            if not train:
                with torch.no_grad():
                    return self._encoded(self.stage(tokens, self._decoded(entered, tokens.numel())))
            graph = self._run_forward(tokens, entered)
            if self._has_room():
                self._graphs[key] = graph
            return self._encoded(graph.left.detach())

    def backward(
        self,
        key: Key,
        step: int,
        ids: NDArray[np.int64],
        entered: bytes | None,
        gradient: bytes,
        *,
        fold: bool,
    ) -> bytes | None:
        """Fold the item (or, without `fold`, only re-execute it); the gradient for the stage before, encoded."""
        tokens = torch.from_numpy(ids)
        with self._weights_of(step):
            graph = self._graphs.pop(key, None)
            if graph is None:
                self.recomputed_items += 1
                graph = self._run_forward(tokens, entered)
            arriving = codec.decode(gradient, self.config.codec, tokens.numel(), self.config.boundary_width)
            return self._run_backward(key, graph, graph.left, arriving, fold=fold)

    def finish(
        self,
        key: Key,
        step: int,
        ids: NDArray[np.int64],
        targets: NDArray[np.int64],
        entered: bytes | None,
        step_tokens: int,
        *,
        fold: bool,
    ) -> tuple[float, bytes | None]:
        """Last stage: (summed cost of the item, gradient for the stage before). Raises NonFiniteLoss."""
        tokens = torch.from_numpy(ids)
        with self._weights_of(step):
            leaf = self._decoded(entered, tokens.numel())
            if leaf is not None:
                leaf.requires_grad_()
            cost = self.stage.loss_sum(tokens, leaf, torch.from_numpy(targets))
            value = cost.item()
            if not math.isfinite(value):
                raise NonFiniteLoss(f"The cost of an item of step {step} is {value}.")
            scaled = cost / step_tokens
            return value, self._run_backward(key, _Graph(leaf, scaled), scaled, None, fold=fold)

    def cost(self, step: int, ids: NDArray[np.int64], targets: NDArray[np.int64], entered: bytes | None) -> float:
        """Last stage: summed cost without a gradient."""
        tokens = torch.from_numpy(ids)
        with self._weights_of(step), torch.no_grad():
            return float(
                self.stage.loss_sum(tokens, self._decoded(entered, tokens.numel()), torch.from_numpy(targets)).item()
            )

    def sample(self, step: int, ids: NDArray[np.int64], entered: bytes | None, temperature: float, seed: int) -> int:
        """Last stage: the next token of the (single) sequence. Temperature 0 is the likeliest token."""
        tokens = torch.from_numpy(ids)
        with self._weights_of(step), torch.no_grad():
            logits = self.stage.logits(tokens, self._decoded(entered, tokens.numel()))[0, -1].double()
        if temperature <= 0:
            return int(logits.argmax())
        generator = torch.Generator().manual_seed(seed)
        return int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator))

    def forget(self, key: Key) -> None:
        """Free an item's graph, if there is one."""
        self._graphs.pop(key, None)

    def zero(self) -> None:
        """Empty the accumulators and drop every graph: nothing of this step has been folded here."""
        self._graphs.clear()
        for parameter in self.stage.trained().values():
            parameter.grad = None

    def _run_forward(self, tokens: Tensor, entered: bytes | None) -> _Graph:
        leaf = self._decoded(entered, tokens.numel())
        if leaf is not None:
            leaf.requires_grad_()
        if self._graph_bytes:
            return _Graph(leaf, self.stage(tokens, leaf))
        seen: dict[int, int] = {}

        def measure(saved: Tensor) -> Tensor:
            storage = saved.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return saved

        with torch.autograd.graph.saved_tensors_hooks(measure, lambda saved: saved):
            graph = _Graph(leaf, self.stage(tokens, leaf))
        weights = {p.untyped_storage().data_ptr() for p in self.stage.trained().values()}
        self._graph_bytes = max(1, sum(size for pointer, size in seen.items() if pointer not in weights))
        return graph

    def _run_backward(
        self, key: Key, graph: _Graph, output: Tensor, arriving: Tensor | None, *, fold: bool
    ) -> bytes | None:
        if fold:
            torch.autograd.backward(output, arriving)
            gradient = None if graph.entered is None else graph.entered.grad
        elif graph.entered is None:
            return None
        else:
            (gradient,) = torch.autograd.grad(output, graph.entered, arriving)
        return None if gradient is None else self._encoded(gradient, self._dither(key))

    def _dither(self, key: Key) -> torch.Generator | None:
        """Seeded by the item, so that a re-execution rounds as the first execution did."""
        if self.config.gradient_rounding != "stochastic":
            return None
        seed = hashlib.sha256(repr((key, self.stage.index)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(seed[:8], "big") >> 1)

    def _has_room(self) -> bool:
        return (len(self._graphs) + 1) * self._graph_bytes <= self._budget

    def _encoded(self, rows: Tensor, dither: torch.Generator | None = None) -> bytes:
        return codec.encode(rows, self.config.codec, dither=dither)

    def _decoded(self, entered: bytes | None, tokens: int) -> Tensor | None:
        if entered is None:
            return None
        return codec.decode(entered, self.config.codec, tokens, self.config.boundary_width)

    @contextmanager
    def _weights_of(self, step: int) -> Iterator[None]:
        """The weights that items of `step` use: the current ones, or for a re-execution the ones before."""
        if step == self.step:
            yield
        elif step == self.step - 1 and self._previous:
            current = {name: p.data for name, p in self.stage.trained().items()}
            self.stage.load(self._previous)
            try:
                yield
            finally:
                self.stage.load(current)
        else:
            raise FrameMalformed(f"An item of step {step} came to weights of step {self.step}.")

    # --- the reduce

    def accumulated(self, names: Sequence[str]) -> dict[str, Tensor]:
        """This worker's gradient of these tensors, as it stands and where it lies."""
        trained = self.stage.trained()
        parameters = {name: trained[name] for name in names}
        return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}

    def gradients(self, names: Sequence[str]) -> bytes:
        """The same as bytes, one tensor after the other, fp32."""
        return b"".join(map(_bytes, self.accumulated(names).values()))

    def summed(self, names: Sequence[str], slices: Sequence[bytes | bytearray | None]) -> dict[str, Tensor]:
        """Sum of the members' slices in the order given; None stands for what lies in this worker's own accumulators,
        which are read where they are. Raises FrameMalformed naming the index of a bad slice."""
        total: dict[str, Tensor] = {}
        for index, piece in enumerate(slices):
            part = self.accumulated(names) if piece is None else self._slice(names, piece)
            if part is None or not all(torch.isfinite(tensor).all() for tensor in part.values()):
                raise FrameMalformed(f"slice {index} is not a finite gradient of the right size")
            total = {name: total[name] + part[name] for name in names} if total else part
        return total or {name: torch.zeros_like(self.stage.trained()[name]) for name in names}

    def _slice(self, names: Sequence[str], piece: bytes | bytearray) -> dict[str, Tensor] | None:
        """Another member's slice, read where it lies; None if it is of the wrong size."""
        if len(piece) != sum(self.sizes[n] for n in names):
            return None
        return self.split(names, torch.frombuffer(piece, dtype=torch.float32) if piece else torch.zeros(0))

    def split(self, names: Sequence[str], flat: Tensor) -> dict[str, Tensor]:
        """A flat tensor as the named tensors, in order."""
        trained, out, at = self.stage.trained(), {}, 0
        for name in names:
            count = trained[name].numel()
            out[name] = flat[at : at + count].view(trained[name].shape)
            at += count
        return out

    def received(self, names: Sequence[str], body: bytes | bytearray) -> dict[str, Tensor]:
        """An owner's updated tensors. Raises FrameMalformed if they are not finite or not whole."""
        if len(body) != sum(self.sizes[n] for n in names):
            raise FrameMalformed("updated tensors of the wrong size")
        flat = torch.from_numpy(np.frombuffer(body, "<f4").copy())
        if not torch.isfinite(flat).all():
            raise FrameMalformed("updated tensors that are not finite")
        return self.split(names, flat)

    def sent(self, names: Sequence[str], tensors: Mapping[str, Tensor]) -> bytes:
        return b"".join(_bytes(tensors[name]) for name in names)

    def cost_gradients(self, summed: Mapping[str, Tensor], scale: float, step_tokens: int) -> dict[str, Tensor]:
        """dJ/dΘ of the given tensors: the summed gradient times `scale`, and the penalty's, once per step."""
        trained, layout = self.stage.trained(), self.stage.layout
        return {
            name: cost_gradient(
                layout[name],
                trained[name].detach(),
                gradient if scale == 1.0 else gradient * scale,
                config=self.optim,
                tokens=step_tokens,
            )
            for name, gradient in summed.items()
        }

    def update(self, gradients: Mapping[str, Tensor], total_norm: float) -> tuple[dict[str, Tensor], dict[str, State]]:
        """New weights and optimizer state of the given tensors; nothing is changed here."""
        scale = clip_scale(total_norm, self.optim.clip, self.config.stages)
        weights: dict[str, Tensor] = {}
        states: dict[str, State] = {}
        for name, gradient in gradients.items():
            spec, weight = self.stage.layout[name], self.stage.trained()[name].detach()
            state = self.momentum.get(name) or initial_state(spec, weight)
            weights[name], states[name] = updated(
                spec, weight, gradient, state, config=self.optim, step=self.step, scale=scale
            )
        return weights, states

    def penalised_squares(self) -> float:
        """Sum of squares of the weights that J's penalty counts; 0 where J has none."""
        if not self.optim.l2:
            return 0.0
        trained = self.stage.trained()
        return math.fsum(
            float(trained[n].detach().double().square().sum()) for n in self.names if self.stage.penalised(n)
        )

    def prepare(self, weights: Mapping[str, Tensor], momentum: Mapping[str, State]) -> Prepared:
        """What `commit` will apply: all tensors of the stage after this step."""
        ordered = {name: weights[name] for name in self.names}
        return Prepared(self.step + 1, ordered, dict(momentum), root(ordered))

    def attended(self, weights: Mapping[str, Tensor], step: int) -> Prepared:
        """What `commit` will apply where all of it came from others: the stage's tensors after `step`."""
        ordered = {name: weights[name] for name in self.names}
        return Prepared(step + 1, ordered, {}, root(ordered))

    def commit(self, prepared: Prepared) -> None:
        """Apply a reduce that the log has committed, and empty the accumulators."""
        is_next = prepared.step == self.step + 1  # whoever attended may have skipped some
        self._previous = {name: p.data for name, p in self.stage.trained().items()} if is_next else {}
        self.stage.load(prepared.weights)
        self.momentum = dict(prepared.momentum)
        self.step = prepared.step
        self.zero()

    @property
    def previous(self) -> Mapping[str, Tensor]:
        """Weights of the step before, for re-executions; empty where they are not known."""
        return self._previous

    def remember(self, previous: Mapping[str, Tensor]) -> None:
        """Take the weights of the step before from elsewhere. They must have been held against the log."""
        self._previous = dict(previous)

    def adopt(self, weights: Mapping[str, Tensor], momentum: Mapping[str, State], step: int) -> None:
        """Take another member's weights of a later step, with the optimizer state that came along."""
        self._previous = {}
        self.stage.load(weights)
        self.momentum = dict(momentum)
        self.step = step
        self.zero()

    def current(self) -> Prepared:
        """The state as it stands, in the form of a snapshot."""
        weights = self.weights()
        return Prepared(self.step, weights, dict(self.momentum), root(weights))

    def weights(self) -> dict[str, Tensor]:
        return {name: self.stage.trained()[name].detach() for name in self.names}


def squares(tensors: Mapping[str, Tensor]) -> tuple[float, ...]:
    """Sum of squares of each tensor, in fp64, in the order given."""
    return tuple(square_norm(t) for t in tensors.values())


def largest_difference(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[str, float]:
    """The tensor in which two updates differ most, relative to its norm."""
    worst, most = "", 0.0
    for name, tensor in mine.items():
        error = float((tensor - theirs[name]).norm() / tensor.norm().clamp_min(1e-30))
        if error > most or not worst:
            worst, most = name, error
    return worst, most


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


def warm_up() -> None:
    """Compute one item and one update of toy stages. What torch loads at its first backward that is given a gradient
    (0.4 s of it) is then there for every worker that is forked from this process; on a CPU that starts no thread."""
    config = ModelConfig.from_dial(8, stages=2, layers=2, heads=1, context=4, vocab=16, rank=2, table=4)
    ids, key = np.zeros((1, 4), np.int64), (0, 0, 0)
    first, last = (
        Engine(config, OptimConfig(), Stage.found(config, index, bytes(32)), 0, {}, graph_budget=0) for index in (0, 1)
    )
    _, gradient = last.finish(key, 0, ids, ids, first.forward(key, 0, ids, None, train=True), 4, fold=True)
    assert gradient is not None
    first.backward(key, 0, ids, None, gradient, fold=True)
    first.update(first.summed(first.names, [None]), 1.0)
