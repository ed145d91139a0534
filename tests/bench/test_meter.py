"""The meter counts the tree that it was asked about: nothing beside it, and nothing lost when a child ends."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bench.meter import TICKS, Reading, Stat, below, read_tree

LINE = "4711 (a (very) odd) name) S 42 1 1 0 -1 4194560 9 9 0 0 30 12 5 3 20 0 1 0"
SPIN = "import time\nwhile time.process_time() < 0.3: pass"


def test_a_name_with_brackets_and_blanks_does_not_shift_the_fields() -> None:
    assert Stat.parse(LINE) == Stat(parent=42, ticks=30 + 12 + 5 + 3)


def test_a_tree_is_a_process_and_all_its_descendants_and_nothing_beside() -> None:
    parents = {1: 0, 10: 1, 11: 10, 12: 11, 20: 1, 21: 20}
    assert below(10, parents) == {10, 11, 12}
    assert below(99, parents) == set()


def test_a_difference_of_readings_is_what_was_used_in_between() -> None:
    spent = Reading(10.0, 4.0) - Reading(7.5, 1.0)
    assert (spent.wall, spent.cpu) == (2.5, 3.0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_the_work_of_a_child_that_has_ended_still_counts() -> None:
    before = read_tree(os.getpid())
    subprocess.run([sys.executable, "-c", SPIN], check=True)
    assert (read_tree(os.getpid()) - before).cpu >= 0.3 - 2 / TICKS
