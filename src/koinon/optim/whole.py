"""The optimizer of one machine that holds whole stages: the same updates that a league's owners make, in one loop."""

from __future__ import annotations

import math
from collections.abc import Sequence

from koinon.errors import NonFiniteLoss
from koinon.model.stage import Stage
from koinon.optim.config import OptimConfig
from koinon.optim.update import State, clip_scale, cost_gradient, initial_state, square_norm, updated


class WholeOptimizer:
    """Steps every stage it holds; clips each by itself, as a league does. `done` counts the steps."""

    def __init__(self, config: OptimConfig, stages: Sequence[Stage]) -> None:
        self.config, self.stages, self.done = config, list(stages), 0
        self.states: list[dict[str, State]] = [
            {name: initial_state(stage.layout[name], weight) for name, weight in stage.trained().items()}
            for stage in self.stages
        ]

    def step(self, tokens: int) -> list[float]:
        """Update from the accumulated `.grad`s, sums over the step's microbatches of dJ/dΘ, and clear them.

        tokens: the step's m. Returns each stage's gradient norm before clipping. Raises NonFiniteLoss.
        """
        norms = [self._step(stage, states, tokens) for stage, states in zip(self.stages, self.states, strict=True)]
        self.done += 1
        return norms

    def _step(self, stage: Stage, states: dict[str, State], tokens: int) -> float:
        weights = stage.trained()
        gradients = {
            name: cost_gradient(stage.layout[name], weight.detach(), weight.grad, config=self.config, tokens=tokens)
            for name, weight in weights.items()
            if weight.grad is not None
        }
        norm = math.sqrt(sum(map(square_norm, gradients.values())))
        if not math.isfinite(norm):
            raise NonFiniteLoss(f"Stage {stage.index}'s gradient is not finite at step {self.done}.")
        scale = clip_scale(norm, self.config.clip, stage.config.stages)
        for name, gradient in gradients.items():
            weight = weights[name]
            weight.data, states[name] = updated(
                stage.layout[name], weight.data, gradient, states[name], config=self.config, step=self.done, scale=scale
            )
            weight.grad = None
        return norm
