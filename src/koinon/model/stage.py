"""A stage: consecutive layers of the model, computed on one machine.

A work item is a pure function of (weights, token ids, incoming coefficients, outgoing gradient): the forward is a call,
the backward is autograd from what the call returned. Coefficients are plain fp32 tensors here, in the boundary's frame;
bytes are `codec`'s business. The accumulator a is carried from stage to stage and never recomputed from the stream:
(x - F) U would subtract two numbers near 1 to find one near 0.01.
Knows no network, no optimizer and no other stage. Neighbours: `subspace` holds the stage's private tensors, `layout`
names the trained ones, `flops` prices an item.

Shapes: b sequences of T tokens, width d, boundary width k (`config.boundary_width`), ids (b, T) int64, c (b*T, k).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from koinon.cost import softmax_sum
from koinon.errors import SnapshotCorrupt, TokenOutOfRange
from koinon.model.config import ModelConfig
from koinon.model.founding import first_weights, frozen_tensors
from koinon.model.layers import Block, Past, Rotation, rms_norm
from koinon.model.layout import Group, layout
from koinon.model.subspace import Edges, Exit, Lift, Side, adopt


@dataclass(slots=True)
class Memory:
    """What a stage remembers of sequences that it generates token by token: keys, values and the last ids."""

    ids: Tensor | None = None
    blocks: list[Past] = field(default_factory=list)


class Stage(nn.Module):
    """Stage `index` of `config.stages`. Make one with `found` or `restore`."""

    embedding: Tensor

    def __init__(
        self, config: ModelConfig, index: int, frozen: Mapping[str, Tensor], weights: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.config, self.index, self.layout = config, index, layout(config, index)
        self.is_first, self.is_last = index == 0, index == config.stages - 1
        self._assert_fits(weights)
        self._frozen = {name: tensor for name, tensor in frozen.items() if not name.startswith("edges.")}
        self._edges = Edges(frozen.get("edges.entry"), frozen.get("edges.exit"))
        self._cast: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        self._build(weights)
        # Parameters register module by module; everything outside this class sees the layout's order.
        by_name = dict(self.named_parameters())
        self._trained = {name: by_name[name] for name in self.layout}

    @classmethod
    def found(cls, config: ModelConfig, index: int, secret: bytes) -> Stage:
        """The founding replica: all tensors drawn from a 32-byte secret, the same ones each time on one machine."""
        return cls(config, index, frozen_tensors(config, index, secret), first_weights(config, index, secret))

    @classmethod
    def restore(
        cls, config: ModelConfig, index: int, frozen: Mapping[str, Tensor], weights: Mapping[str, Tensor]
    ) -> Stage:
        """A replica from another's `frozen()` and weights. Raises SnapshotCorrupt if names or shapes do not fit."""
        return cls(config, index, frozen, weights)

    # -- tensors --

    def frozen(self) -> dict[str, Tensor]:
        """What never trains and never leaves the stage's replicas: F, U, hash multipliers, and the edges' fp64 maps."""
        maps = {"edges.entry": self.edges.entry, "edges.exit": self.edges.exit}
        return self._frozen | {name: tensor for name, tensor in maps.items() if tensor is not None}

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained tensors by name, always in the same order."""
        return dict(self._trained)

    def group(self, name: str) -> Group:
        """Which optimizer updates the tensor."""
        return self.layout[name].group

    def penalised(self, name: str) -> bool:
        """Whether the tensor's squares count in J's penalty."""
        return self.layout[name].penalised

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Use these weights from now on. Parameters point at the given tensors; the old ones are left as they were."""
        self._assert_fits(weights)
        for name, parameter in self._trained.items():
            parameter.data = weights[name]

    @property
    def edges(self) -> Edges:
        """The boundaries' secret maps. Assign a new value to change a frame; the old value stays good for old items."""
        return self._edges

    @edges.setter
    def edges(self, edges: Edges) -> None:
        self._edges = edges
        self._cast.clear()

    # -- a work item --

    def forward(self, ids: Tensor, c_in: Tensor | None = None) -> Tensor:
        """c_out (b*T, k) in the frame of the boundary behind this stage; for the last stage the logits (b, T, V).

        c_in (b*T, k): decoded coefficients, None for stage 0. Ask them for their gradient before the call
        (`c_in.requires_grad_()`), then `c_out.backward(g)` fills the weights' gradients and `c_in.grad`.
        Raises TokenOutOfRange, and Contradiction for sequences longer than the context.
        """
        return self._leave(*self._run(ids, c_in, None))

    def logits(self, ids: Tensor, c_in: Tensor | None = None) -> Tensor:
        """(b, T, V) of the last stage."""
        assert self.is_last, "only the last stage makes logits"
        return cast(Tensor, self(ids, c_in))

    def loss_sum(self, ids: Tensor, c_in: Tensor | None, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        """-Σ log h[target] over unmasked tokens: a scalar of the last stage. targets (b, T) int64, mask (b, T) bool.

        Divide by the step's m, not by this item's tokens, before going backward.
        """
        flat_mask = None if mask is None else mask.flatten()
        return softmax_sum(self.logits(ids, c_in).flatten(0, 1), targets.flatten(), flat_mask)

    @torch.no_grad()
    def evaluate(self, ids: Tensor, c_in: Tensor | None, targets: Tensor, mask: Tensor | None = None) -> float:
        """`loss_sum` without a graph."""
        return float(self.loss_sum(ids, c_in, targets, mask))

    @torch.no_grad()
    def extend(self, ids: Tensor, c_in: Tensor | None, memory: Memory) -> Tensor:
        """`forward` of the next tokens of sequences that `memory` holds, which then holds these tokens too.

        ids (b, t), c_in (b*t, k). A fresh `Memory()` starts the sequences. Equals the forward of the whole sequences.
        """
        return self._leave(*self._run(ids, c_in, memory))

    # -- inside --

    def _run(self, ids: Tensor, c_in: Tensor | None, memory: Memory | None) -> tuple[Tensor | None, Tensor, Tensor]:
        """(a, x0, x): the accumulator, and the stream before and after the blocks."""
        if int(ids.min()) < 0 or int(ids.max()) >= self.config.vocab:
            raise TokenOutOfRange(f"Token ids must lie between 0 and {self.config.vocab - 1}, the model's vocabulary.")
        side = self._side_of(ids, memory)
        pasts = self._pasts(memory)
        a = self._enter(ids, c_in)
        if self.config.form == "dense":
            return None, a, self._through(a if side is None else a + side, pasts)
        assert side is not None
        if self.config.form == "writer" and not self.is_last:
            for block, past in zip(self.blocks, pasts, strict=True):
                a = a + block.attention(side + self.lift(a), past)
                a = a + block.ffn(side + self.lift(a))
            return a, side, side
        with _in_fp32(side):
            x0 = side + self.lift(a)
        return a, x0, self._through(x0, pasts)

    def _enter(self, ids: Tensor, c_in: Tensor | None) -> Tensor:
        """a (b, T, k): the embedding in stage 0, else what came in, turned out of the boundary's frame."""
        if c_in is None:
            assert self.is_first, "only stage 0 has no incoming coefficients"
            return F.embedding(ids, self.embedding)
        with _in_fp32(c_in):
            a = c_in if self.edges.entry is None else c_in @ self._map("entry", c_in)
        return a.view(*ids.shape, -1)

    def _through(self, x: Tensor, pasts: list[Past | None]) -> Tensor:
        for block, past in zip(self.blocks, pasts, strict=True):
            x = block(x, past)
        return x

    def _leave(self, a: Tensor | None, x0: Tensor, x: Tensor) -> Tensor:
        if self.is_last:
            return cast(Tensor, self.head(x))
        if a is None:
            return x.reshape(-1, self.config.size)
        with _in_fp32(x):
            if self.config.form == "stream":
                a = self._kept(a) + self.exit(x - x0)
            c = a.reshape(-1, self.config.boundary_width)
            return c @ self._map("exit", c)

    def _kept(self, a: Tensor) -> Tensor:
        """The part of the accumulator that the stage adds to; its fresh coefficients start from nothing."""
        return a if not self.config.fresh else F.pad(a[..., : self.config.rank], (0, self.config.fresh))

    def _map(self, which: str, like: Tensor) -> Tensor:
        """An edge's map in the precision and on the device of what it multiplies."""
        key = (which, like.device, like.dtype)
        if key not in self._cast:
            master = self._edges.entry if which == "entry" else self._edges.exit
            assert master is not None
            self._cast[key] = master.to(device=like.device, dtype=like.dtype)
        return self._cast[key]

    def _side_of(self, ids: Tensor, memory: Memory | None) -> Tensor | None:
        if memory is None:
            return cast("Tensor | None", self.side(ids))
        seen = ids if memory.ids is None else torch.cat((memory.ids, ids), 1)
        memory.ids = seen[:, max(0, seen.shape[1] - self.side.reach) :]
        side = self.side(seen)
        return None if side is None else side[:, -ids.shape[1] :]

    def _pasts(self, memory: Memory | None) -> list[Past | None]:
        if memory is None:
            return [None] * len(self.blocks)
        memory.blocks = memory.blocks or [Past() for _ in self.blocks]
        return list(memory.blocks)

    def _build(self, weights: Mapping[str, Tensor]) -> None:
        config, rotation = self.config, Rotation(self.config)
        if self.is_first:
            self.embedding = nn.Parameter(weights["embedding"])
        self.side = Side(config, _under(weights, "side"), _under(self._frozen, "side"))
        if config.form != "dense":
            self.lift = Lift(_under(weights, "lift"), _under(self._frozen, "lift"))
        mine = range(len(config.cuts()[self.index]))
        self.blocks = Blocks(Block(config, rotation, _under(weights, f"blocks.{i}")) for i in mine)
        if self.is_last:
            self.head = Head(_under(weights, "head"))
        elif config.form == "stream":
            self.exit = Exit(config, _under(weights, "exit"))

    def _assert_fits(self, weights: Mapping[str, Tensor]) -> None:
        given = {name: tuple(weight.shape) for name, weight in weights.items()}
        wanted = {name: spec.shape for name, spec in self.layout.items()}
        if odd := sorted(name for name in given.keys() | wanted.keys() if given.get(name) != wanted.get(name)):
            raise SnapshotCorrupt(f"These weights are not stage {self.index}'s: {', '.join(odd)} missing or misshapen.")


class Head(nn.Module):
    """The last norm's gain and the output matrix."""

    gain: Tensor
    weight: Tensor

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        adopt(self, weights, {})

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(rms_norm(x, self.gain), self.weight)


class Blocks(nn.ModuleList):
    """A list of blocks that the type checker knows as such."""

    def __iter__(self) -> Iterator[Block]:
        return cast("Iterator[Block]", super().__iter__())


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


def _in_fp32(like: Tensor) -> torch.autocast:
    """The accumulator and the maps keep full precision even where blocks run in bf16."""
    return torch.autocast(like.device.type, enabled=False)
