"""A stage at one step as content: its frozen tensors and weights as consecutive bytes, the same on every replica.

Frozen tensors come first, so that another step's content begins with the same chunks. Nothing is copied or serialised:
weights change by being replaced, so holding on to a step's tensors is enough to go on giving them.
Knows nothing of peers or files' names.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from koinon.errors import FrameMalformed
from koinon.model.snapshot import root
from koinon.net.chunks import Entry, Manifest, manifest_of_reader

FROZEN, WEIGHTS = "frozen/", "weights/"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool,
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Content:
    """Bytes that can be read anywhere. `root` is that of the weights."""

    step: int
    root: str
    manifest: Manifest
    pieces: tuple[memoryview, ...]
    starts: tuple[int, ...]

    @classmethod
    def of(cls, step: int, frozen: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Content:
        """Hashes everything: call it in a thread that nobody waits for."""
        named = [(FROZEN + name, frozen[name]) for name in sorted(frozen)]
        named += [(WEIGHTS + name, weights[name]) for name in sorted(weights)]
        pieces, starts, entries, end = [], [], [], 0
        for name, tensor in named:
            piece = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            dtype = str(tensor.dtype).removeprefix("torch.")
            entries.append(Entry(name, dtype, tuple(tensor.shape), end, len(piece)))
            if len(piece):
                pieces.append(piece)
                starts.append(end)
            end += len(piece)
        whole = tuple(pieces), tuple(starts)
        manifest = manifest_of_reader(lambda offset, nbytes: _read(*whole, offset, nbytes), end, entries)
        return cls(step, root(weights), manifest, *whole)

    def read(self, offset: int, nbytes: int) -> bytes:
        return _read(self.pieces, self.starts, offset, nbytes)


def check(entries: Iterable[Entry], nbytes: int) -> None:
    """Raises FrameMalformed unless the entries are tensors that lie one after the other and fill `nbytes`."""
    end, names = 0, set()
    for entry in entries:
        dtype = _DTYPES.get(entry.dtype)
        known = entry.name.startswith((FROZEN, WEIGHTS)) and entry.name not in names
        if dtype is None or not known or any(size < 0 for size in entry.shape) or entry.offset != end:
            raise FrameMalformed(f"A manifest's entry {entry.name[:40]!r} is no tensor of a stage.")
        if entry.nbytes != math.prod(entry.shape) * dtype.itemsize:
            raise FrameMalformed(f"A manifest's entry {entry.name[:40]!r} is not as long as its shape says.")
        names.add(entry.name)
        end += entry.nbytes
    if end != nbytes:
        raise FrameMalformed(f"A manifest's entries take {end} bytes, its chunks {nbytes}.")


def read_tensors(path: Path, entries: Iterable[Entry]) -> dict[str, Tensor]:
    """The tensors in a file of content, by their prefixed names."""
    tensors = {}
    with path.open("rb") as file:
        for entry in entries:
            data = bytearray(file.read(entry.nbytes))
            flat = torch.frombuffer(data, dtype=_DTYPES[entry.dtype]) if data else torch.empty(0)
            tensors[entry.name] = flat.to(_DTYPES[entry.dtype]).reshape(entry.shape)
    return tensors


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def over(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Inverse of `under`."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _read(pieces: tuple[memoryview, ...], starts: tuple[int, ...], offset: int, nbytes: int) -> bytes:
    parts, index, end = [], bisect_right(starts, offset) - 1, offset + nbytes
    while 0 <= index < len(pieces) and starts[index] < end:
        start = starts[index]
        parts.append(pieces[index][max(0, offset - start) : end - start])
        index += 1
    return b"".join(parts)
