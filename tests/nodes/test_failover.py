"""The coordinator is killed, cut off or comes back; a standby goes on, and the losses are those of the undisturbed run.

Real nodes, real files and a real term store over the in-memory twin, in virtual time.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from koinon.errors import Fenced, Refused, StateError
from koinon.net.clock import run_virtual
from koinon.net.identity import NodeKey
from koinon.net.memory import MemoryTransport
from koinon.net.transport import NodeAddr
from koinon.nodes import messages as m
from koinon.nodes import standby as standby_module
from koinon.nodes.control import Control, reopen, signers
from koinon.nodes.process import STATE_LIMIT
from koinon.nodes.switchboard import Switchboard
from koinon.run import events as ev
from koinon.run.log import RunLog
from koinon.run.record import seal
from koinon.run.termfile import FileTermStore
from koinon.run.terms import Term
from tests.nodes.leagues import Paced, Rehearsal, assert_whole, run_league, spec_of

PAUSE = 10.0
"""Virtual seconds that a league may stand still."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return run_league(spec_of(1), tmp_path_factory.mktemp("calm"), make_compute=Paced).losses()


async def step_and(league: Rehearsal, step: int, moment: float) -> None:
    """Until all stages have taken that many steps, and so much later."""
    await league.until(lambda state: state.step >= step)
    await asyncio.sleep(moment)


@pytest.mark.parametrize("moment", [0.0, 0.15, 0.3, 0.45, 0.6, 0.75])
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_killed_coordinator_is_succeeded_within_the_pause(
    tmp_path: Path, undisturbed: dict[int, float], moment: float, replicas: int
) -> None:
    killed: list[float] = []

    async def kill(league: Rehearsal) -> None:
        await step_and(league, 1, moment)
        await league.kill_coordinator()
        killed.append(asyncio.get_running_loop().time())
        while not league.succeeded:
            await asyncio.sleep(0.05)

    league = run_league(spec_of(replicas), tmp_path, kill, make_compute=Paced, standbys=1)
    assert_whole(league, undisturbed)
    [began] = [event for event in league.events if isinstance(event, ev.TermBegan)]
    assert began.term == 2
    assert league.state.tally.vanished == 0, "members keep their seats"
    assert league.succeeded[0] - killed[0] < PAUSE


async def succession(league: Rehearsal, count: int = 1) -> None:
    while len(league.succeeded) < count:
        await asyncio.sleep(0.05)


def terms(league: Rehearsal) -> list[int]:
    return [event.term for event in league.events if isinstance(event, ev.TermBegan)]


def test_no_record_that_anybody_was_shown_is_lost(tmp_path: Path, undisturbed: dict[int, float]) -> None:
    shown: dict[int, bytes] = {}

    async def kill(league: Rehearsal) -> None:
        await step_and(league, 1, 0.35)
        log = (await league.kill_coordinator()).run_.log
        newest = max(one.worker._follower.next_seq - 1 for one in league.workers.values())
        followers = [one.worker._follower for one in league.workers.values()]
        follower = next(f for f in followers if f.next_seq > newest)
        shown.update({record.seq: record.hash for record in follower._follower._recent})
        assert log.head.seq >= newest
        await succession(league)

    league = run_league(spec_of(2), tmp_path, kill, make_compute=Paced, standbys=1)
    assert_whole(league, undisturbed)
    path, key = tmp_path / "standby-0/run.log", league.control.run_.key
    with RunLog.open(
        path, key, run=league.spec.run_id, encode=ev.encode, decode=ev.decode,
        issuer=signers(path, league.spec.run_id, key),
    ) as log:  # fmt: skip
        assert {seq: log.record(seq).hash for seq in shown} == shown


def test_two_standbys_race_and_one_of_them_coordinates(tmp_path: Path, undisturbed: dict[int, float]) -> None:
    async def kill(league: Rehearsal) -> None:
        await step_and(league, 1, 0.3)
        await league.kill_coordinator()
        await succession(league)
        await asyncio.sleep(3.0)
        assert len(league.heirs) == 1, "the other one stands by"

    league = run_league(spec_of(2), tmp_path, kill, make_compute=Paced, standbys=2)
    assert_whole(league, undisturbed)
    assert terms(league) == [2]


def test_coordinators_can_be_killed_one_after_the_other(tmp_path: Path, undisturbed: dict[int, float]) -> None:
    async def kill(league: Rehearsal) -> None:
        for count in (1, 2):
            await step_and(league, count, 0.3)
            await league.kill_coordinator()
            await succession(league, count)

    league = run_league(spec_of(2), tmp_path, kill, make_compute=Paced, standbys=2)
    assert_whole(league, undisturbed)
    assert terms(league) == [2, 3]


def test_a_standby_that_is_killed_while_it_adopts_is_succeeded_itself(
    tmp_path: Path, undisturbed: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    gathering = asyncio.Event()
    gather = standby_module.gather
    calls: list[int] = []

    async def slow(*args: object, **more: object) -> object:
        calls.append(1)
        if len(calls) == 1:
            gathering.set()
            await asyncio.sleep(3600)
        return await gather(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(standby_module, "gather", slow)

    async def kill(league: Rehearsal) -> None:
        await step_and(league, 1, 0.3)
        await league.kill_coordinator()
        await gathering.wait()
        book = await league.store().book()
        [number] = [n for n, heir in league.heirs.items() if heir.transport.me == book.current.holder]
        await asyncio.sleep(1.0)
        await league.kill_standby(number)
        await succession(league)

    league = run_league(spec_of(2), tmp_path, kill, make_compute=Paced, standbys=2)
    assert_whole(league, undisturbed)
    assert terms(league) == [3], "term 2 was taken, and nothing was ever signed in it"


@pytest.mark.parametrize("reachable", [True, False], ids=["it still renews", "it cannot renew"])
def test_a_partition_between_the_coordinator_and_half_of_the_seats(
    tmp_path: Path, undisturbed: dict[int, float], monkeypatch: pytest.MonkeyPatch, reachable: bool
) -> None:
    """A coordinator that cannot renew its lease is replaced by the half that can; when the cut heals it is fenced."""

    async def divide(league: Rehearsal) -> None:
        await step_and(league, 1, 0.3)
        old, heir = league.control, league.heirs[0]
        if not reachable:
            monkeypatch.setattr(old.tenure.store, "renew", unreachable)
        with_old = [one.transport.me for (_, seat), one in league.workers.items() if seat == 0]
        with_heir = [one.transport.me for (_, seat), one in league.workers.items() if seat == 1]
        league.hub.partition([old.transport.me, *with_old], [heir.transport.me, *with_heir])
        await asyncio.sleep(8.0)
        monkeypatch.undo()
        league.hub.heal()
        if not reachable:
            await succession(league)
            with pytest.raises(Fenced, match="term 1 is over"):
                await old.ended()
            await old.close()

    league = run_league(spec_of(2), tmp_path, divide, make_compute=Paced, standbys=1)
    assert_whole(league, undisturbed)
    assert terms(league) == ([] if reachable else [2])


async def unreachable(*_: object, **__: object) -> Term:
    raise StateError("The term store does not answer.")


def test_a_coordinator_that_comes_back_is_fenced_and_its_directory_serves_a_standby(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    async def come_back(league: Rehearsal) -> None:
        await step_and(league, 1, 0.3)
        old = await league.kill_coordinator()
        with RunLog.open(  # what it wrote and could show to nobody
            league.directory.log, old.run_.key, run=league.spec.run_id, encode=ev.encode, decode=ev.decode
        ) as log:
            log.append(ev.MomentumLost(0, 1, ("nobody ever saw this",)))
        await succession(league)
        again = Control(reopen(league.directory), MemoryTransport(league.hub, old.run_.key), Switchboard(STATE_LIMIT),
                        terms=league.store())  # fmt: skip
        with pytest.raises(Fenced, match="holds term 2"):
            await again.start()
        await again.close()
        await league.stand_by(7, league.directory.path, coordinator=old.transport.me)
        heir = league.heirs[7].standby
        while heir.follower.head != league.control.run_.log.head:
            await asyncio.sleep(0.05)
        assert (tmp_path / "run.log.torn-1").exists(), "what was cut off is kept"
        await league.kill_coordinator()
        await succession(league, 2)
        assert league.control.run_.key.peer_id == old.run_.key.peer_id

    league = run_league(spec_of(2), tmp_path, come_back, make_compute=Paced, standbys=1)
    assert_whole(league, undisturbed)
    assert terms(league) == [2, 3]


def test_records_and_claims_of_a_term_that_is_over_are_refused_by_everyone(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    refused: list[str] = []

    async def write(league: Rehearsal) -> None:
        await step_and(league, 1, 0.3)
        old = await league.kill_coordinator()
        await succession(league)
        transport = MemoryTransport(league.hub, old.run_.key)
        await transport.start(Switchboard(STATE_LIMIT).services())
        record = seal(old.run_.log.head, 1, ev.encode(ev.RunFailed("no")), run=league.spec.run_id, key=old.run_.key)
        pushed = m.Records(record.seq, (record.encode(),))
        for one in league.workers.values():
            transport.learn(NodeAddr(one.transport.me, (one.transport._address,)))
            with pytest.raises(Refused, match="Only members"):
                await transport.request(one.transport.me, m.CTL, pushed)
        store = league.store()
        assert store is not None
        await store.enrol(transport.me)  # as it does when it is started again, to stand by
        for one in league.workers.values():
            with pytest.raises(Refused) as caught:
                await transport.request(one.transport.me, m.CTL, pushed)
            refused.append(str(caught.value))
        one = league.workers[0, 0]
        with pytest.raises(Refused, match="claims are of term 1"):
            await one.transport.request(league.control.transport.me, m.CTL, m.Claims((m.Claim(1, 0, 99),), (), 0, 1))

    league = run_league(spec_of(2), tmp_path, write, make_compute=Paced, standbys=1)
    assert_whole(league, undisturbed)
    assert len(refused) == 4 and all("holds term 2" in sentence for sentence in refused)


def test_a_term_store_that_is_slow_replaces_nobody_and_delays_no_longer_than_it_takes(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    class Slow(FileTermStore):
        async def take(self, *args: object, **more: object) -> Term:
            await asyncio.sleep(2.0)
            return await super().take(*args, **more)

        async def renew(self, *args: object, **more: object) -> Term:
            await asyncio.sleep(2.0)
            return await super().renew(*args, **more)

    def slow(path: Path, run: str) -> FileTermStore:
        return Slow(path, run, clock=asyncio.get_running_loop().time)

    async def kill(league: Rehearsal) -> None:
        await step_and(league, 1, 0.3)
        assert not league.succeeded
        await league.kill_coordinator()
        await succession(league)

    league = run_league(spec_of(1), tmp_path, kill, make_compute=Paced, standbys=1, make_store=slow)
    assert_whole(league, undisturbed)
    assert terms(league) == [2]


def test_a_run_whose_successor_is_gone_too_is_resumed_from_the_newest_log_under_another_key(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    async def go() -> None:
        league = await Rehearsal(spec_of(1), tmp_path, make_compute=Paced, standbys=1).__aenter__()
        await step_and(league, 1, 0.3)
        await league.kill_coordinator()
        await succession(league)
        await league.until(lambda state: state.step == 2)
        await league.vanish()

    run_virtual(go())
    shutil.copy(tmp_path / "standby-0/run.log", tmp_path / "run.log")
    league = run_league(spec_of(1), tmp_path, make_compute=Paced, standbys=1, resume=True)
    assert_whole(league, undisturbed)
    assert terms(league) == [2, 3] and league.state.tally.resumes == 1
    assert league.state.holder_of(3) == NodeKey.load_or_create(tmp_path / "control/key").peer_id


def test_a_standby_that_reaches_nobody_does_not_go_on_from_its_own_copy_alone(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    async def cut_off(league: Rehearsal) -> None:
        await step_and(league, 1, 0.3)
        heir = league.heirs[0].transport.me
        league.hub.partition([heir], [one.transport.me for one in league.workers.values()])
        await asyncio.sleep(0.5)
        await league.kill_coordinator()
        await asyncio.sleep(15.0)
        assert not league.succeeded and not (await league.store().book()).current.begun
        league.hub.heal()
        await succession(league)

    league = run_league(spec_of(1), tmp_path, cut_off, make_compute=Paced, standbys=1)
    assert_whole(league, undisturbed)
