"""The page of figures says what was measured, and never hides a target that was missed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench.__main__ import benchmarks, page, section

RESULT = {
    "bench": "straw",
    "figures": {"ratio": 0.91234567, "spread": [0.9, 0.92], "bytes": 4096},
    "targets": {"ratio": 0.95},
    "holds": {"ratio": False},
    "environment": {"cpu": "A|B", "versions": {"torch": "2.13.0"}},
}


def test_a_missed_target_is_shown_as_missed() -> None:
    assert "| ratio | 0.9123 | 0.95 | **no** |" in section(RESULT)
    assert "| ratio | 0.9123 | 0.95 | yes |" in section({**RESULT, "holds": {"ratio": True}})


def test_a_figure_without_a_target_claims_nothing() -> None:
    assert "| spread | 0.9, 0.92 |  |  |" in section(RESULT)


def test_the_page_says_where_its_figures_come_from() -> None:
    text = page([RESULT], commit="abc123", day="2030-01-02")
    assert "Commit `abc123`, 2030-01-02." in text
    assert "`python -m bench.straw`" in text
    assert r"cpu A\|B; versions torch 2.13.0" in text


def test_an_unknown_benchmark_is_refused_with_the_names_there_are() -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "bench", "nonesuch"], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert all(name in done.stderr for name in benchmarks())
