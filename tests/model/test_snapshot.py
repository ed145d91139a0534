"""Snapshots are whole or absent, damage is named, and a root sees every bit and nothing else."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from koinon.errors import DiskFull, SnapshotCorrupt
from koinon.model.snapshot import load, metadata, root, save


def tensors() -> dict[str, Tensor]:
    return {
        "a": torch.arange(6, dtype=torch.float32).view(2, 3),
        "b": torch.tensor(3, dtype=torch.int64),
        "c": torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).T,
        "d": torch.ones(3, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 2),
    }


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    save(tmp_path / "s", tensors(), {"step": "7"})
    loaded, said = load(tmp_path / "s")
    assert root(loaded) == root(tensors())
    assert said == metadata(tmp_path / "s") == {"step": "7"}
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_a_full_disk_leaves_the_snapshot_before_intact(tmp_path: Path) -> None:
    save(tmp_path / "s", tensors(), {"step": "1"})
    with files_of_at_most(10_000), pytest.raises(DiskFull, match="free some"):
        save(tmp_path / "s", {"big": torch.zeros(100_000)}, {"step": "2"})
    assert load(tmp_path / "s")[1] == {"step": "1"}
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_a_shortened_file_is_corrupt(tmp_path: Path, keep: int) -> None:
    save(tmp_path / "s", tensors(), {})
    data = (tmp_path / "s").read_bytes()
    (tmp_path / "s").write_bytes(data[:keep])
    with pytest.raises(SnapshotCorrupt, match="another replica"):
        load(tmp_path / "s")
    with pytest.raises(SnapshotCorrupt):
        metadata(tmp_path / "s")


def test_a_flipped_bit_anywhere_is_found_on_loading(tmp_path: Path) -> None:
    """In weights the log's root would tell; nothing else vouches for momentum and for what is frozen."""
    save(tmp_path / "s", tensors(), {"step": "7"})
    whole = (tmp_path / "s").read_bytes()
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 1
        (tmp_path / "s").write_bytes(data)
        with pytest.raises(SnapshotCorrupt, match="damaged"):
            load(tmp_path / "s")


def test_a_root_sees_names_types_shapes_and_signs_but_neither_order_nor_strides() -> None:
    one = tensors()
    assert root(one) == root(dict(reversed(one.items())))
    assert root(one) == root({n: t.contiguous() for n, t in one.items()})
    for name, other in {
        "a": one["a"].view(3, 2),
        "b": one["b"].int(),
        "c": -one["c"],
        "d": torch.ones(3, dtype=torch.float16),
    }.items():
        assert root(one) != root(one | {name: other}), name
    assert root({"x": torch.tensor([0.0])}) != root({"x": torch.tensor([-0.0])})
    assert root({"x": one["a"], "y": one["b"]}) != root({"y": one["a"], "x": one["b"]})
