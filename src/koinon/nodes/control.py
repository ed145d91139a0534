"""The control process of a league: coordinator, trainer and reception on one transport, loading no torch.

Opens (or resumes) the run's log and data, starts listening, and drives both roles until the run has ended, or until
another holds the term. A standby (`koinon.nodes.standby`) makes one of these when it takes over.
Knows nothing of who starts the workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from koinon.data import Dataset, prepare
from koinon.errors import Fenced, NothingToResume, RunExists, StateError, room
from koinon.net.identity import NodeKey
from koinon.net.transport import NodeAddr, Transport
from koinon.nodes import messages as m
from koinon.nodes.coordinator import Coordinator
from koinon.nodes.follower import RunFollower
from koinon.nodes.reception import Dialler, Reception
from koinon.nodes.rundir import RunDir
from koinon.nodes.switchboard import Switchboard
from koinon.nodes.tenure import Tenure
from koinon.nodes.trainer import Trainer
from koinon.run import events as ev
from koinon.run.events import Member
from koinon.run.evidence import as_event
from koinon.run.holders import issuer_in
from koinon.run.log import RunLog
from koinon.run.policies.refill import has, newest_common
from koinon.run.record import Issuer
from koinon.run.spec import RunSpec
from koinon.run.state import Phase, RunState, fold
from koinon.run.terms import TermStore, is_expired, unpacked
from koinon.units import PeerId, RunId, Seconds

Progress = Callable[[str, int, int], None]
Snapshots = Mapping[int, Mapping[int, str]]
"""Stage -> step -> root, of every snapshot on this machine that was verified against the log."""


DRAIN = Seconds(5.0)
LEASE_TICK = Seconds(0.2)


@dataclass(frozen=True, slots=True)
class OpenRun:
    """A run's directory, opened for writing."""

    directory: RunDir
    spec: RunSpec
    log: RunLog[ev.Event]
    state: RunState
    dataset: Dataset
    key: NodeKey


def sampling_seed(spec: RunSpec) -> bytes:
    """What decides which text each step reads. On one machine it follows from the spec, so a run can be repeated."""
    return hashlib.sha256(f"koinon/sampling/1|{spec.seed}".encode()).digest()


def stage_secret(spec: RunSpec, stage: int) -> bytes:
    """What a stage is founded from on one machine, where there is nobody to keep it from; elsewhere it is entropy."""
    return hashlib.sha256(f"koinon/stage/1|{spec.seed}|{stage}".encode()).digest()


def create(spec: RunSpec, directory: RunDir, progress: Progress) -> OpenRun:
    """A new run: data first, then the spec, then the log. Raises RunExists, DataError, DiskFull."""
    if directory.log.exists():
        raise RunExists(
            f"{directory.path} holds a run already. `--resume` goes on with it; or choose another directory."
        )
    directory.key.parent.mkdir(parents=True, exist_ok=True)
    key = NodeKey.load_or_create(directory.key)
    dataset = prepare(spec.data, directory.data, progress)
    _write(directory.spec, spec.to_toml())
    log: RunLog[ev.Event] = RunLog.create(
        directory.log, key, run=RunId(spec.run_id), encode=ev.encode, decode=ev.decode
    )
    return OpenRun(directory, spec, log, _opened(spec, log, key), dataset, key)


def _opened(spec: RunSpec, log: RunLog[ev.Event], key: NodeKey) -> RunState:
    """The state after the first event, which is written here if the log has none."""
    log.begin_term(max(1, log.term))
    opened = ev.RunOpened(
        spec.run_id,
        spec.to_toml(),
        key.peer_id,
        key.peer_id,
        spec.model.stages,
        spec.train.microbatches,
        hashlib.sha256(sampling_seed(spec)).hexdigest(),
        at=time.time(),
    )
    log.append(opened, sync=True)
    return fold([opened])


def _write(path: Path, text: str) -> None:
    """Wholly or not at all. Raises DiskFull."""
    draft = path.with_suffix(".draft")
    try:
        with room(path):
            draft.write_text(text)
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def reopen(directory: RunDir) -> OpenRun:
    """An existing run, as its log has it; a half-written tail is repaired. Raises NotARun, LogCorrupt, DataError."""
    directory.require()
    spec = RunSpec.load(directory.spec)
    key = NodeKey.load_or_create(directory.key)
    run = RunId(spec.run_id)
    log: RunLog[ev.Event] = RunLog.open(
        directory.log, key, run=run, encode=ev.encode, decode=ev.decode, issuer=signers(directory.log, run, key)
    )
    try:
        state = fold(log.events()) if log.head.seq else _opened(spec, log, key)
        dataset = Dataset.open(directory.data)
    except BaseException:
        log.close()
        raise
    return OpenRun(directory, spec, log, state, dataset, key)


def signers(path: Path, run: RunId, key: NodeKey) -> Issuer:
    """Who signs in which term of a log on this disk; one without any event is ours to begin."""
    said = issuer_in(path, run)
    return lambda term: (said(term) if callable(said) else said) or key.peer_id


def resume_point(state: RunState, snapshots: Snapshots) -> int:
    """The newest step at which every stage can be restored. Raises NothingToResume, saying which stage cannot."""
    if (step := newest_common(state, snapshots)) is not None:
        return step
    stuck = [s.index for s in state.stages if not any(has(state, snapshots, s.index, v.step) for v in s.versions)]
    raise NothingToResume(
        f"No step can be restored: {'stages ' + str(stuck) + ' have' if stuck else 'the stages have'} no snapshot that "
        f"fits the log at or before step {state.step}. Bring back the seats/ folders of this run, or start a new run."
    )


def _dialler() -> Transport:
    from koinon.net.iroh_transport import IrohTransport

    return IrohTransport(NodeKey.generate())


def resume_point_elsewhere(state: RunState, every: int) -> int:
    """The same where snapshots lie on other machines and only the log is here: the newest step at which workers write
    one, that every stage has reached, and whose root the log's state still has. Raises NothingToResume."""
    for step in range(state.step - state.step % every, -1, -every):
        if all(s.root_at(step) is not None or (not s.versions and step == 0) for s in state.stages):
            return step
    raise NothingToResume(
        f"Workers keep every {every}th step (`snapshot_every`), and the roots of the newest such step before step "
        f"{state.step} are not at hand any more, so what workers bring could not be checked. Start a new run, with "
        "`snapshot_every` of at most 8."
    )


class Control:
    """Coordinator and trainer of one opened run."""

    def __init__(
        self,
        run: OpenRun,
        transport: Transport,
        board: Switchboard,
        *,
        trains: bool = True,
        dialler: Dialler | None = None,
        terms: TermStore | None = None,
        follower: RunFollower | None = None,
    ) -> None:
        """dialler: makes the nodes by which the reception looks whether a newcomer can be seen from outside.
        terms: whom this node asks for its term; without it, it coordinates unasked. follower: of a node that has
        followed the run until now."""
        self.run_, self.transport, self._board = run, transport, board
        me = run.key.peer_id
        self.coordinator = Coordinator(run.spec, run.log, run.state, transport, board, run.key)
        self.follower = follower or RunFollower(transport, board, me, RunId(run.spec.run_id), terms=terms)
        self.trainer = Trainer(
            run.spec,
            run.dataset,
            sampling_seed(run.spec),
            transport,
            board,
            run.key,
            me,
            self.follower,
            loads=self._load_of,
            trains=trains,
        )
        self.reception = Reception(run.spec, lambda: self.coordinator.state, board, run.key, dialler or _dialler)
        self.tenure = None if terms is None else Tenure(terms, me)
        self._tasks: list[asyncio.Task[None]] = []

    def _load_of(self, member: Member) -> m.Telemetry:
        return self.coordinator.telemetry.get(member, m.Telemetry())

    async def start(self) -> NodeAddr:
        """Listen, and begin to work. Raises PortInUse, TransportUnusable; Fenced if the run has another coordinator."""
        address = await self.transport.start(self._board.services())
        self.reception.open_at(address.addresses)
        if self.tenure is not None and self.tenure.number == 0:
            await self.hold_term(address.addresses)
        await self.follower.start(())
        self._go()
        return address

    def _go(self) -> None:
        self._tasks = [
            asyncio.create_task(self.coordinator.run(), name="coordinator"),
            asyncio.create_task(self.trainer.run(), name="trainer"),
        ]
        if self.tenure is not None:
            self._tasks.append(asyncio.create_task(self.tenure.keep(self.coordinator.fail), name="tenure"))

    async def hold_term(self, addresses: tuple[str, ...] = ()) -> None:
        """Take the term that this log is written in, or the next if the store has seen it. Raises Fenced, TermRefused.

        The log must hold all that the store knows of: a coordinator whose successor has begun cannot go on from here.
        The lease of a holder that is gone is waited for, and no longer than it takes to see that it is gone.
        """
        assert self.tenure is not None
        log, state, store = self.run_.log, self.coordinator.state, self.tenure.store
        current = first = (await store.book()).current
        while current is not None and first is not None:
            known = state.coordinator == self.run_.key.peer_id and state.holder_of(current.number) == current.holder
            if not known or current.not_after > first.not_after:
                raise Fenced(log.term, current.number, current.holder)
            if current.holder == self.run_.key.peer_id or is_expired(current, store.now(), store.grace):
                break
            await asyncio.sleep(LEASE_TICK.value)
            current = (await store.book()).current
        after = 0 if current is None else current.number
        number = log.term if after < log.term else after + 1
        await self.tenure.take(number, after=after, head=log.head, addresses=addresses)
        log.begin_term(number)
        await self.tenure.begin(log.head)

    def resume(self, step: int) -> None:
        """Void what lies beyond `step`, under a new term."""
        log, me = self.run_.log, self.run_.key.peer_id
        log.begin_term(log.term + 1)
        if self.coordinator.state.coordinator != me:
            self.coordinator.write(ev.TermBegan(log.term, me, me, "the run is resumed from a standby's directory"))
        self.coordinator.write(ev.RunResumed(step, log.term))

    async def succeed(
        self, tenure: Tenure, reason: str, positions: Mapping[PeerId, int], addresses: tuple[str, ...]
    ) -> None:
        """Go on as coordinator and trainer of a term that was taken and begun. positions: what each follower needs.
        addresses: where this node listens already."""
        self.tenure, me, state = tenure, self.run_.key.peer_id, self.coordinator.state
        self.run_.log.begin_term(tenure.number)
        proofs = [unpacked(proof, RunId(state.run)) for proof in self.follower.book.proofs]
        self.coordinator.write(
            ev.TermBegan(tenure.number, me, me, reason),
            *(as_event(proof) for proof in proofs if proof is not None and proof.issuer not in state.convicted),
        )
        self.coordinator.follow_up(positions)
        self.reception.open_at(addresses)
        self.follower.take_office()
        await self.follower.start(())
        while self.follower.state.term < tenure.number:
            await asyncio.sleep(0.01)  # the trainer leases in the new term only
        self._go()

    async def ended(self) -> None:
        """Until the run leaves TRAINING, or a role breaks (its error is raised here)."""
        finished = asyncio.create_task(self.coordinator.finished.wait())
        done, _ = await asyncio.wait([finished, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
        finished.cancel()
        if self.coordinator.failure is not None:
            raise self.coordinator.failure
        for task in done:
            task.result()

    async def drain(self, reason: str) -> None:
        """Log why, and give everyone the time to read it. The directory can be resumed. Twice is once."""
        if self.coordinator.state.phase is not Phase.TRAINING or self.coordinator.failure is not None:
            return
        with contextlib.suppress(StateError):  # it is kept in `failure`; the run can be resumed without this event
            self.coordinator.stop(reason)
        if self._tasks:  # none, if it could not even listen
            await asyncio.wait(self._tasks, timeout=DRAIN.value)

    async def close(self) -> None:
        """Stop. Call it when the workers are gone: until then they are answered."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.transport.close()
        self.run_.log.close()


__all__ = [
    "Control",
    "OpenRun",
    "create",
    "reopen",
    "resume_point",
    "resume_point_elsewhere",
    "sampling_seed",
    "stage_secret",
]
