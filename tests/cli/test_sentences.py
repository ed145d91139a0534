"""Every event has one sentence that a person can read."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from koinon.cli.sentences import Tone, sentence, tone
from koinon.run import events as ev
from koinon.run.events import Member
from koinon.run.state import RunState
from tests.cli.stories import everyone, opened, told

AFTER_START = [state for _, state in told([opened(), *everyone()])][-1]
EXAMPLES: dict[type, object] = {
    int: 1, float: 0.5, bool: False, str: "abc", bytes: b"\xc0", tuple[str, ...]: ("w",), tuple[int, ...]: (0, 1),
    Member: Member(1), tuple[Member, ...]: (Member(0), Member(2)), tuple[bytes, ...]: (b"\x80", b"\x40"),
    tuple[ev.Ticket, ...]: (ev.Ticket(1, "w", "a"),),
}  # fmt: skip


def example(kind: type[ev.Event]) -> ev.Event:
    return kind(**{field.name: EXAMPLES[field.type] for field in msgspec.structs.fields(kind)})


@pytest.mark.parametrize("kind", get_args(ev.Event), ids=lambda kind: kind.__name__)
def test_an_event_is_one_whole_sentence(kind: type[ev.Event]) -> None:
    for state in (AFTER_START, RunState()):  # with a seat for member 1, and without any
        words = sentence(example(kind), state)
        assert words[0].isupper() or words[0].isdigit()
        assert words.endswith((".", "abc"))
        assert "\n" not in words
        assert "None" not in words
        assert "(" not in words or ")" in words


def test_a_member_is_named_by_its_seat() -> None:
    left = ev.SeatLeft(member=Member(1), reason="its process was killed by SIGKILL")
    assert sentence(left, AFTER_START) == "Stage 1, seat 0 is gone: its process was killed by SIGKILL."
    assert sentence(left, RunState()).startswith("Member 1 is gone")


@pytest.mark.parametrize(
    ("items", "words"), [(b"\x80", "1 work item of step 4 goes"), (b"\xf0", "4 work items of step 4 go")]
)
def test_numbers_agree_with_their_nouns(items: bytes, words: str) -> None:
    event = ev.ItemsReleased(step=4, stage=1, member=Member(1), items=items, reason="left")
    assert sentence(event, AFTER_START).startswith(words)


@given(st.from_type(ev.StepMeasured))
def test_a_step_is_routine_whatever_its_loss(event: ev.StepMeasured) -> None:
    assert tone(event) is Tone.ROUTINE
    assert sentence(event, AFTER_START)


def test_what_harms_a_run_is_bad_news() -> None:
    bad = {kind.__name__ for kind in get_args(ev.Event) if tone(example(kind)) is Tone.BAD}
    assert bad == {"SeatLeft", "Unreachable", "Excluded", "ItemDropped", "Disputed", "RunFailed", "Revoked"}
