"""A joiner fetches its stage's state in chunks from every replica, whatever happens to sources, links and itself."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from koinon.net import chunks
from koinon.net.hub import Faults
from koinon.nodes import messages as m
from koinon.nodes.offers import Offers
from koinon.run.state import SeatStatus
from koinon.units import BitsPerSecond, Bytes, PeerId
from tests.nodes.leagues import Paced, Rehearsal, assert_whole, run_league, spec_of

STEPS = {"train": {"steps": 12}}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny stage is then some dozens of chunks."""
    chunks.decode_manifest(chunks.manifest_of(b"1").encode(), chunks.manifest_of(b"1").root, limit=Bytes(1))  # as it is
    monkeypatch.setattr(chunks, "CHUNK", 1024)
    for module in ("offers", "download"):
        monkeypatch.setattr(f"koinon.nodes.{module}.CHUNK", 1024)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return run_league(spec_of(1, **STEPS), tmp_path_factory.mktemp("calm"), make_compute=Paced).losses()


def slow_down(league: Rehearsal, joiner: PeerId, rate: BitsPerSecond, stage: int) -> None:
    """What members of its stage send to the joiner takes its time."""
    for (where, _), one in league.workers.items():
        if where == stage and one.transport.me != joiner:
            league.hub.set_faults(one.transport.me, joiner, Faults(rate=rate))


def received(league: Rehearsal, seat: int, from_seat: int) -> int:
    """Bytes of bulk that a member of stage 0 got from another."""
    link = league.workers[0, seat].transport.links().get(league.workers[0, from_seat].transport.me)
    return 0 if link is None else link.received.get(m.BULK, 0)


async def join(league: Rehearsal, rate: BitsPerSecond) -> None:
    """One more worker of stage 0, in seat 2, behind slow links."""
    await league.ready()
    await league.until(lambda state: state.step >= 1)
    await league.start(0, 2)
    slow_down(league, league.workers[0, 2].transport.me, rate, 0)


def is_ready(league: Rehearsal, seat: int) -> bool:
    worker = league.workers[0, seat].transport.me
    known = league.state.member_of(worker)
    return known is not None and known.status is SeatStatus.READY


def test_a_joiner_fetches_from_both_replicas_at_once_and_says_how_far_it_is(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    told: list[tuple[int, int, float]] = []

    async def scene(league: Rehearsal) -> None:
        await join(league, BitsPerSecond.mbit(0.5))
        while not is_ready(league, 2):
            beat = league.workers[0, 2].worker._telemetry_now()
            told.append((beat.fetched_bytes, beat.fetching_bytes, beat.fetch_rate))
            await asyncio.sleep(0.05)
        both = [received(league, 2, seat) for seat in (0, 1)]
        assert min(both) > 0.2 * sum(both), f"one of two equal sources gave nearly all: {both}"

    league = run_league(spec_of(2, **STEPS), tmp_path, scene, make_compute=Paced)
    assert_whole(league, undisturbed)
    assert len({done for done, _, _ in told}) > 3
    assert all(done <= total for done, total, _ in told)
    assert any(rate > 0 for _, _, rate in told)
    assert not list(tmp_path.glob("seats/*/*.partial")), "what came is a snapshot now"


def test_a_source_that_dies_in_mid_chunk_costs_its_chunk_only(tmp_path: Path, undisturbed: dict[int, float]) -> None:
    async def scene(league: Rehearsal) -> None:
        await join(league, BitsPerSecond.mbit(0.3))
        await league.until(lambda _: received(league, 2, 1) > 5_000)
        await league.kill(0, 1)
        await league.until(lambda _: is_ready(league, 2))

    league = run_league(spec_of(2, **STEPS), tmp_path, scene, make_compute=Paced)
    assert_whole(league, undisturbed)


def test_a_joiner_that_is_killed_goes_on_from_its_file(tmp_path: Path, undisturbed: dict[int, float]) -> None:
    sizes: list[int] = []

    async def scene(league: Rehearsal) -> None:
        await join(league, BitsPerSecond.mbit(0.3))
        await league.until(lambda _: received(league, 2, 0) + received(league, 2, 1) > 30_000)
        first = received(league, 2, 0) + received(league, 2, 1)
        progress = league.workers[0, 2].worker._syncer.progress
        assert progress is not None
        await league.kill(0, 2)
        assert list(league.directory.seat(0, 2).glob("fetch-*.partial"))
        await league.start(0, 2)
        slow_down(league, league.workers[0, 2].transport.me, BitsPerSecond.mbit(0.3), 0)
        await league.until(lambda _: league.workers[0, 2].worker._syncer.progress is not None)
        again = league.workers[0, 2].worker._syncer.progress
        assert again is not None
        sizes.extend((progress.done, again.done, again.total, first))
        await league.until(lambda _: is_ready(league, 2))

    league = run_league(spec_of(2, **STEPS), tmp_path, scene, make_compute=Paced)
    assert_whole(league, undisturbed)
    before, at_once, total, _ = sizes
    assert before < total
    assert at_once > before - 8 * 1024, "chunks of the frozen tensors, or of the same step, need not come again"


def test_wrong_chunks_from_one_source_name_it_and_cost_only_themselves(
    tmp_path: Path, undisturbed: dict[int, float], caplog: pytest.LogCaptureFixture
) -> None:
    liars: list[PeerId] = []

    async def scene(league: Rehearsal) -> None:
        await league.ready()
        await league.until(lambda state: state.step >= 1)
        liar = league.workers[0, 0]
        liars.append(liar.transport.me)
        honest = liar.worker._syncer._offers.chunk

        async def lie(digest: bytes, reduce: object) -> Any:
            answer = await honest(digest, reduce)
            return (answer[0], bytes(len(answer[1]))) if isinstance(answer, tuple) and answer[1] else answer

        liar.worker._syncer._offers.chunk = lie  # type: ignore[method-assign]
        await league.start(0, 2)
        await league.until(lambda _: is_ready(league, 2))
        assert set(league.workers[0, 2].worker._syncer._download.wrong_by) == set(liars)

    league = run_league(spec_of(2, **STEPS), tmp_path, scene, make_compute=Paced)
    assert_whole(league, undisturbed)
    assert f"{liars[0][:10]} sent chunks of stage 0 with other bytes" in caplog.text


def test_a_root_that_is_not_the_logs_is_believed_from_nobody(
    tmp_path: Path, undisturbed: dict[int, float], caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(league: Rehearsal) -> None:
        await league.ready()
        await league.until(lambda state: state.step >= 1)
        syncer = league.workers[0, 0].worker._syncer
        honest = syncer._on_content_wanted

        async def lie(peer: PeerId, message: Any, body: bytearray) -> Any:
            header, manifest = await honest(peer, message, body)  # type: ignore[misc]
            return m.ContentOffered(header.step, "f" * 64, header.manifest, len(manifest)), manifest

        board = league.workers[0, 0].transport._services[m.BULK].handler.__self__  # type: ignore[union-attr]
        board.on(m.ContentWanted, lie)
        await league.start(0, 2)
        await league.until(lambda _: is_ready(league, 2))

    assert_whole(run_league(spec_of(2, **STEPS), tmp_path, scene, make_compute=Paced), undisturbed)
    assert "a root of step" in caplog.text


# --- the giving side


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_newcomer_waits_for_a_reduce_but_not_for_ever() -> None:
    clock = _Clock()
    offers = Offers(None, clock=clock)
    assert offers._wait(None) == 0.0
    assert offers._wait((3, 0)) > 0.0
    clock.now = 2.5
    assert offers._wait((3, 0)) == 0.0, "it waits for a member, not for a link"
    assert offers._wait((3, 1)) > 0.0


def test_a_newcomer_gets_half_of_the_declared_uplink() -> None:
    clock = _Clock()
    rate = BitsPerSecond.mbit(1)
    offers, sent = Offers(rate, clock=clock), 0
    for tick in range(1000):
        clock.now = tick / 100
        sent += 1024 if offers._wait(None) == 0.0 else 0
    assert 8 * sent / 10 == pytest.approx(rate.value / 2, rel=0.2)
