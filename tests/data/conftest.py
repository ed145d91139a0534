"""Small corpora in a folder of their own, and the data that is prepared from them."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty text files; number i repeats its own letter, so every token tells which document it came from."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number:02d}.txt").write_text(chr(0x30 + number) * (200 + 7 * number), encoding="utf-8")
    return texts
