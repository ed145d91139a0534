"""The links that a run expects, and whether its boundaries fit through them. Pure arithmetic.

Counts coefficients, their gradients and round trips; not the reduce among replicas, whose share depends on its codec.
"""

from __future__ import annotations

from dataclasses import dataclass

from koinon.errors import Contradiction, LinkTooNarrow
from koinon.model.config import ModelConfig
from koinon.units import BitsPerSecond, Bytes, Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkConfig:
    """What providers' links are expected to carry; what is left out is not checked. Raises Contradiction."""

    rate_mbit: float | None = None
    """Of one worker's uplink."""
    rtt_ms: float | None = None
    """Between workers of neighbouring stages."""
    tokens_per_second: float | None = None
    """The speed that the run as a whole should reach."""

    def __post_init__(self) -> None:
        for name in ("rate_mbit", "rtt_ms", "tokens_per_second"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise Contradiction(f"`{name}` is {value}: it must be above 0, or left out.")


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one worker in the middle of the pipeline sends, per token of the run."""

    bytes_per_token: int
    """One boundary, one direction."""
    directions: int
    """Coefficients to the stage after and gradients to the stage before; with two stages, one of them."""
    replicas: int

    def rate(self, tokens_per_second: float) -> BitsPerSecond:
        """Of one replica, which carries its share of the stage's tokens."""
        return BitsPerSecond(8 * self.bytes_per_token * self.directions * tokens_per_second / self.replicas)


def traffic(model: ModelConfig, replicas: int) -> Traffic:
    return Traffic(model.bytes_per_token, min(2, model.stages - 1), replicas)


def check(link: LinkConfig, model: ModelConfig, *, step_tokens: int, held_tokens: int, replicas: int) -> None:
    """Raises LinkTooNarrow if the declared speed needs more than the declared links carry.

    step_tokens: of one step. held_tokens: the most that can be under way at once.
    """
    if link.tokens_per_second is None or model.stages == 1:
        return
    if link.rate_mbit is not None:
        _check_rate(BitsPerSecond.mbit(link.rate_mbit), link.tokens_per_second, model, step_tokens, replicas)
    if link.rtt_ms is not None:
        _check_latency(Seconds.ms(link.rtt_ms), link.tokens_per_second, model, min(step_tokens, held_tokens))


def _check_rate(rate: BitsPerSecond, speed: float, model: ModelConfig, step_tokens: int, replicas: int) -> None:
    sent = traffic(model, replicas)
    if (needed := sent.rate(speed)) <= rate:
        return
    fits = int(rate.value * sent.replicas / (8 * sent.directions * speed))
    raise LinkTooNarrow(
        f"A boundary of {model.boundary_width} coefficients in {model.codec} takes {sent.bytes_per_token} bytes per "
        f"token and direction, {Bytes(step_tokens * sent.bytes_per_token)} per step. At `tokens_per_second` {speed:g} "
        f"each of {replicas} replicas sends {needed.value / 1e6:.3g} Mbit/s; `rate_mbit` is {rate.value / 1e6:g}, "
        f"enough for {fits} bytes per token and direction, or for {speed * rate.value / needed.value:.0f} tokens per "
        f"second. Lower `rank`, choose a smaller `codec`, raise `replicas`, or expect less of the links."
    )


def _check_latency(rtt: Seconds, speed: float, model: ModelConfig, held_tokens: int) -> None:
    on_the_way = rtt * (model.stages - 1)  # every boundary is crossed once down and once up
    if speed * on_the_way.value <= held_tokens:
        return
    raise LinkTooNarrow(
        f"A microbatch spends {on_the_way} on links (`rtt_ms` at {model.stages - 1} boundaries), and at most "
        f"{held_tokens} tokens are under way at once: {held_tokens / on_the_way.value:.0f} tokens per second at best, "
        f"and `tokens_per_second` is {speed:g}. Raise `batch` or `in_flight`, or use fewer `stages`."
    )
