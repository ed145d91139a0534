"""The board tells a run as it was: speeds, losses, what was absorbed and how fast."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koinon.cli.board import NOTES_KEPT, Board
from koinon.cli.sentences import Tone
from koinon.nodes.messages import Telemetry
from koinon.run import events as ev
from koinon.run.events import Member
from tests.cli.stories import SPEC, START, TOKENS, board, everyone, opened, seated, step, story, told


def texts(shown: Board) -> list[str]:
    return [note.text for note in shown.notes]


def test_the_arrival_of_the_first_workers_is_told_once() -> None:
    assert texts(board([opened(), *everyone()])) == ["All 4 workers are ready."]
    assert texts(board([opened(), *everyone()[:-1]])) == []


def test_speeds_follow_from_what_was_committed() -> None:
    shown = board(story()[:-4])
    now = START + 4
    assert shown.tokens_per_second(now) == pytest.approx(TOKENS)
    assert [[cell.tokens_per_second for cell in row] for row in shown.grid(now)] == [[TOKENS / 2] * 2] * 2
    assert shown.seconds_left(now) == pytest.approx(8.0)


def test_a_killed_worker_is_missed_told_of_and_replaced() -> None:
    events = story()
    after_loss = board(events[:-2])
    assert after_loss.grid(START + 6)[1][0].word == "left"
    assert after_loss.losses_at == (2,)
    shown = board(events)
    cell = shown.grid(START + 7)[1][0]
    assert (cell.word, cell.replaced) == ("ready", 1)
    assert shown.recoveries == (2.0,)
    assert texts(shown)[-3:] == [
        "Stage 1, seat 0 is gone: its process was killed by SIGKILL.",
        "1 work item of step 2 goes from stage 1, seat 0 to others.",
        "Stage 1, seat 0 works again: a fresh process was ready 2.0 s after the loss.",
    ]
    assert [note.tone for note in shown.notes[-3:]] == [Tone.BAD, Tone.NOTED, Tone.GOOD]


def test_a_worker_that_says_goodbye_is_no_loss() -> None:
    goodbye = ev.SeatLeft(member=Member(1), reason="its owner needs the machine", drained=True, at=START + 5)
    shown = board([*story()[:-4], goodbye])
    assert shown.losses_at == ()
    assert shown.notes[-1].tone is Tone.NOTED


def test_workers_that_go_home_after_the_last_step_are_no_loss() -> None:
    events = [
        *story(),
        ev.RunCompleted(step=10, at=START + 8),
        ev.SeatLeft(member=Member(0), reason="told", at=START + 9),
    ]
    assert board(events).losses_at == board(story()).losses_at
    assert texts(board(events))[-1] == "The run is complete: 10 steps."


def test_a_resumed_run_forgets_what_was_voided_and_does_not_count_the_pause() -> None:
    stopped = [*story(), ev.RunStopped(reason="the user stopped it", at=START + 8)]
    resumed = board([*stopped, ev.RunResumed(step=1, term=2, at=START + 500)])
    assert [x for x, _ in resumed.training] == [0]
    assert resumed.elapsed(START + 501) == pytest.approx(9.0)
    assert texts(resumed) == ["The run goes on from step 1, in term 2 of its log."]
    again = board([*stopped, ev.RunResumed(step=1, term=2, at=START + 500), *seated(9, 0, 0, START + 501)])
    assert again.grid(START + 502)[0][0].replaced == 0


def test_bytes_on_the_wire_are_counted_over_the_living_and_the_lost() -> None:
    shown = Board(SPEC)
    assert shown.bytes_per_token is None
    first = Telemetry(boundary_bytes=1000, boundary_tokens=100)
    shown = shown.measured({Member(0): first, Member(1): first})
    shown = shown.measured({Member(0): Telemetry(boundary_bytes=3000, boundary_tokens=200)})
    assert shown.bytes_per_token == pytest.approx(4000 / 300)
    assert shown.compression == pytest.approx(4 * 32 / (4000 / 300))


@given(st.lists(st.integers(1, 30), max_size=8))
def test_no_note_is_told_twice_or_missed(portions: list[int]) -> None:
    shown, seen = Board(SPEC), 0
    for number, portion in enumerate(portions):
        for i in range(portion):
            shown = shown.told(f"{number}-{i}", START)
        assert [note.text for note in shown.news(seen)] == [f"{number}-{i}" for i in range(portion)]
        seen = shown.noted
    assert len(shown.notes) <= NOTES_KEPT


def test_any_part_of_a_history_makes_a_board() -> None:
    events = [*story(), *step(2, START + 8, 4.0, ((0, 2), (3, 4))), ev.RunFailed(reason="So it is.", at=START + 9)]
    for start in range(len(events)):
        for event, _state in told(events[start:]):
            assert event.at
        assert board(events[start:]).grid(START + 9)
