"""The live view fits the terminal it is drawn for, and says with words what it says with colours."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from koinon.cli.board import Board
from koinon.cli.view import SEATS, Preparation, clock, render
from koinon.nodes.messages import Telemetry
from koinon.run import events as ev
from koinon.run.events import Member
from koinon.run.spec import RunSpec
from koinon.run.state import SeatStatus
from tests.cli.stories import SPEC, START, board, seated, story

NOW = START + 8
STORY = board(story()).measured({Member(0): Telemetry(boundary_bytes=3400, boundary_tokens=100)})
LARGE = RunSpec.of(model={"size": 32, "stages": 8, "layers": 8, "context": 32}, league={"replicas": 4})


def drawn(shown: Board, width: int, height: int, preparing: Preparation | None = None) -> list[str]:
    console = Console(width=width, height=height, file=io.StringIO())
    console.print(render(shown, NOW, width, height, preparing))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@settings(max_examples=60)
@given(st.integers(60, 200), st.integers(16, 60), st.sampled_from([Board(SPEC), STORY]))
def test_the_view_fits_its_terminal(width: int, height: int, shown: Board) -> None:
    lines = drawn(shown, width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width


@settings(max_examples=30)
@given(st.integers(60, 200), st.integers(24, 60))
def test_a_larger_league_fits_too(width: int, height: int) -> None:
    assert len(drawn(Board(LARGE), width, height)) <= height


@pytest.mark.parametrize("size", [(110, 32), (80, 24)])
def test_everything_of_note_is_there(size: tuple[int, int]) -> None:
    text = "\n".join(drawn(STORY, *size))
    for part in (
        "story", "training", "step 2 of 10", "20%", "5.000", "5.600", "tok/s", "tokens/s", "34.0 bytes", "4 x less",
        "1 worker lost", "1 work item given to others", "works again", "stage 1", "✕",
    ):  # fmt: skip
        assert part in text


def test_a_seat_says_its_status_in_a_word_and_for_how_long() -> None:
    gone = board([*story()[:-2]])
    rows = [line for line in drawn(gone, 110, 32) if "stage 1" in line]
    assert f"{SeatStatus.LEFT} 0:03" in rows[0]
    fetching = board([*story()[:-1]])
    assert f"{SeatStatus.SYNCING} 0:01 ↻1" in next(line for line in drawn(fetching, 110, 32) if "stage 1" in line)


def test_before_the_first_step_it_says_what_it_waits_for() -> None:
    half = Preparation("reading", 1024 * 1024, 2 * 1024 * 1024)
    assert "reading: 1.0 MiB of 2.0 MiB" in drawn(Board(SPEC), 100, 30, half)[1]
    assert "starting: 1 of 4 workers are ready" in drawn(board(story()[:3]), 100, 30)[1]


def test_a_finished_run_promises_no_more_time() -> None:
    over = board([*story(), ev.RunCompleted(step=10, at=START + 9)])
    assert "left" not in drawn(over, 100, 30)[1]
    assert "complete" in drawn(over, 100, 30)[0]


@pytest.mark.parametrize(("seconds", "shown"), [(-1, "0:00"), (7.9, "0:07"), (754, "12:34"), (3723, "1:02:03")])
def test_a_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def test_a_pause_is_told_once_and_shown_until_it_ends() -> None:
    events = [*story()[:-4], *(ev.SeatLeft(member=Member(m), reason="gone", at=START + 5) for m in (1, 3))]
    paused = board(events)
    assert [note.text for note in paused.notes if "Paused" in note.text] == [
        "Paused: nobody holds stage 1 at step 2 any more. Everything is kept; it goes on when a worker that held the "
        "stage comes back."
    ]
    assert "paused for 0:03: nobody has stage 1 at step 2" in "\n".join(drawn(paused, 120, 30))
    events += [*seated(4, 1, 0, START + 6)[:1], ev.SeatReady(member=Member(4), step=2, root="r1", at=START + 7)]
    assert "paused" not in "\n".join(drawn(board(events), 120, 30))


@pytest.mark.parametrize("status", SeatStatus)
def test_every_status_of_a_seat_has_a_sign(status: SeatStatus) -> None:
    assert status.value in SEATS
