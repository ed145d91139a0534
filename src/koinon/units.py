"""Value objects that everything above them speaks: ids and physical quantities.

Mixing two quantities is a type error, so a number of bytes never becomes a number of seconds. Fields that travel
(events, frames) are plain integers named after their unit; these classes are for arithmetic.
Knows nothing of models, networks or money.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

PeerId = NewType("PeerId", str)
"""A node's Ed25519 public key as 64 lower-case hexadecimal digits: its address and its name."""
Account = NewType("Account", str)
"""Who owns a node. Locally a free-form name; on a chain an EVM address."""
RunId = NewType("RunId", str)
"""Hex sha-256 of the run spec."""
Step = NewType("Step", int)
"""Number of an optimizer step, from 0. `weights at step t` are those that step t's items use."""
StageIndex = NewType("StageIndex", int)
"""0 embeds, S-1 computes the loss."""


@dataclass(frozen=True, order=True, slots=True)
class Seconds:
    value: float

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.value + other.value)

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(self.value * factor)

    @classmethod
    def ms(cls, milliseconds: float) -> Seconds:
        return cls(milliseconds / 1e3)

    def __str__(self) -> str:
        v = self.value
        if v < 1:
            return f"{v * 1e3:.0f} ms"
        if v < 90:
            return f"{v:.1f} s"
        if v < 5400:
            return f"{v / 60:.1f} min"
        return f"{v / 3600:.1f} h"


@dataclass(frozen=True, order=True, slots=True)
class BitsPerSecond:
    value: float

    @classmethod
    def mbit(cls, megabits: float) -> BitsPerSecond:
        return cls(megabits * 1e6)


@dataclass(frozen=True, order=True, slots=True)
class Bytes:
    count: int

    @classmethod
    def kib(cls, n: float) -> Bytes:
        return cls(int(n * 1024))

    @classmethod
    def mib(cls, n: float) -> Bytes:
        return cls(int(n * 1024**2))

    @classmethod
    def gib(cls, n: float) -> Bytes:
        return cls(int(n * 1024**3))

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.count + other.count)

    def over(self, link: BitsPerSecond) -> Seconds:
        """Time that this many bytes take on a link of that rate."""
        return Seconds(8 * self.count / link.value)

    def __str__(self) -> str:
        size = float(self.count)
        for unit in ("B", "KiB", "MiB", "GiB"):
            if size < 1024:
                return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
            size /= 1024
        return f"{size:.1f} TiB"


@dataclass(frozen=True, order=True, slots=True)
class Flops:
    """Floating-point operations; a multiply-add counts two."""

    count: int

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.count + other.count)

    def __mul__(self, times: int) -> Flops:
        return Flops(self.count * times)

    def __str__(self) -> str:
        size = float(self.count)
        for unit in ("", "k", "M", "G", "T", "P", "E"):
            if size < 1000:
                return f"{size:.3g} {unit}FLOP"
            size /= 1000
        return f"{size:.3g} ZFLOP"
