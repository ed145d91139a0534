"""The command line as a user meets it: one sentence for each mistake, and a status that scripts can rely on."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from koinon.cli import main, recipes
from koinon.run.spec import RunSpec
from koinon.run.spec import recipes as names


class Answer(NamedTuple):
    status: int
    out: str
    error: str


@pytest.fixture
def koinon(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path):
    """Calls the entry point in an empty directory. What child processes print is caught too."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["koinon", *words])
        status = 0
        try:
            main.run()
        except SystemExit as end:
            status = int(end.code or 0)
        return Answer(status, *capfd.readouterr())

    return call


SPECS = {
    "unknown.toml": "[train]\nstepz = 4\n",
    "contradiction.toml": "[train]\nbatch = 5\nmicrobatch = 2\n",
    "stages.toml": "[model]\nsize = 32\nlayers = 2\nstages = 3\n",
    "narrow.toml": "[link]\nrate_mbit = 0.01\ntokens_per_second = 10000\n",
    "broken.toml": "name = \n",
    "empty.toml": '[model]\nsize = 32\ncontext = 32\n[data]\nsource = "nothing"\n',
}
MISTAKES = {
    ("run", "unknown.toml"): "unknown key `train.stepz`: did you mean `train.steps`?",
    ("run", "contradiction.toml"): "`batch` 5 is no multiple of `microbatch` 2",
    ("run", "stages.toml"): "2 layers cannot be cut into 3 stages",
    ("run", "narrow.toml"): "`rate_mbit` is 0.01",
    ("run", "broken.toml"): "is not valid TOML",
    ("run", "missing.toml"): "missing.toml cannot be read: No such file or directory.",
    ("run", "missing"): "There is no recipe `missing`: there are demo, small, tiny.",
    ("run",): "Name a spec file or a recipe",
    ("run", "tiny", "--set", "a.b=1"): "unknown key `a",
    ("run", "tiny", "--set", "nonsense"): "`nonsense` sets nothing",
    ("run", "tiny", "--workers", "4"): "set --workers to 3 or 6",
    ("run", "--resume", "folder"): "There is no run in folder",
    ("run", "--resume", "nowhere"): "There is no directory nowhere",
    ("run", "tiny", "--dir", "/proc/koinon"): "/proc/koinon",
    ("demo", "--fresh", "--dir", "folder"): "--fresh does not remove it",
    ("status", "folder"): "There is no run in folder",
    ("log", "nowhere"): "There is no directory nowhere",
    ("sample", "folder", "def "): "There is no run in folder",
    ("sample", "folder", ""): "The prompt is empty",
    ("join", "hello"): "This is no invitation: it does not begin with koinon1.",
    ("join", "koinon1aaaa"): "which is not all of it",
    ("join", "koinon2aaaa"): "another version of koinon",
    ("doctor", "--bind", "here"): "here is no address: write HOST:PORT",
    ("coordinate",): "Name a spec file or a recipe",
    ("coordinate", "tiny", "--bind", "4774"): "4774 is no address",
    ("coordinate", "tiny", "--local-workers", "9"): "are more than the 3 seats",
    ("coordinate", "--resume", "folder"): "There is no run in folder",
}


@pytest.mark.parametrize("words", MISTAKES, ids=" ".join)
def test_a_mistake_is_answered_with_one_sentence(koinon, words: tuple[str, ...]) -> None:
    for name, text in SPECS.items():
        Path(name).write_text(text)
    Path("folder").mkdir()
    answer = koinon(*words)
    assert answer.status == 1
    assert MISTAKES[words] in answer.error
    assert answer.error.count("\n") == 1
    assert "Traceback" not in answer.error
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "words",
    [("status",), ("run", "--wrkers", "3"), ("run", "tiny", "--port", "70000"), ("sample", "x", "y", "--tokens", "0")],
    ids=" ".join,
)
def test_wrong_usage_is_status_2(koinon, words: tuple[str, ...]) -> None:
    answer = koinon(*words)
    assert answer.status == 2
    assert "Usage:" in answer.error
    assert "Traceback" not in answer.error


def test_an_empty_corpus_leaves_no_run_behind(koinon) -> None:
    Path("nothing").mkdir()
    Path("empty.toml").write_text(SPECS["empty.toml"])
    answer = koinon("run", "empty.toml", "--dir", "here")
    assert answer.status == 1
    assert "There is no text in" in answer.error
    assert "Traceback" not in answer.error
    assert not Path("here/run.log").exists()


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", 0))
        yield other.getsockname()[1]


def test_a_port_in_use_is_named(koinon, taken_port: int) -> None:
    answer = koinon("run", "tiny", "--dir", "here", "--port", str(taken_port))
    assert answer.status == 1
    assert f"127.0.0.1:{taken_port} is in use" in answer.error
    assert "Traceback" not in answer.error
    assert "holds a run already" in koinon("run", "tiny", "--dir", "here").error


def test_a_fault_of_ours_is_told_as_one_and_kept_for_a_report(koinon, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("by nought")

    monkeypatch.setattr(recipes, "show_recipes", broken)
    answer = koinon("recipes")
    assert answer.status == 1
    assert "a fault in koinon (ZeroDivisionError: by nought)" in answer.error
    assert "Traceback" not in answer.error
    account = Path(answer.error.split()[-1].rstrip("."))
    assert "Traceback" in account.read_text()
    account.unlink()


def test_every_recipe_is_listed_and_sound(koinon) -> None:
    answer = koinon("recipes")
    assert answer.status == 0
    for name in names():
        assert RunSpec.recipe(name).name == name
        assert f"{name}  {recipes.purpose(name)}" in answer.out


def test_the_help_names_every_key_of_a_spec(koinon) -> None:
    shown = koinon("run", "--help").out
    for key in ("steps", "rank", "max_bytes", "rate_mbit", "muon_lr", "replicas"):
        assert key in shown


def test_the_version_is_said(koinon) -> None:
    assert koinon("--version").out.startswith("koinon 0.")
