"""The page of figures says what was measured, and never hides a target that was missed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench.__main__ import benchmarks, keep, kept, page, section

RESULT = {
    "bench": "straw",
    "figures": {"ratio": 0.91234567, "spread": [0.9, 0.92], "bytes": 4096},
    "targets": {"ratio": 0.95},
    "holds": {"ratio": False},
    "environment": {"cpu": "A|B", "versions": {"torch": "2.13.0"}},
    "commit": "abc123",
    "day": "2030-01-02",
}


def test_a_missed_target_is_shown_as_missed() -> None:
    assert "| ratio | 0.9123 | 0.95 | **no** |" in section(RESULT)
    assert "| ratio | 0.9123 | 0.95 | yes |" in section({**RESULT, "holds": {"ratio": True}})


def test_a_figure_without_a_target_claims_nothing() -> None:
    assert "| spread | 0.9, 0.92 |  |  |" in section(RESULT)


def test_the_page_says_where_its_figures_come_from() -> None:
    text = page([RESULT])
    assert "`python -m bench.straw`, commit `abc123`, 2030-01-02" in text
    assert r"cpu A\|B; versions torch 2.13.0" in text


def test_one_benchmark_run_anew_leaves_the_figures_of_the_others(tmp_path: Path) -> None:
    keep(tmp_path, RESULT)
    keep(tmp_path, {**RESULT, "bench": "exactness", "commit": "def456"})
    keep(tmp_path, {**RESULT, "bench": "a benchmark that is gone"})
    keep(tmp_path, {**RESULT, "figures": {"ratio": 0.97}, "holds": {"ratio": True}})
    text = page(kept(tmp_path))
    assert text.index("## exactness") < text.index("## straw")
    assert "commit `def456`" in text
    assert "| ratio | 0.97 | 0.95 | yes |" in text
    assert "gone" not in text


def test_an_unknown_benchmark_is_refused_with_the_names_there_are() -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "bench", "nonesuch"], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert all(name in done.stderr for name in benchmarks())


def test_what_can_be_run_from_the_folder_of_benchmarks_is_one() -> None:
    """A part that can be run by itself lies elsewhere, or `make bench` would take it for a benchmark."""
    root = Path(__file__).parent.parent
    for name in benchmarks():
        assert f'"{name}"' in (root / "bench" / f"{name}.py").read_text(), f"bench/{name}.py prints no result"
