"""What a command line means: which spec, which directory, how many workers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koinon.cli.sources import free_directory, new_run, replicas_of, resumed_run
from koinon.errors import Contradiction, NotARun, SpecError, UserError
from koinon.run.spec import RunSpec

TINY = RunSpec.recipe("tiny")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that looks like a run of `tiny`, and a spec file of the same beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "spec.toml").write_text(TINY.to_toml())
    (tmp_path / "runs" / "tiny" / "run.log").touch()
    (tmp_path / "mine.toml").write_text(TINY.to_toml())
    return Path("runs/tiny")


def test_a_run_lies_under_its_name_unless_told_otherwise() -> None:
    assert new_run("tiny", None, (), None).directory == Path("runs/tiny")
    assert new_run("tiny", Path("x"), (), None).directory == Path("x")


def test_workers_are_shared_among_the_stages() -> None:
    order = new_run("tiny", None, ["train.steps=4"], 6)
    assert (order.spec.league.replicas, order.spec.train.steps) == (2, 4)


@given(st.integers(1, 100))
def test_workers_that_cannot_be_shared_are_refused_with_numbers_that_can(workers: int) -> None:
    stages = TINY.model.stages
    if workers % stages == 0:
        assert replicas_of(TINY, workers) * stages == workers
        return
    with pytest.raises(Contradiction) as refusal:
        replicas_of(TINY, workers)
    advised = [int(word) for word in str(refusal.value).rstrip(".").split() if word.isdigit()][-2:]
    assert all(replicas_of(TINY, number) for number in advised)


def test_a_run_goes_on_by_its_directory_or_by_its_spec(run: Path) -> None:
    for source, directory in [(str(run), None), (None, run), ("tiny", None), ("mine.toml", None), (str(run), run)]:
        order = resumed_run(source, directory, (), None)
        assert (order.directory, order.spec.run_id, order.resume) == (run, TINY.run_id, True)
    assert resumed_run(str(run), None, (), 6).replicas == 2


def test_a_run_does_not_go_on_with_another_spec(run: Path) -> None:
    (run.parent.parent / "mine.toml").write_text(RunSpec.recipe("tiny", overrides=["train.steps=9"]).to_toml())
    with pytest.raises(Contradiction, match=r"another spec than mine\.toml"):
        resumed_run("mine.toml", None, (), None)
    with pytest.raises(Contradiction, match="cannot change"):
        resumed_run(str(run), None, ["train.steps=9"], None)


@pytest.mark.usefixtures("run")
def test_what_cannot_be_gone_on_with_is_said() -> None:
    with pytest.raises(UserError, match="Name its directory"):
        resumed_run(None, None, (), None)
    with pytest.raises(UserError, match="two directories"):
        resumed_run("runs/tiny", Path("elsewhere"), (), None)
    with pytest.raises(NotARun, match="no directory elsewhere"):
        resumed_run("elsewhere", None, (), None)
    with pytest.raises(NotARun, match="no run in runs"):
        resumed_run("runs", None, (), None)
    with pytest.raises(SpecError, match="cannot be read"):
        resumed_run("other.toml", None, (), None)


def test_a_directory_is_no_spec(run: Path) -> None:
    with pytest.raises(UserError, match="--resume"):
        new_run(str(run), None, (), None)
    with pytest.raises(UserError, match="is a directory"):
        new_run("runs", None, (), None)


def test_a_free_directory_is_the_next_number(tmp_path: Path) -> None:
    taken = []
    for _ in range(3):
        taken.append(free_directory(tmp_path / "demo"))
        taken[-1].mkdir()
    assert [path.name for path in taken] == ["demo", "demo-2", "demo-3"]
