"""Results as they come: one JSON object per line, one line per horizon that a training has reached.

A row belongs to a variant by the digest of everything that decides the number, so a changed setting is measured anew
and nothing is measured twice. Knows no tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from koinon.model.config import ModelConfig
from koinon.model.layout import layout

_OFF = (0, False, "none", "linear", "nearest")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One side of a comparison: a model, its rates, and what its boundaries do if not what the model says."""

    name: str
    model: ModelConfig
    muon_lr: float
    adamw_lr: float
    wire: str = ""

    def digest(self, batch: int) -> str:
        """Of what decides the result beside corpus, seed and horizon; the name does not. Options that are off are left
        out, so that a model that learns a new option keeps its old rows. How tensors start and are updated counts too:
        a model in which that changes is measured anew."""
        on = {name: value for name, value in asdict(self.model).items() if value not in _OFF}
        tensors = [list(layout(self.model, index).items()) for index in range(self.model.stages)]
        decides = [on, repr(tensors), self.muon_lr, self.adamw_lr, self.wire, batch]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A result. steps: the horizon; loss: held-out, nats per token; bytes: per token, boundary and direction."""

    variant: str
    digest: str
    corpus: str
    seed: int
    steps: int
    tokens: int
    loss: float
    bytes: float
    parameters: int
    muon_lr: float
    adamw_lr: float
    model: dict[str, Any]
    cpu_seconds: float
    commit: str
    cpu: str

    @property
    def place(self) -> tuple[str, int, int]:
        """What two rows must share to be compared."""
        return self.corpus, self.seed, self.steps


class Rows:
    """The file of results, and its rows in memory. Appends are whole lines, so a crash loses at most the last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows = list(_read(path)) if path.exists() else []

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def add(self, row: Row) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(row)) + "\n")
        self._rows.append(row)

    def of(self, digest: str) -> dict[tuple[str, int, int], Row]:
        """By place; where one was measured more than once, the last counts."""
        return {row.place: row for row in self._rows if row.digest == digest}

    def missing(self, digest: str, corpus: str, seed: int, horizons: Iterable[int]) -> list[int]:
        have = self.of(digest)
        return [steps for steps in horizons if (corpus, seed, steps) not in have]


@dataclass(frozen=True, slots=True)
class Gap:
    """How much more a variant's loss is than the reference's, as shares of the reference's, one per seed."""

    corpus: str
    steps: int
    shares: tuple[float, ...]
    losses: tuple[float, float]
    """Mean losses: the variant's, the reference's, over the same seeds."""

    @property
    def mean(self) -> float:
        return sum(self.shares) / len(self.shares)


def gaps(rows: Rows, variant: str, reference: str) -> list[Gap]:
    """Digest against digest, seed by seed: one gap for each corpus and horizon that both sides have reached."""
    ours, theirs = rows.of(variant), rows.of(reference)
    groups: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for place in sorted(ours.keys() & theirs.keys()):
        corpus, _, steps = place
        groups.setdefault((corpus, steps), []).append((ours[place].loss, theirs[place].loss))
    return [_gap(corpus, steps, pairs) for (corpus, steps), pairs in sorted(groups.items())]


def _gap(corpus: str, steps: int, pairs: Sequence[tuple[float, float]]) -> Gap:
    shares = tuple(loss / reference - 1 for loss, reference in pairs)
    loss, reference = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
    return Gap(corpus, steps, shares, (loss, reference))


def _read(path: Path) -> Iterator[Row]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield Row(**json.loads(line))
        except json.JSONDecodeError:
            continue  # the line at which a machine went down
