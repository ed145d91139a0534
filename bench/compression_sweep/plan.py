"""What is compared: the candidate, its uncompressed twin, what tuning tried, and other people's wires.

The twin is the same model with full-width boundaries in fp32: same blocks, same local tables, trained parameters within
0.5% (the feed-forward width makes up for what differs). Both sides' rates were searched on the same values.
Knows what is to be measured, not what came out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from bench.compression_sweep.corpora import CORPORA, Corpus
from bench.compression_sweep.rows import Variant
from bench.compression_sweep.wires import WIRES
from koinon.model.config import ModelConfig
from koinon.model.layout import match_parameters, trained_count

BATCH: Final = 8
"""Sequences per step, all in one microbatch."""
HORIZONS: Final = (128, 384, 1280)
"""Steps of 1,024 tokens. Tuning and comparisons stop at the second."""
SEEDS: Final = (0, 1, 2)
NARROW: Final[dict[str, Any]] = {"rank": 5, "codec": "int8"}
"""7 bytes with the row's scale, 73 times fewer than 128 fp32 numbers: with ids and headers it is still over 64."""
RICH: Final[dict[str, Any]] = {"grams": 3, "taps": 4, "table": 4096}


class Rates(NamedTuple):
    muon: float
    adamw: float


TUNED: Final = Rates(1e-2, 4e-3)


@dataclass(frozen=True, slots=True)
class Job:
    """One training. seeds and horizons are those that the plan wants; a resumed sweep drops what it has."""

    variant: Variant
    corpus: Corpus
    seed: int
    horizons: Sequence[int]


def _config(**model: Any) -> ModelConfig:
    base: dict[str, Any] = {"layers": 8, "stages": 4, "vocab": 256, "context": 128, "table": 1024}
    return ModelConfig.from_dial(128, **{**base, **model})


def narrow(name: str, *, rates: Rates = TUNED, **model: Any) -> Variant:
    """A compressed model, with as many trained parameters as its twin."""
    config = _config(**{**NARROW, **model})
    return Variant(
        name=name,
        model=match_parameters(config, trained_count(config.dense())),
        muon_lr=rates.muon,
        adamw_lr=rates.adamw,
    )


def dense(name: str, *, wire: str = "", rates: Rates = TUNED, **model: Any) -> Variant:
    """The twin of a model with these settings; those of its boundaries are dropped, so that models share their twin.

    It hashes each n-gram once: the tables of all its stages meet in one stream, where more hashes are only noise (1.305
    against 1.288 nats after 1.31M tokens of code).
    """
    kept = {"hashes": 1} | {setting: value for setting, value in model.items() if setting not in _BOUNDARY}
    return Variant(name=name, model=_config(**kept).dense(), wire=wire, muon_lr=rates.muon, adamw_lr=rates.adamw)


_BOUNDARY = {"rank", "codec", "trained_lifts", "reading", "fresh"}

CANDIDATE: Final = narrow("candidate")
TWIN: Final = dense("twin")


SEARCHED: Final = {"lower rates": Rates(7e-3, 3e-3), "higher rates": Rates(1.5e-2, 8e-3)}


def compared() -> list[Variant]:
    """The uncompressed stream over other wires, and the form of arXiv:2506.01260, in which every write is narrow."""
    return [*(dense(name, wire=name) for name in WIRES), narrow("narrow writes", form="writer")]


def other_rates() -> list[Variant]:
    """Both sides at the rates that lost."""
    sides = [(narrow(f"candidate, {name}", rates=r), dense(f"twin, {name}", rates=r)) for name, r in SEARCHED.items()]
    return [variant for pair in sides for variant in pair]


def tried() -> list[tuple[Variant, Variant]]:
    """Changes to the candidate, each with the twin that has its tables and cuts."""
    changes: dict[str, dict[str, Any]] = {
        # what crosses: rank, bits
        "k = 3": {"rank": 3},
        "k = 8": {"rank": 8},
        "k = 16": {"rank": 16},
        "k = 5 in fp32": {"codec": "fp32"},
        "k = 10 in int4": {"rank": 10, "codec": "int4"},
        # how it is read and lifted
        "deep exit": {"reading": "deep"},
        "gated exit": {"reading": "gated"},
        "3 carried and 2 fresh": {"rank": 3, "fresh": 2},
        "trained lifts": {"trained_lifts": True},
        # layers per stage
        "2 stages of 4 layers": {"stages": 2, "table": 2048},
        "8 stages of 1 layer": {"stages": 8, "table": 512},
        # what a stage computes from ids alone
        "no tables": {"table": 0},
        "one hash": {"hashes": 1},
        "two hashes": {"hashes": 2},
        "4 taps": {"taps": 4},
        "trigrams, 4 taps, tables of 4096": RICH,
    }
    unhashed = {name: {k: v for k, v in change.items() if k != "hashes"} for name, change in changes.items()}
    return [(narrow(name, **change), dense(f"twin: {name}", **unhashed[name])) for name, change in changes.items()]


def jobs() -> Iterator[Job]:
    """In the order of their worth, for sweeps that are cut short."""
    for seed in SEEDS:
        for corpus in CORPORA:
            for variant in (CANDIDATE, TWIN):
                yield Job(variant, corpus, seed, HORIZONS)
        if seed == SEEDS[0]:
            for variant in other_rates():
                yield Job(variant, "code", 0, HORIZONS[:1])
    yield from _searched()


def _searched() -> Iterator[Job]:
    pairs = [variant for pair in tried() for variant in pair if variant.model != TWIN.model]
    once = {variant.digest(BATCH): variant for variant in (*compared(), *pairs)}  # some changes share a twin
    for variant in once.values():
        yield Job(variant, "code", 0, HORIZONS[:2])


def quick() -> list[Job]:
    """One point."""
    return [Job(variant, "code", 0, (40,)) for variant in (CANDIDATE, TWIN, dense("top-2", wire="top-2"))]


def bytes_of(variant: Variant, rows: int) -> float:
    """Bytes per token, boundary and direction, in microbatches of that many tokens."""
    if variant.wire:
        return WIRES[variant.wire].bytes_per_token(variant.model.size, rows)
    return float(variant.model.bytes_per_token)


def shown(config: ModelConfig) -> dict[str, Any]:
    """What a reader of the rows wants to know of a model."""
    fields = ("form", "rank", "fresh", "codec", "lift_std", "trained_lifts", "reading")
    common = ("size", "layers", "stages", "ffn", "table", "grams", "hashes", "table_stages", "taps")
    wanted = common if config.form == "dense" else (*common, *fields[1:])
    return {"form": config.form} | {name: getattr(config, name) for name in wanted}
