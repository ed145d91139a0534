"""What a joiner reads of its worker and of the checks before it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from koinon.cli.checklist import Checklist
from koinon.cli.doctor import check_address, text_of
from koinon.cli.joining import PlainJoin, Speed, join_screen, sentence
from koinon.errors import UserError
from koinon.nodes.findings import bad, doubtful, good
from koinon.nodes.report import Report
from koinon.run.spec import RunSpec

TINY = RunSpec.recipe("tiny")
FINDINGS = [good("dial", "There."), doubtful("run", "Full.", "Wait."), bad("memory", "1 B.", "Buy more.")]


def console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=100, soft_wrap=True, color_system=None), out


def shown(*, terminal: bool) -> str:
    on, out = console(terminal=terminal)
    with Checklist(on) as checklist:
        for finding in FINDINGS:
            checklist.show(finding)
    return out.getvalue()


def test_a_checklist_has_words_in_a_file_and_signs_on_a_terminal() -> None:
    assert shown(terminal=False).splitlines() == [
        "ok     dial: There.",
        "note   run: Full.",
        "       Wait.",
        "FAILED memory: 1 B.",
        "       Buy more.",
    ]
    lines = shown(terminal=True).splitlines()
    assert [line[0] for line in lines] == ["✓", "!", " ", "✗", " "]
    assert (
        len({line.index(word) for line, word in zip(lines, ("There", "Full", "Wait", "1 B", "Buy"), strict=True)}) == 1
    )


def test_a_progress_bar_appears_on_a_terminal_alone_and_is_gone_afterwards() -> None:
    for terminal in True, False:
        on, out = console(terminal=terminal)
        with Checklist(on) as checklist:
            checklist.progress(0.5)
            checklist.show(FINDINGS[0])
            checklist.progress(0.7)
        assert ("compute" in out.getvalue()) == terminal
        assert checklist._bar is None


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (Report("joining"), "joining"),
        (Report("syncing", stage=1, seat=2, received=2048), "stage 1, seat 2: syncing, 2.0 KiB of about "),
        (
            Report("working", stage=0, seat=0, step=3, items=1200),
            "stage 0, seat 0: working, step 3 of 6, 1,200 items here, 1,500 tokens/s",
        ),
        (Report("ended"), "ended"),
    ],
)
def test_a_state_is_one_line(report: Report, expected: str) -> None:
    assert sentence(report, TINY, 1500.0).startswith(expected)


def test_speed_is_that_of_the_last_quarter_of_a_minute_and_starts_anew_with_a_process() -> None:
    speed = Speed()
    assert speed.note(0.0, 0) == 0.0
    assert speed.note(1.0, 100) == 100.0
    for second in range(2, 40):
        last = speed.note(float(second), 100 + 10 * (second - 1))
    assert last == pytest.approx(10.0)
    assert speed.note(40.0, 5) == 0.0
    assert speed.note(41.0, 25) == 20.0


def test_plain_lines_come_with_a_change_and_from_time_to_time() -> None:
    on, out = console(terminal=False)
    now = [0.0]
    screen = PlainJoin(TINY, on, lambda: now[0])
    for second in range(12):
        now[0] = float(second)
        with_items = second >= 2
        state = "idle" if second % 2 else "working"
        screen.hear(Report(state if with_items else "joining", stage=0, seat=0, items=second if with_items else 0))
    assert len(out.getvalue().splitlines()) == 3, "joining, working, and once more after five seconds"
    assert isinstance(join_screen(TINY, on), PlainJoin)


def test_a_live_line_ends_with_its_process() -> None:
    on, out = console(terminal=True)
    screen = join_screen(TINY, on)
    for _ in range(2):
        with screen:
            screen.hear(Report("working", stage=0, seat=0))
            screen.tell("Something.")
    screen.tell("After.")
    assert "After." in out.getvalue()


@pytest.mark.parametrize("address", ["", "4774", "host:", ":1", "host:port", "host:65536"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="write HOST:PORT"):
        check_address(address)


def test_an_invitation_may_lie_in_a_file(tmp_path) -> None:
    (tmp_path / "invitation").write_text("koinon1abc\n")
    assert text_of(str(tmp_path / "invitation")) == "koinon1abc\n"
    assert text_of("koinon1abc") == "koinon1abc"


def test_who_waits_reads_its_number_and_its_place_once_per_change() -> None:
    on, out = console(terminal=False)
    screen = PlainJoin(TINY, on, now=iter(range(0, 1000, 10)).__next__)
    with screen:
        for place in (12, 12, 12, 7, 7):
            screen.hear(Report("waiting", ticket=240, position=place, waits_for="all 8 seats are taken"))
        screen.hear(Report("syncing", stage=0, seat=1))
    assert out.getvalue().splitlines()[:2] == [
        "waiting for a seat: number 240, place 12 in line; all 8 seats are taken",
        "waiting for a seat: number 240, place 7 in line; all 8 seats are taken",
    ]
    assert len(out.getvalue().splitlines()) == 3
