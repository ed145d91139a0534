"""The run spec: everything that decides what a run computes, in one frozen value with one hash.

    name, seed      [model] shape    [optim] updates    [data] text    [train] steps    [league] workers    [link] links

Every key has a default, and `size` in [model] derives the rest of the model. A spec that contradicts itself cannot be
made, and says what to change. Imports no torch; knows nothing of nodes or money.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import sha256
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Self, TypeVar

from koinon.data.config import BYTES_VOCAB, DataConfig
from koinon.errors import Contradiction, SpecError, UnknownKey
from koinon.model.config import ModelConfig
from koinon.optim.config import OptimConfig
from koinon.run import links
from koinon.run.links import LinkConfig
from koinon.run.tables import Source, Table, assigned, check_keys, checked, merge, read_toml, table_of, to_toml
from koinon.units import RunId

C = TypeVar("C")
BPE_VOCAB = 1024
"""Vocabulary of a BPE tokenizer where none is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """What is computed, and how often it is measured and kept. Raises Contradiction."""

    steps: int = 300
    batch: int = 16
    """Sequences per step."""
    microbatch: int = 2
    """Sequences per work item, the unit of retry and credit."""
    eval_every: int = 50
    """Steps between evaluations on held-out text; 0 evaluates at the end alone."""
    eval_sequences: int = 32
    snapshot_every: int = 1
    """Steps between a worker's snapshots of its stage."""
    keep_snapshots: int = 3

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps", "batch", "microbatch", "eval_sequences", "snapshot_every", "keep_snapshots")
        _at_least(self, 0, "eval_every")
        if self.batch % self.microbatch:
            fits = max(1, self.batch // self.microbatch) * self.microbatch
            raise Contradiction(
                f"`batch` {self.batch} is no multiple of `microbatch` {self.microbatch}: work items must be equal. "
                f"Set `batch` to {fits}, or change `microbatch`."
            )

    @property
    def microbatches(self) -> int:
        """Work items per stage and step."""
        return self.batch // self.microbatch


@dataclass(frozen=True, slots=True, kw_only=True)
class LeagueConfig:
    """Who computes. Raises Contradiction."""

    replicas: int = 2
    """Workers per stage that a run starts with; more may join."""
    max_workers: int = 128
    """Beyond it, joiners wait in the queue."""
    grace_s: float = 30.0
    """How long an unreachable worker's seat is kept, and an emptied stage waits for its own step before all go back."""
    pause_s: float = 86400.0
    """How long a run waits for a stage that nobody holds any more, until it fails; 0 waits for ever."""
    in_flight: int = 16
    """Work items that one worker may hold at once. Over near links a few are enough; how many are used is measured."""
    graph_budget_mib: int = 512
    """Memory for kept autograd graphs, per worker; an item beyond it is recomputed for its backward."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "replicas", "max_workers", "in_flight")
        _at_least(self, 0, "graph_budget_mib", "grace_s", "pause_s")


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One run. Raises SpecError: Contradiction or LinkTooNarrow where its tables do not fit each other."""

    name: str = "run"
    seed: int = 0
    """What is drawn for the run on one machine. What must stay secret is drawn elsewhere."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig.from_dial(vocab=BYTES_VOCAB))
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(steps=TrainConfig().steps))
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    league: LeagueConfig = field(default_factory=LeagueConfig)
    link: LinkConfig = field(default_factory=LinkConfig)

    def __post_init__(self) -> None:
        _check_name(self)
        _check_tables(self)
        held = self.league.in_flight * self.league.replicas * self.train.microbatch * self.model.context
        links.check(
            self.link, self.model, step_tokens=self.step_tokens, held_tokens=held, replicas=self.league.replicas
        )

    @classmethod
    def load(cls, path: Path | str, *, overrides: Sequence[str] = ()) -> Self:
        """The spec in a TOML file, with `overrides` such as "train.steps=100". Raises SpecError and nothing else."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise SpecError(f"The spec {path} cannot be read: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise SpecError(f"The spec {path} is not text in UTF-8 (byte {error.start}).") from error
        return cls.parse(text, source=str(path), overrides=overrides)

    @classmethod
    def recipe(cls, name: str, *, overrides: Sequence[str] = ()) -> Self:
        """A spec that ships with koinon: one of `recipes()`. Raises SpecError."""
        try:
            check_keys([name], recipes())
        except UnknownKey as unknown:
            raise SpecError(f"There is no recipe `{name}`: there are {', '.join(recipes())}.") from unknown
        return cls.parse(_recipe_folder().joinpath(f"{name}.toml").read_text("utf-8"), source=name, overrides=overrides)

    @classmethod
    def parse(cls, text: str, *, source: str = "the spec", overrides: Sequence[str] = ()) -> Self:
        """The spec of a TOML text. Raises SpecError."""
        read = Source(source, text)
        tables = read_toml(read)
        for override in overrides:
            merge(tables, *assigned(override))
        return cls._of(tables, read)

    @classmethod
    def of(cls, **tables: Any) -> Self:
        """The same from Python: RunSpec.of(name="x", model={"size": 64}, train={"steps": 10}). Raises SpecError."""
        return cls._of({k: dict(v) if isinstance(v, Mapping) else v for k, v in tables.items()}, Source("the spec"))

    @classmethod
    def _of(cls, tables: Table, source: Source) -> Self:
        _check_elsewhere(tables)
        scalars = {key: value for key, value in tables.items() if key not in _TABLES}
        scalars = checked(cls, scalars, "", source)
        values = {
            name: checked(kind, table_of(tables, name, source), name, source, without=tuple(_ELSEWHERE.get(name, ())))
            for name, kind in _TABLES.items()
        }
        _share_vocab(values["model"], values["data"])
        train = _made(TrainConfig, values["train"], "train", source)
        optim = _made(OptimConfig, values["optim"] | {"steps": train.steps}, "optim", source)
        return cls(
            **scalars,
            model=_model(values["model"], source),
            optim=optim,
            data=_made(DataConfig, values["data"], "data", source),
            train=train,
            league=_made(LeagueConfig, values["league"], "league", source),
            link=_made(LinkConfig, values["link"], "link", source),
        )

    def to_toml(self) -> str:
        """Every value in full, nothing derived any more. `parse` of it is this spec."""
        tables = asdict(self)
        for name, keys in _ELSEWHERE.items():
            for key in keys:
                del tables[name][key]
        return to_toml(tables)

    @cached_property
    def run_id(self) -> RunId:
        """Hex sha-256 of all values as JSON with sorted keys: the name by which chain, log and nodes mean this run."""
        canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return RunId(sha256(f"koinon run 1\0{canonical}".encode()).hexdigest())

    @property
    def step_tokens(self) -> int:
        """m of J: tokens of one step."""
        return self.train.batch * self.model.context


_TABLES: dict[str, type[Any]] = {
    "model": ModelConfig,
    "optim": OptimConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "league": LeagueConfig,
    "link": LinkConfig,
}
_ELSEWHERE = {"optim": {"steps": "train.steps"}}
"""Fields that are no keys of their table, and the key that sets them."""


def recipes() -> list[str]:
    """Names of the specs that ship with koinon."""
    return sorted(file.name.removesuffix(".toml") for file in _recipe_folder().iterdir() if file.name.endswith(".toml"))


def _recipe_folder() -> Traversable:
    return resources.files("koinon").joinpath("recipes")


def _made(cls: type[C], values: Table, name: str, source: Source) -> C:
    try:
        return cls(**values)
    except Contradiction as error:
        raise Contradiction(f"{source.where(name)}in [{name}]: {error}") from error


def _model(values: Table, source: Source) -> ModelConfig:
    if values.get("size", 2) < 2:
        raise Contradiction(f"{source.where('model.size')}`model.size` is {values['size']}: it must be at least 2.")
    try:
        return ModelConfig.from_dial(**values)
    except Contradiction as error:
        raise Contradiction(f"{source.where('model')}in [model]: {error}") from error


def _share_vocab(model: Table, data: Table) -> None:
    """Model and tokenizer have one vocabulary: given at either, it holds for both."""
    usual = BPE_VOCAB if data.get("tokenizer") == "bpe" else BYTES_VOCAB
    vocab = model.get("vocab", data.get("vocab", usual))
    model.setdefault("vocab", vocab)
    data.setdefault("vocab", vocab)


def _check_elsewhere(tables: Table) -> None:
    for name, keys in _ELSEWHERE.items():
        table = tables.get(name)
        for key, home in keys.items():
            if isinstance(table, dict) and key in table:
                raise UnknownKey(f"{name}.{key}", home)


def _check_name(spec: RunSpec) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][\w. -]{0,63}", spec.name, re.ASCII):
        raise Contradiction(
            f"`name` is {spec.name!r}: use up to 64 letters, digits, spaces, dots, dashes and underscores, "
            f"the first a letter or digit."
        )
    if not 0 <= spec.seed <= 2**53:
        raise Contradiction(f"`seed` is {spec.seed}: choose a whole number from 0 to 2^53.")


def _check_tables(spec: RunSpec) -> None:
    model, data, train, league = spec.model, spec.data, spec.train, spec.league
    if spec.optim.steps != train.steps:
        raise Contradiction(f"The optimizer counts {spec.optim.steps} steps and the run {train.steps}: set one number.")
    if model.vocab != data.vocab:
        raise Contradiction(
            f"The model has `vocab` {model.vocab} and the tokenizer {data.vocab}: set one, and the other follows."
        )
    if (starting := model.stages * league.replicas) > league.max_workers:
        raise Contradiction(
            f"{model.stages} `stages` of {league.replicas} `replicas` are {starting} workers, but `max_workers` is "
            f"{league.max_workers}. Raise it, or lower one of the others."
        )
    if data.max_bytes is not None and data.max_bytes <= model.context:
        raise Contradiction(
            f"`context` {model.context} is longer than the text: `max_bytes` is {data.max_bytes}. Lower `context`, or "
            f"read more."
        )
    if train.eval_every and not data.heldout:
        raise Contradiction(
            f"`eval_every` {train.eval_every} evaluates on held-out text, and `heldout` is 0: hold some out, say 0.05, "
            f"or set `eval_every` to 0."
        )


def _at_least(config: Any, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not least <= value < float("inf"):
            raise Contradiction(f"`{name}` is {value}: it must be at least {least}.")
