"""Runs every benchmark in a process of its own and writes the page of figures.

    python -m bench                  all of them in full; rewrites docs/benchmarks.md
    python -m bench exactness ...    only these in full; the page keeps what others measured before
    python -m bench --quick [...]    a minute at most for each; writes nothing

A benchmark is a module of this folder that can be run. It reports progress on stderr and ends its stdout with one JSON
line: {"bench", "figures", "targets", "holds", "environment"} and, where it has more to say, a "text" in Markdown. One
that does not end, or ends otherwise, fails this command; a target that is missed does not. Knows nothing of what is
measured.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
MEASURED = HERE / "results" / "measured"
"""One file for each benchmark: what its last full run found, at which commit, on which day."""
HEAD = """# Benchmarks

What each benchmark measured when it was last run in full, and the command that repeats it (`make bench` runs all).
Figures are medians over repeats in which ours and the reference took turns on the same machine. A target that is missed
is shown as missed.
"""


def benchmarks() -> list[str]:
    return sorted(path.stem for path in HERE.glob("*.py") if path.stem != "__main__" and _can_run(path))


def _can_run(path: Path) -> bool:
    """Whether the module does something when it is run: the others are parts of benchmarks."""
    top = ast.parse(path.read_text(encoding="utf-8")).body
    return any(isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" for node in top)


def measure(name: str, quick: bool) -> dict[str, Any] | None:
    """One benchmark's JSON line; None when it failed, which its stderr has explained."""
    print(f"== {name}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", f"bench.{name}", *(["--quick"] if quick else [])]
    done = subprocess.run(command, cwd=HERE.parent, stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    try:
        result = json.loads(lines[-1]) if done.returncode == 0 and lines else None
    except json.JSONDecodeError:
        result = None
    if not isinstance(result, dict) or result.get("bench") != name:
        print(f"{name}: exit status {done.returncode}, no result", file=sys.stderr)
        return None
    return result


def section(result: dict[str, Any]) -> str:
    """One benchmark in Markdown: the command, commit and day, the figures against their targets, the machine."""
    rows = [
        f"| {figure} | {shown(value)} | {shown(result['targets'].get(figure, ''))} | {verdict(result, figure)} |"
        for figure, value in result["figures"].items()
    ]
    machine = "; ".join(f"{key} {shown(value)}" for key, value in result["environment"].items())
    table = "\n".join(["| figure | measured | target | holds |", "|---|---|---|---|", *rows])
    command = f"`python -m bench.{result['bench']}`, commit `{result['commit']}`, {result['day']}"
    parts = [f"## {result['bench']}", command, table, machine, result.get("text", "")]
    return "\n\n".join(part for part in parts if part) + "\n"


def verdict(result: dict[str, Any], figure: str) -> str:
    return {True: "yes", False: "**no**"}.get(result["holds"].get(figure), "")


def shown(value: Any) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
        case list():
            return ", ".join(map(shown, value))
        case dict():
            return ", ".join(f"{key} {shown(part)}" for key, part in value.items())
    return str(value).replace("|", "\\|")


def page(results: Sequence[dict[str, Any]]) -> str:
    return "\n".join([HEAD, *map(section, results)])


def kept(folder: Path) -> list[dict[str, Any]]:
    """What full runs found, in the order of the names; of benchmarks that are gone, nothing."""
    files = (folder / f"{name}.json" for name in benchmarks())
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]


def keep(folder: Path, result: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{result['bench']}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _commit() -> str:
    head = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=True
    )
    return head.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Run the benchmarks.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(benchmarks()))
    parser.add_argument("--quick", action="store_true", help="a minute at most for each")
    chosen = parser.parse_args()
    if unknown := set(chosen.names) - set(benchmarks()):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(benchmarks())}")
    ran = {"commit": _commit(), "day": datetime.now(UTC).date().isoformat()}
    results = [measure(name, chosen.quick) for name in chosen.names or benchmarks()]
    whole = [result | ran for result in results if result is not None]
    for result in whole:
        print(section(result))
        if not chosen.quick:
            keep(MEASURED, result)
    if whole and not chosen.quick:
        PAGE.write_text(page(kept(MEASURED)), encoding="utf-8")
    return 0 if len(whole) == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
