"""The live view as an SVG picture, for pages. Knows nothing of who asks for one."""

from __future__ import annotations

import io
import re
from pathlib import Path

from rich.console import Console

from koinon.cli.board import Board
from koinon.cli.view import render

WIDTH, HEIGHT = 110, 30


def save_picture(board: Board, now: float, path: Path) -> None:
    """Write what a terminal of WIDTH x HEIGHT characters shows. The file refers to nothing outside itself."""
    console = Console(
        record=True, width=WIDTH, height=HEIGHT, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    console.print(render(board, now, WIDTH, HEIGHT))
    svg = console.export_svg(title=f"koinon {board.spec.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    # rich names a web font, which a page that shows the picture would not load, or would load from a stranger.
    path.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL), encoding="utf-8")
