"""A run on a terminal and in a file."""

from __future__ import annotations

import io

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from koinon.cli.picture import save_picture
from koinon.cli.sampling import printable
from koinon.cli.screens import LiveScreen, PlainScreen, screen_for
from koinon.run import events as ev
from tests.cli.stories import SPEC, START, board, step, story, told

LATER = START + 100


def plain(events: list[ev.Event], now: float = START) -> list[str]:
    console = Console(file=io.StringIO(), soft_wrap=True, highlight=False, markup=False, width=20)
    with PlainScreen(SPEC, console, lambda: now) as screen:
        screen.prepare("reading", 0, 10)
        screen.prepare("reading", 10, 10)
        for event, state in told(events):
            screen.hear(event, state)
        screen.tick({})
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_a_file_gets_whole_lines_without_control_codes() -> None:
    lines = plain(story())
    assert lines[:4] == [
        "Preparing the data: reading.",
        "   0:01  All 4 workers are ready.",
        "   0:02  Held-out loss with the weights of step 0: 5.6000.",
        "   0:03  step 1 of 10, loss 5.5000",
    ]
    assert lines[-1].endswith("works again: a fresh process was ready 2.0 s after the loss.")
    assert all(char.isprintable() for line in lines for char in line)


def test_steps_come_at_most_every_two_seconds_and_the_last_one_always() -> None:
    quick = [event for n in range(10) for event in step(n, START + 3 + 0.5 * n, 5.0)]
    told_of = [line.split("step ")[1].split(" of")[0] for line in plain([*story()[:10], *quick]) if " of 10" in line]
    assert told_of == ["1", "5", "9", "10"]


def test_what_happened_before_a_resume_is_not_told_again() -> None:
    stopped = [*story(), ev.RunStopped(reason="the user stopped it", at=START + 8)]
    lines = plain([*stopped, ev.RunResumed(step=2, term=2, at=LATER), *step(2, LATER + 1, 4.5)], now=LATER - 1)
    assert lines[1:] == [
        "   0:00  The run goes on from step 2, in term 2 of its log.",
        "   0:01  step 3 of 10, loss 4.5000, 1 worker lost, 1 work item given to others, 1 resume",
    ]


def test_a_terminal_gets_the_view_and_keeps_the_last_picture() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=32, _environ={"TERM": "xterm"})
    screen = screen_for(SPEC, console)
    assert isinstance(screen, LiveScreen)
    with screen:
        for event, state in told(story()):
            screen.hear(event, state)
        screen.tick({})
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert written.count("\x1b[?1049h") == written.count("\x1b[?1049l") == 1  # into the other screen and back
    assert "works again" in written.split("\x1b[?1049l")[1]


def test_a_terminal_that_knows_no_codes_gets_lines() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    assert isinstance(screen_for(SPEC, console), PlainScreen)


def test_a_picture_needs_nothing_from_elsewhere(tmp_path) -> None:
    save_picture(board(story()), START + 8, tmp_path / "new" / "live.svg")
    svg = (tmp_path / "new" / "live.svg").read_text()
    assert svg.lstrip().startswith("<svg")
    assert "@font-face" not in svg
    assert svg.count("http") == svg.count("http://www.w3.org/2000/svg") + svg.count("https://www.textualize.io")


@given(st.text())
def test_a_sampled_text_cannot_steer_the_terminal(text: str) -> None:
    shown = printable(text)
    assert len(shown) == len(text)
    assert all(char in "\n\t" or char.isprintable() or ord(char) > 0x9F for char in shown)
    assert printable(shown) == shown
