"""What benchmarks share: figures with targets, turns, medians, the machine, and the one JSON line at the end.

def measure(quick: bool) -> Iterator[Figure]: ...
if __name__ == "__main__":
    sys.exit(main("exactness", measure))
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number (or list, or mapping), and the target it is held to, if it has one."""

    name: str
    value: Any
    at_most: float | None = None
    at_least: float | None = None

    @property
    def target(self) -> float | None:
        return self.at_most if self.at_most is not None else self.at_least

    @property
    def holds(self) -> bool:
        """Also false for NaN."""
        low, high = self.at_least, self.at_most
        return (high is None or self.value <= high) and (low is None or self.value >= low)


def main(name: str, measure: Callable[[bool], Iterable[Figure]]) -> int:
    """Run a benchmark as a command: progress on stderr, one JSON line on stdout. Exit status 0 whatever holds."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}")
    parser.add_argument("--quick", action="store_true", help="end within a minute on two cores")
    figures = []
    for figure in measure(parser.parse_args().quick):
        progress(f"{figure.name}: {figure.value}" + (f" (target {figure.target})" if figure.target is not None else ""))
        figures.append(figure)
    print(json.dumps(result(name, figures)), flush=True)
    return 0


def result(name: str, figures: Sequence[Figure]) -> dict[str, Any]:
    held = [figure for figure in figures if figure.target is not None]
    return {
        "bench": name,
        "figures": {figure.name: figure.value for figure in figures},
        "targets": {figure.name: figure.target for figure in held},
        "holds": {figure.name: figure.holds for figure in held},
        "environment": environment(),
    }


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def in_turns(*runs: Callable[[], float], repeats: int) -> tuple[list[float], ...]:
    """Each run's values, one turn after the other, so that a machine that slows down slows all of them alike."""
    values: tuple[list[float], ...] = tuple([] for _ in runs)
    for turn in range(repeats):
        for run, found in zip(runs, values, strict=True):
            found.append(run())
        progress(f"turn {turn + 1} of {repeats}: {', '.join(f'{found[-1]:.5g}' for found in values)}")
    return values


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float]) -> list[float]:
    """Least and greatest."""
    return [min(values), max(values)]


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Turn by turn: both sides of a ratio were measured in the same minute."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def environment() -> dict[str, Any]:
    """Machine and versions, for the page of figures."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "load": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numpy", "koinon")},
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
