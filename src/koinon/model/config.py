"""What a model is: one frozen value with one dial, and how its layers are cut into stages.

The dial is the width. `ModelConfig.from_dial(size=512)` derives the rest by rules that the classmethod states, and any
field can be set beside it. A config that contradicts itself cannot be made. Knows no tensors and imports no torch.
Neighbours: `layout` turns a config into tensor shapes, `flops` prices it, `stage` builds it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, Literal, get_args

from koinon.errors import Contradiction, StagesDoNotDivide, UnknownKey
from koinon.model import flops

Form = Literal["stream", "writer", "dense"]
"""How a stage meets its boundary.

stream: ordinary blocks of full width inside the stage; a trained projection of what they added crosses.
writer: every write of every block but the last stage's is as narrow as the boundary (arXiv:2506.01260).
dense: the residual stream itself crosses; nothing is compressed. The reference to compare with.
"""
Codec = Literal["fp32", "bf16", "int8", "int4"]
Rounding = Literal["nearest", "stochastic"]
Reading = Literal["linear", "gated", "deep"]
WriteNorm = Literal["none", "scale", "gain"]
TableStages = Literal["every", "first"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "form": get_args(Form),
    "codec": get_args(Codec),
    "gradient_rounding": get_args(Rounding),
    "reading": get_args(Reading),
    "write_norm": get_args(WriteNorm),
    "table_stages": get_args(TableStages),
}
_AT_LEAST = {
    "size": 2, "layers": 1, "heads": 1, "kv_heads": 1, "ffn": 1, "vocab": 2, "context": 1, "stages": 1,
    "rank": 1, "table": 0, "grams": 2, "hashes": 1, "taps": 0, "fresh": 0,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A model's shape. Raises Contradiction or StagesDoNotDivide if its values cannot hold together."""

    size: int
    """d, the width of the residual stream."""
    layers: int
    heads: int
    kv_heads: int
    """Heads of keys and values; fewer than `heads` is grouped-query attention (arXiv:2305.13245)."""
    ffn: int
    vocab: int
    context: int
    """Longest sequence, in tokens."""
    stages: int
    rank: int
    """k, coefficients per token that cross a boundary. The dense form ignores it."""
    form: Form = "stream"
    codec: Codec = "int8"
    """Wire format of coefficients and of their gradients."""
    gradient_rounding: Rounding = "nearest"
    lift_std: float = 0.3
    """Standard deviation of a stage's private token table F. Larger drowns what comes in from the wire."""
    trained_lifts: bool = False
    """F and U are trained with the stage instead of staying as they were drawn."""
    table: int = 0
    """Buckets of each hashed n-gram table; 0 is none. What a stage computes from token ids costs no bytes."""
    grams: int = 2
    """Longest n-gram that has a table: 2 for bigrams, 3 for bigrams and trigrams."""
    hashes: int = 3
    """Rows of a table that are summed for one n-gram, each found by its own hash: n-grams that share one then differ in
    the others (arXiv:1709.03933). Costs lookups, no parameters and no bytes."""
    table_stages: TableStages = "every"
    taps: int = 0
    """Length of a causal depthwise convolution over what a stage derives from ids; 0 is none."""
    reading: Reading = "linear"
    """How the stream form projects onto the boundary: linearly, gated, or with a hidden layer beside the linear map."""
    fresh: int = 0
    """Coefficients that each stage writes anew, beside the `rank` ones that it adds to."""
    write_norm: WriteNorm = "none"
    """RMS norm of what a block writes: none, parameter-free, or with a gain."""
    qk_norm: bool = True
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        _check_ranges(self)
        _check_shape(self)
        _check_options(self)

    @classmethod
    def from_dial(cls, size: int = 128, **overrides: Any) -> ModelConfig:
        """The model of that width. Rules, each overridden by naming its field:

        layers 4 * round(size^0.6 / 18.4) (4 at 128, 8 at 320, 12 at 1024, 32 at 4096), but two per stage at least:
        depth inside a stage is worth more than rank; heads of 64 dimensions from a width of 512 on where they divide
        it, else of 32, else one head; grouped 4 to 1 from 2048 on; ffn 8/3 size to a multiple of 8; 4 stages; rank
        size/16, at least 4; 8 bigram buckets per unit of width, at most 8192; vocabulary 512, context 256.
        Raises UnknownKey for a field that does not exist.
        """
        known = {field.name for field in fields(cls)}
        for key in overrides:
            if key not in known:
                raise UnknownKey(key, next(iter(get_close_matches(key, known, 1)), None))
        return cls(**(_derived(size, overrides) | overrides))

    @property
    def head_dim(self) -> int:
        return self.size // self.heads

    @property
    def boundary_width(self) -> int:
        """Numbers per token that cross a boundary, in each direction."""
        return self.size if self.form == "dense" else self.rank + self.fresh

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token, boundary and direction."""
        return row_bytes(self.codec, self.boundary_width)

    def has_table(self, index: int) -> bool:
        return self.table > 0 and (self.table_stages == "every" or index == 0)

    def cuts(self) -> tuple[range, ...]:
        """The layers of each stage: consecutive, the dearest stage as cheap as it can be, by FLOPs with the head."""
        head, layer = flops.head_macs(self), flops.layer_macs(self, self.context)
        return balanced((*[layer] * (self.layers - 1), layer + head), self.stages)

    def dense(self) -> ModelConfig:
        """The uncompressed model to compare with: same blocks, tables and cuts, full-width boundaries in fp32."""
        return replace(
            self,
            form="dense",
            codec="fp32",
            gradient_rounding="nearest",
            trained_lifts=False,
            reading="linear",
            fresh=0,
        )


def row_bytes(codec: Codec, width: int) -> int:
    """Bytes of one token's row of `width` numbers: integers carry one 2-byte scale per row."""
    match codec:
        case "fp32":
            return 4 * width
        case "bf16":
            return 2 * width
        case "int8":
            return 2 + width
        case "int4":
            return 2 + (width + 1) // 2


@lru_cache(maxsize=256)
def balanced(costs: tuple[int, ...], parts: int) -> tuple[range, ...]:
    """Consecutive ranges over `costs`, none empty, whose dearest is least; among those, the least sum of squares."""
    if parts > len(costs):
        raise StagesDoNotDivide(len(costs), parts)
    until = [0, *accumulate(costs)]
    best: dict[int, tuple[int, int, list[int]]] = {0: (0, 0, [0])}  # end -> (dearest, squares, cut points)
    for part in range(1, parts + 1):
        best = {
            end: min(_joined(best[start], until[end] - until[start], end) for start in best if start < end)
            for end in range(part, len(costs) - (parts - part) + 1)
        }
    ends = best[len(costs)][2]
    return tuple(range(start, end) for start, end in pairwise(ends))


def _joined(before: tuple[int, int, list[int]], cost: int, end: int) -> tuple[int, int, list[int]]:
    dearest, squares, ends = before
    return max(dearest, cost), squares + cost * cost, [*ends, end]


def _derived(size: int, given: dict[str, Any]) -> dict[str, Any]:
    stages = given.get("stages", 4)
    fitting = [width for width in ((64, 32) if size >= 512 else (32,)) if size % width == 0]
    heads = given.get("heads", size // fitting[0] if fitting else 1)
    deep_enough = 2 * stages if isinstance(stages, int) else 1
    return {
        "size": size,
        "stages": stages,
        "layers": max(4 * max(1, round(size**0.6 / 18.4)), deep_enough),
        "heads": heads,
        "kv_heads": heads // 4 if size >= 2048 and heads % 4 == 0 else heads,
        "ffn": max(8, 8 * round(size / 3)),
        "rank": max(4, size // 16),
        "table": min(8 * size, 8192),
        "vocab": 512,
        "context": 256,
    }


def _check_ranges(config: ModelConfig) -> None:
    for name, least in _AT_LEAST.items():
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise Contradiction(f"`{name}` is {value!r}: it must be a whole number of at least {least}.")
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            raise Contradiction(f"`{name}` is {getattr(config, name)!r}: choose one of {', '.join(choices)}.")
    for name in ("lift_std", "rope_base"):
        value = getattr(config, name)
        if not 0 < value < float("inf"):
            raise Contradiction(f"`{name}` is {value!r}: it must be a positive number.")


def _check_shape(config: ModelConfig) -> None:
    if config.size % config.heads:
        raise Contradiction(f"`size` {config.size} is no multiple of `heads` {config.heads}: change one of them.")
    if config.head_dim % 2:
        raise Contradiction(
            f"Each head would have {config.head_dim} dimensions, and rotary positions turn pairs: "
            f"choose `heads` so that `size` / `heads` is even."
        )
    if config.heads % config.kv_heads:
        raise Contradiction(
            f"`heads` {config.heads} is no multiple of `kv_heads` {config.kv_heads}: change one of them."
        )
    if config.stages > config.layers:
        raise StagesDoNotDivide(config.layers, config.stages)
    if config.form != "dense" and config.rank + config.fresh > config.size:
        raise Contradiction(
            f"`rank` + `fresh` is {config.rank + config.fresh}, more than `size` {config.size}: "
            f'lower them, or set `form` to "dense" to send the whole stream.'
        )


def _check_options(config: ModelConfig) -> None:
    if config.form == "writer" and config.write_norm == "gain":
        raise Contradiction(
            "A gain after a narrow write leaves the subspace that the boundary carries: "
            '`form` "writer" allows `write_norm` "none" or "scale".'
        )
    if config.form != "stream" and (config.reading != "linear" or config.fresh):
        raise Contradiction(f'`reading` and `fresh` shape the stream\'s projection; `form` "{config.form}" has none.')
    if config.form == "dense" and config.trained_lifts:
        raise Contradiction('`form` "dense" has no lifts to train: unset `trained_lifts`.')
    if config.grams > 2 and not config.table:
        raise Contradiction(f"`grams` {config.grams} needs `table` buckets: set `table`, or leave `grams` at 2.")
    if config.gradient_rounding == "stochastic" and config.codec not in ("int8", "int4"):
        raise Contradiction('Stochastic `gradient_rounding` needs an integer `codec`: "int8" or "int4".')
    if config.taps == 1 or config.taps > config.context:
        raise Contradiction(f"`taps` is {config.taps}: choose 0, or 2 up to the context of {config.context}.")
