"""The reduce under everything that can go wrong with it: slow links, dead owners, other arithmetic, lies.

Real nodes over the in-memory twin, in virtual time. What must hold: one root per stage and step, and the losses of an
undisturbed run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from koinon.errors import DiskFull
from koinon.net.clock import run_virtual
from koinon.net.hub import Faults
from koinon.nodes import custody, syncer
from koinon.nodes.engine import SECOND_TOLERANCE, Engine
from koinon.nodes.faults import Point
from koinon.optim.update import State
from koinon.run import events as ev
from koinon.run.state import Phase
from koinon.units import BitsPerSecond, PeerId
from tests.nodes.leagues import Paced, Rehearsal, assert_whole, run_league, spec_of
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
    write = custody.save

    def full(path: Path, tensors: Any, label: Any) -> None:
        if path.name == "step-00000003.safetensors":
            raise DiskFull(f"No room to write {path}: free some, then resume.")
        write(path, tensors, label)

    with monkeypatch.context() as patch:
        patch.setattr(custody, "save", full)
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
    honest, broken = Engine.accumulated, list[Engine]()

    def accumulated(self: Engine, names: Sequence[str]) -> dict[str, Tensor]:
        if self.stage.index == 0 and self.step == 2 and not broken:
            broken.append(self)
        found = honest(self, names)
        if self in broken and self.step == 2:
            found[names[0]] = torch.full_like(found[names[0]], torch.nan)
        return found

    patch.setattr(Engine, "accumulated", accumulated)


@pytest.mark.parametrize("replicas", [2, 3])
def test_an_owner_that_dies_in_a_reduce_takes_nobody_with_it(
    tmp_path: Path, undisturbed: dict[int, float], replicas: int
) -> None:
    """In every point of one reduce another member dies; whoever is left finishes it in a later attempt."""
    plan = {(0, 0): {(Point.SLICED, 2)}, (1, 0): {(Point.UPDATED, 2)}}
    league = run_league(spec_of(replicas), tmp_path, make_compute=Paced, plan=plan)
    assert len(league.deaths) == 2
    assert_whole(league, undisturbed)
    assert league.state.tally.reduces_aborted >= 2


@pytest.mark.parametrize("replicas", [2, 3])
def test_replicas_that_round_differently_keep_equal_roots(
    tmp_path: Path, undisturbed: dict[int, float], monkeypatch: pytest.MonkeyPatch, replicas: int
) -> None:
    exact, rough = Engine.update, list[Engine]()

    def update(self: Engine, gradients: Any, norm: float) -> Any:
        if self.stage.index == 0 and not rough:
            rough.append(self)
        weights, states = exact(self, gradients, norm)
        if self in rough:
            weights = {name: weight * (1 + 1e-6) for name, weight in weights.items()}
        return weights, states

    monkeypatch.setattr(Engine, "update", update)
    league = run_league(spec_of(replicas), tmp_path, make_compute=Paced)
    assert_whole(league, undisturbed)
    assert not [event for event in league.events if isinstance(event, ev.Disputed | ev.ReduceAborted)]
    assert_equal_weights(league)


def test_an_owner_that_once_sends_what_its_slices_do_not_give_is_disputed_and_the_step_taken_again(
    tmp_path: Path, undisturbed: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    _lie(monkeypatch, times=1)
    league = run_league(spec_of(2), tmp_path, make_compute=Paced)
    [dispute] = [event for event in league.events if isinstance(event, ev.Disputed)]
    assert dispute.error > SECOND_TOLERANCE
    assert_whole(league, undisturbed)
    assert_equal_weights(league)


def test_an_owner_that_lies_always_ends_the_run_before_its_lie_is_applied(
    tmp_path: Path, undisturbed: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two members cannot judge each other: a person has to look at both machines."""
    with monkeypatch.context() as patch:
        _lie(patch, times=1000)
        failed = run_league(spec_of(2), tmp_path, make_compute=Paced)
    assert failed.state.phase is Phase.FAILED
    assert "one of the machines is wrong" in failed.state.reason
    assert_whole(run_league(spec_of(2), tmp_path, make_compute=Paced, resume=True), undisturbed)


def _lie(patch: pytest.MonkeyPatch, *, times: int) -> None:
    """From step 2 on, one member of stage 0 sends its first updated tensor a thousandth too large."""
    honest, liars, told = Engine.sent, list[Engine](), list[str]()

    def sent(self: Engine, names: Sequence[str], tensors: Any) -> bytes:
        if self.stage.index == 0 and self.step == 2 and names and not liars:
            liars.append(self)
        if self in liars and len(told) < times and names:
            told.append(names[0])
            tensors = {**tensors, names[0]: tensors[names[0]] * 1.001}
        return honest(self, names, tensors)

    patch.setattr(Engine, "sent", sent)


@pytest.mark.parametrize("seat", [0, 1, 2])
def test_the_optimizer_state_of_a_member_that_leaves_goes_to_the_new_owners(
    tmp_path: Path, undisturbed: dict[int, float], seat: int
) -> None:
    """Were it lost, the losses would tell: momentum makes most of an update by then."""

    async def leave(league: Rehearsal) -> None:
        await league.until(lambda state: state.step == 2)
        for stage in 0, 1:
            await league.kill(stage, seat)

    league = run_league(spec_of(3), tmp_path, leave, make_compute=Paced)
    assert_whole(league, undisturbed)
    assert not [event for event in league.events if isinstance(event, ev.MomentumLost)]


async def come_with_nothing(*_: object) -> dict[str, State]:
    return {}


async def a_newcomer_without_state(league: Rehearsal) -> tuple[PeerId, PeerId]:
    """Beside the one member that has it: (newcomer, holder)."""
    await league.until(lambda state: state.step == 1)
    await league.kill(0, 0)
    for snapshot in league.directory.seat(0, 0).glob("*.safetensors"):
        snapshot.unlink()
    await league.start(0, 0)
    newcomer, holder = (league.workers[0, seat].transport.me for seat in (0, 1))
    await league.until(lambda state: any(seat.worker == newcomer for seat in state.ready(0)))
    return newcomer, holder


def test_the_optimizer_state_of_a_member_that_is_silent_for_a_while_is_waited_for(
    tmp_path: Path, undisturbed: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is alone meanwhile has the weights and not the state: it must not go on from zero."""

    async def silence_the_holder(league: Rehearsal) -> None:
        _, holder = await a_newcomer_without_state(league)
        everybody = [league.address.peer, *(one.transport.me for one in league.workers.values())]
        league.hub.partition([holder], [peer for peer in everybody if peer != holder])
        await asyncio.sleep(15.0)
        league.hub.heal()

    monkeypatch.setattr(syncer.Syncer, "_lone_momentum", come_with_nothing)
    league = run_league(spec_of(2), tmp_path, silence_the_holder, make_compute=Paced)
    assert_whole(league, undisturbed)
    assert league.state.tally.unreachable >= 1
    assert not [event for event in league.events if isinstance(event, ev.MomentumLost)]


def test_the_optimizer_state_on_the_disk_of_a_member_that_begins_anew_is_waited_for(
    tmp_path: Path, undisturbed: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = syncer.Syncer._load

    async def load_slowly(*arguments: Any) -> Any:
        await asyncio.sleep(8.0)
        return await load(*arguments)

    async def restart_the_holder(league: Rehearsal) -> None:
        await a_newcomer_without_state(league)
        await league.kill(0, 1)
        await league.start(0, 1)

    monkeypatch.setattr(syncer.Syncer, "_lone_momentum", come_with_nothing)
    monkeypatch.setattr(syncer.Syncer, "_load", load_slowly)
    league = run_league(spec_of(2), tmp_path, restart_the_holder, make_compute=Paced)
    assert_whole(league, undisturbed)
    assert not [event for event in league.events if isinstance(event, ev.MomentumLost)]


@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_after_a_resume_every_tensor_finds_its_optimizer_state(
    tmp_path: Path, undisturbed: dict[int, float], replicas: int
) -> None:
    """New members have new numbers, and so own other tensors than before."""

    async def go() -> None:
        league = await Rehearsal(spec_of(replicas), tmp_path, make_compute=Paced).__aenter__()
        await league.until(lambda state: state.step == 2)
        await league.vanish()

    run_virtual(go())
    league = run_league(spec_of(replicas), tmp_path, make_compute=Paced, resume=True)
    assert_whole(league, undisturbed)
    assert not [event for event in league.events if isinstance(event, ev.MomentumLost | ev.Disputed)]


def assert_equal_weights(league: TwinLeague) -> None:
    """The newest snapshots of a stage hold the same bytes of weights on every disk, and they are the log's."""
    for stage in league.state.stages:
        newest = stage.versions[-1]
        folders = league.path.glob(f"seats/{stage.index:02d}-*")
        files = [folder / f"step-{newest.step:08d}.safetensors" for folder in folders]
        files = [path for path in files if path.exists()]
        assert files
        assert all(syncer.verified(path, newest.root) for path in files)
