"""Who keeps a stage's snapshots, and gives them back when every replica is gone.

A snapshot is one safetensors file per step: frozen tensors, weights, and the optimizer state of the tensors that its
member owns or seconds. `OwnDisk` keeps them in the worker's own directory. Another keeper, such as members of other
stages who hold them encrypted, takes its place behind `Custody`. Knows nothing of engines or peers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import msgspec
from torch import Tensor

from koinon.errors import SnapshotCorrupt
from koinon.model.snapshot import load, metadata, root, save
from koinon.nodes.content import WEIGHTS, under

log = logging.getLogger(__name__)


class Label(msgspec.Struct, frozen=True):
    """What a snapshot says of itself. `root` is that of the weights."""

    stage: int
    step: int
    root: str


class Custody(Protocol):
    """One member's snapshots. Each is whole or not there."""

    def labels(self) -> list[Label]:
        """What can be restored, as far as labels tell, newest first."""

    def verified(self, labels: Mapping[int, str]) -> list[Label]:
        """Those of the given step -> root whose weights really hash so. Reads everything: not for an event loop."""

    async def restore(self, step: int) -> Path:
        """Bring a step's snapshot to this disk; what lies there is checked by whoever loads it."""

    def keep(self, label: Label, tensors: Mapping[str, Tensor]) -> None:
        """Durable when it returns. Raises DiskFull. In the compute thread."""

    def release(self, upto: int, kept: int) -> None:
        """Of the snapshots up to a step only the newest `kept` are needed; later ones all are."""

    def refuse(self, path: Path) -> None:
        """It cannot be used: never offer it again, but leave it for whoever wants to know why."""


class OwnDisk:
    """In a directory of this machine."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def labels(self) -> list[Label]:
        return list(snapshots(self._directory).values())

    def verified(self, labels: Mapping[int, str]) -> list[Label]:
        found = snapshots(self._directory).items()
        return [label for path, label in found if labels.get(label.step) == label.root and verified(path, label.root)]

    async def restore(self, step: int) -> Path:
        return snapshot_path(self._directory, step)

    def keep(self, label: Label, tensors: Mapping[str, Tensor]) -> None:
        said = {key: str(value) for key, value in msgspec.to_builtins(label).items()}
        save(snapshot_path(self._directory, label.step), tensors, said)

    def release(self, upto: int, kept: int) -> None:
        last = snapshot_path(self._directory, upto)
        for path in [path for path in sorted(self._directory.glob("step-*.safetensors")) if path <= last][:-kept]:
            path.unlink(missing_ok=True)

    def refuse(self, path: Path) -> None:
        path.rename(path.with_suffix(".damaged"))


def snapshot_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}.safetensors"


def snapshots(directory: Path) -> dict[Path, Label]:
    """Readable snapshots of a worker's directory, newest first. Unreadable ones are passed over with a warning."""
    found: dict[Path, Label] = {}
    for path in sorted(directory.glob("step-*.safetensors"), reverse=True):
        try:
            found[path] = msgspec.convert(metadata(path), Label, strict=False)
        except (SnapshotCorrupt, msgspec.ValidationError) as error:
            log.warning("%s cannot be used: %s", path, error)
    return found


def verified(path: Path, expected: str) -> bool:
    """Whether a snapshot's weights really hash to `expected`: its label alone proves nothing."""
    try:
        tensors, _ = load(path)
    except SnapshotCorrupt:
        return False
    return root(under(tensors, WEIGHTS)) == expected
