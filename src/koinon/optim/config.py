"""How a run's weights are updated: one frozen value. Knows no tensors and imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from koinon.errors import Contradiction

Schedule = Literal["cosine", "linear", "wsd"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """Raises Contradiction if its values cannot hold together."""

    muon_lr: float = 1e-2
    """Rate of block matrices and projections."""
    adamw_lr: float = 4e-3
    """Rate of embeddings, tables, gains and the head."""
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled (arXiv:1711.05101): Θ shrinks by rate * decay each step. No part of J."""
    l2: float = 0.0
    """λ of J's penalty (λ/2m) Σ Θ². Another knob than decay: both at once is refused."""
    clip: float = 1.0
    """C: the most that the norm of J's gradient may be, over all stages."""
    warmup: float = 0.1
    """Share of the steps in which the rate rises from nothing."""
    steps: int = 1000
    floor: float = 0.05
    """Where the rate ends, as a share of its peak."""
    schedule: Schedule = "cosine"
    decay: float = 0.2
    """Share of the steps in which "wsd" falls."""

    def __post_init__(self) -> None:
        if self.weight_decay and self.l2:
            raise Contradiction(
                "`weight_decay` shrinks weights beside J and `l2` is a penalty inside J: set one of them to 0."
            )
        for name in ("muon_lr", "adamw_lr", "eps", "clip"):
            self._assert(name, 0 < getattr(self, name) < float("inf"), "a positive number")
        for name in ("weight_decay", "l2"):
            self._assert(name, 0 <= getattr(self, name) < float("inf"), "0 or more")
        for name in ("warmup", "floor", "decay"):
            self._assert(name, 0 <= getattr(self, name) <= 1, "a share between 0 and 1")
        self._assert("momentum", 0 <= self.momentum < 1, "at least 0 and below 1")
        self._assert("betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)")
        self._assert("steps", self.steps >= 1, "at least 1")
        self._assert("schedule", self.schedule in get_args(Schedule), f"one of {', '.join(get_args(Schedule))}")
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise Contradiction(f"`warmup` {self.warmup} and `decay` {self.decay} overlap: together at most 1.")

    def _assert(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise Contradiction(f"`{name}` is {getattr(self, name)!r}: it must be {wanted}.")
