"""The reduce under everything that can go wrong with it: slow links, dead owners, other arithmetic, lies.

Real nodes over the in-memory twin, in virtual time. What must hold: one root per stage and step, and the losses of an
undisturbed run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from koinon.errors import DiskFull
from koinon.net.hub import Faults
from koinon.nodes import syncer
from koinon.nodes.engine import Engine
from koinon.run import events as ev
from koinon.run.state import Phase
from koinon.units import BitsPerSecond
from tests.nodes.leagues import Paced, assert_whole, run_league, spec_of
from tests.twin import TwinLeague


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return run_league(spec_of(1), tmp_path_factory.mktemp("calm"), make_compute=Paced).losses()


def test_a_reduce_over_a_link_that_is_slower_than_every_deadline_so_far_ends(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    """It takes 15 s, and the first deadline is 5: without patience every attempt would be given up for ever."""

    async def throttle(league: TwinLeague) -> None:
        await league.ready()
        here, there = (league.workers[0, seat].transport.me for seat in (0, 1))
        for pair in (here, there), (there, here):
            league.hub.set_faults(*pair, Faults(rate=BitsPerSecond(20_000)))

    league = run_league(spec_of(2), tmp_path, throttle, make_compute=Paced)
    assert_whole(league, undisturbed)
    assert league.state.tally.reduces_aborted >= 1, "the link was not slow enough to tell"


def test_a_disk_that_fills_in_a_reduce_ends_the_run_with_its_sentence_and_it_resumes(
    tmp_path: Path, undisturbed: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = syncer.save

    def full(path: Path, tensors: Any, label: Any) -> None:
        if path.name == "step-00000003.safetensors":
            raise DiskFull(f"No room to write {path}: free some, then resume.")
        write(path, tensors, label)

    with monkeypatch.context() as patch:
        patch.setattr(syncer, "save", full)
        failed = run_league(spec_of(2), tmp_path, make_compute=Paced)
    assert failed.state.phase is Phase.FAILED
    assert "No room to write" in failed.state.reason
    assert_whole(run_league(spec_of(2), tmp_path, make_compute=Paced, resume=True), undisturbed)


@pytest.mark.parametrize("replicas", [2, 3])
def test_a_member_that_sends_slices_that_are_no_numbers_is_excluded_from_the_step(
    tmp_path: Path, undisturbed: dict[int, float], monkeypatch: pytest.MonkeyPatch, replicas: int
) -> None:
    _break_one_gradient(monkeypatch)
    league = run_league(spec_of(replicas), tmp_path, make_compute=Paced)
    assert_whole(league, undisturbed)
    assert [e.step for e in league.events if isinstance(e, ev.Excluded)] == [2]


def test_a_gradient_that_is_no_number_and_nobody_elses_fails_the_run_with_its_sentence(
    tmp_path: Path, undisturbed: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _break_one_gradient(patch)
        failed = run_league(spec_of(1), tmp_path, make_compute=Paced)
    assert failed.state.phase is Phase.FAILED
    assert "not finite" in failed.state.reason
    assert "muon_lr" in failed.state.reason, "what to do next"
    assert_whole(run_league(spec_of(1), tmp_path, make_compute=Paced, resume=True), undisturbed)


def _break_one_gradient(patch: pytest.MonkeyPatch) -> None:
    """In step 2, one member of stage 0 has a NaN in what it folded."""
    honest, broken = Engine.gradients, list[Engine]()

    def gradients(self: Engine, names: Sequence[str]) -> bytes:
        if self.stage.index == 0 and self.step == 2 and not broken:
            broken.append(self)
        slices = honest(self, names)
        return b"\0\0\xc0\x7f" + slices[4:] if self in broken and self.step == 2 else slices

    patch.setattr(Engine, "gradients", gradients)
