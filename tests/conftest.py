"""What all tests share: property tests draw the same examples every time and are never judged by a clock."""

from __future__ import annotations

import os

# Before anything imports torch: its threads wait by spinning, and on two cores that made a league of tests 7x slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

settings.register_profile("koinon", derandomize=True, deadline=None)
settings.load_profile("koinon")
