"""Rates, times and shares as people write them: "80mbit", "50ms", "1%"."""

from __future__ import annotations

import math
import re
from typing import Final

UNITS: Final = {"gbit": 1e9, "mbit": 1e6, "kbit": 1e3, "bit": 1.0, "ms": 1e-3, "us": 1e-6, "s": 1.0, "%": 0.01, "": 1.0}
UNLIMITED: Final = "unlimited"
_FORM: Final = re.compile(r"(?P<number>\d+(?:\.\d*)?|\.\d+)(?P<unit>[a-z%]*)")


def quantity(given: str | float) -> float:
    """In bit/s, seconds or as a share; a bare number is meant so already. Raises ValueError."""
    if isinstance(given, int | float):
        return _positive(float(given), given)
    if given == UNLIMITED:
        return math.inf
    found = _FORM.fullmatch(given.strip().lower())
    if found is None or found["unit"] not in UNITS:
        known = ", ".join(unit for unit in UNITS if unit)
        raise ValueError(f"{given!r} is no quantity: write a number and one of {known}, or {UNLIMITED!r}.")
    return float(found["number"]) * UNITS[found["unit"]]


def _positive(value: float, given: str | float) -> float:
    if not value >= 0:
        raise ValueError(f"{given!r} is no quantity: it must be at least 0.")
    return value
