"""What all tests share: property tests draw the same examples every time and are never judged by a clock."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("koinon", derandomize=True, deadline=None)
settings.load_profile("koinon")
