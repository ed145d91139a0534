"""What only shows once a run is at work is answered with one sentence too: what is wrong, and what to do."""

from __future__ import annotations

from pathlib import Path

from koinon.run import events as ev
from koinon.run.state import Phase, fold
from tests.processes import events, finish, kill_all, losses, resume, spec_of, start_run, wait_for_step


def test_a_loss_that_is_no_number_ends_the_run_with_a_sentence_and_its_last_good_step(tmp_path: Path) -> None:
    spec = spec_of(2, optim={"muon_lr": 9e15, "adamw_lr": 9e15, "warmup": 0})
    status, out, error = finish(start_run(tmp_path, spec))
    assert status == 1
    assert error.count("\n") == 1, error
    assert "NaN or infinite" in error or "not finite" in error or "The cost of an item" in error, error
    assert "Start a new run with a lower `muon_lr`" in error, "what to do"
    assert "The run has failed." in out
    told = events(tmp_path)
    assert fold(told).phase is Phase.FAILED
    assert all(loss == loss and abs(loss) != float("inf") for loss in losses(told).values())


def test_tokens_that_are_not_what_was_written_are_refused(tmp_path: Path) -> None:
    process = start_run(tmp_path, spec_of(1))
    wait_for_step(process, tmp_path, 1)
    kill_all(process)
    [shard] = (tmp_path / "here/data/train").glob("*.bin")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    before = len(events(tmp_path))
    status, _, error = finish(resume(tmp_path))
    assert status == 1
    assert error.count("\n") == 1, error
    assert str(shard.relative_to(tmp_path)) in error
    assert "Remove" in error, "what to do"
    assert not [event for event in events(tmp_path)[before:] if isinstance(event, ev.StageStepped)]
