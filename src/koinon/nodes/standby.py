"""A standby: follows the run's log into a directory of its own, and goes on as coordinator when there is none.

    follow      every record is verified and written to this node's own log
    watch       probes the holder of the term; the policy `may_take` says when it counts as gone
    take        the next term, from the term store, which gives it to one standby alone
    gather      the seats' newest records; whoever answers heeds the old term no more
    go on       adopt the newest history, log that the term began, lease the open step anew

Knows nothing of how workers are started.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from koinon.data import Dataset, prepare
from koinon.errors import Fenced, NobodyAnswers, NotARun, PeerError, StateError, TermRefused
from koinon.net.identity import NodeKey
from koinon.net.transport import Answer, Transport
from koinon.nodes import messages as m
from koinon.nodes.clock import loop_time
from koinon.nodes.control import Control, OpenRun, signers
from koinon.nodes.follower import RunFollower
from koinon.nodes.gathering import gather
from koinon.nodes.reception import Dialler
from koinon.nodes.rundir import RunDir
from koinon.nodes.switchboard import Switchboard
from koinon.nodes.tenure import Tenure
from koinon.run import events as ev
from koinon.run.log import RunLog
from koinon.run.policies.deadlines import History, observe
from koinon.run.record import REMEMBERED, Record
from koinon.run.spec import RunSpec
from koinon.run.state import Phase, RunState, SeatStatus, fold
from koinon.run.tails import adopt
from koinon.run.terms import Term, TermStore, may_take
from koinon.units import PeerId, RunId, Seconds

log = logging.getLogger(__name__)
PROBE_EVERY = Seconds(1.0)
TICK = Seconds(0.2)


class Standby:
    """One run's standby on a transport that listens already. `run` ends when it has taken over, or the run is over."""

    def __init__(
        self,
        transport: Transport,
        board: Switchboard,
        key: NodeKey,
        *,
        coordinator: PeerId,
        run: RunId,
        directory: RunDir,
        terms: TermStore,
        data: Path | None = None,
        trains: bool = True,
        dialler: Dialler | None = None,
        clock: Callable[[], float] = loop_time,
    ) -> None:
        """coordinator: whom to follow first. directory: of this node alone; a copy of the log there is gone on with.
        data: prepared data to read, by default `directory`'s own, which is prepared when the spec is known. dialler: as
        of `Control`.
        Raises LogInUse, LogCorrupt."""
        self._transport, self._board, self._key, self._run = transport, board, key, run
        self._directory, self._terms, self._data, self._clock = directory, terms, data, clock
        self._trains, self._dialler = trains, dialler
        self._control: Control | None = None
        self.log = self._open()
        state = fold(self.log.events())
        self.follower = RunFollower(
            transport,
            board,
            coordinator,
            run,
            terms=terms,
            held=(self.log.head, state),
            keep=self._keep,
            stands_by=True,
        )
        self._dataset: Dataset | None = None
        self._addresses: tuple[str, ...] = ()
        self._probed, self._heard, self._silences = 0, clock(), History()
        self._newest = 0
        board.on(m.Pulse, self._on_pulse)

    @property
    def state(self) -> RunState:
        """As this node knows it: by its own word, once it coordinates."""
        return self.follower.state if self._control is None else self._control.coordinator.state

    def close(self) -> None:
        """Let go of the log, if nobody goes on with it. Twice is once."""
        self.log.close()

    async def run(self, addresses: tuple[str, ...]) -> Control | None:
        """Stand by (reachable at `addresses`). Returns what coordinates from now on; None when training has ended.

        Raises DataError or DiskFull if this node cannot stand by, NotARun if it took over and had missed too much.
        """
        self._addresses = addresses
        await self._enrol()
        tasks = [asyncio.create_task(self._probe(), name="probe"), asyncio.create_task(self._compare(), name="compare")]
        try:
            while self.state.phase in (Phase.PROPOSED, Phase.TRAINING):
                if self.follower.is_astray:
                    self._go_back()
                if self._dataset is None and self.state.spec:
                    await self._get_data()
                with contextlib.suppress(StateError):  # a store that fails is asked again
                    term = await self.follower.look()
                    if term is not None and self._may_take(term) and (control := await self._take_over(term)):
                        return control
                await asyncio.sleep(TICK.value)
            return None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # --- following

    async def _enrol(self) -> None:
        """Have every door opened to this node."""
        while True:
            try:
                await self._terms.enrol(self._transport.me)
            except StateError as error:
                log.warning("%s", error)
                await asyncio.sleep(PROBE_EVERY.value)
            else:
                return

    def _open(self) -> RunLog[ev.Event]:
        self._directory.log.parent.mkdir(parents=True, exist_ok=True)
        path, run = self._directory.log, self._run
        if not path.exists():
            return RunLog.create(path, self._key, run=run, encode=ev.encode, decode=ev.decode)
        issuer = signers(path, run, self._key)
        return RunLog.open(path, self._key, run=run, encode=ev.encode, decode=ev.decode, issuer=issuer)

    def _keep(self, records: Sequence[Record]) -> None:
        self.log.adopt(records, issuer=self.follower.issuer)
        self._heard = self._clock()

    def _go_back(self) -> None:
        """Set aside what the history of a later term does not have: this node coordinated, or heeded, too long."""
        fork = self.follower.book.fork_after(self.log.head.term)
        if fork is None:
            return
        common = fork.seq <= self.log.head.seq and (
            fork.seq == 0 or self.log.record(fork.seq).hash.hex() == fork.head
        )  # fmt: skip
        if self.log.head.seq > (keep := fork.seq if common else 0):
            log.warning("%s", self.log.cut_back(keep))
        self.follower.restart(self.log.head, fold(self.log.events()))

    async def _get_data(self) -> None:
        spec = RunSpec.parse(self.state.spec)
        if not self._directory.spec.exists():
            self._directory.spec.write_text(spec.to_toml())
        if self._data is None:
            self._dataset = await asyncio.to_thread(prepare, spec.data, self._directory.data)
        else:
            self._dataset = Dataset.open(self._data)

    async def _probe(self) -> None:
        """Ask the holder whether it lives, and for the log wherever this copy lags behind."""
        lagged = 0
        while True:
            term = self.follower.book.current
            if term is not None and term.holder != self._transport.me:
                if term.number != self._probed:
                    self._probed, self._heard, lagged = term.number, self._clock(), self.follower.next_seq
                with contextlib.suppress(PeerError):
                    reply = await self._transport.request(PeerId(term.holder), m.CTL, m.Pulse(term.number))
                    self._hear(term.number)
                    assert isinstance(reply.header, m.Ack)
                    self._newest = max(self._newest, reply.header.next - 1)
                    if reply.header.next > self.follower.next_seq and self.follower.next_seq == lagged:
                        wish = m.Follow(self.follower.next_seq, self._addresses, True)
                        await self._transport.request(PeerId(term.holder), m.CTL, wish)
                    lagged = self.follower.next_seq
            await asyncio.sleep(PROBE_EVERY.value if self.state.run else TICK.value)

    def _hear(self, number: int) -> None:
        now = self._clock()
        if number == self._probed:
            self._silences = observe(self._silences, Seconds(now - self._heard))
            self._heard = now

    async def _on_pulse(self, _peer: PeerId, _message: m.Pulse, _body: bytearray) -> Answer:
        """Of another standby, while this one has taken a term and gathers."""
        return m.Ack()

    async def _compare(self) -> None:
        await self.follower.keep_seeking()

    # --- succeeding

    def _may_take(self, term: Term) -> bool:
        is_whole = self._dataset is not None and self._newest - self.log.head.seq < REMEMBERED
        return is_whole and may_take(
            term,
            me=self._transport.me,
            now=self._terms.now(),
            grace=self._terms.grace,
            silent=Seconds(self._clock() - self._heard),
            silences=self._silences,
            convicted=self.follower.book.convicted,
        )

    async def _take_over(self, gone: Term) -> Control | None:
        """Take the next term and go on; None if another was quicker, or took a later term while this one gathered."""
        tenure = Tenure(self._terms, self._transport.me)
        why = "signed two histories" if gone.revoked else f"silent for {Seconds(self._clock() - self._heard)}"
        try:
            await tenure.take(gone.number + 1, after=gone.number, head=self.log.head, addresses=self._addresses)
        except TermRefused as refusal:
            log.info("%s", refusal)
            return None
        log.warning("%s holds term %s no more (%s): this node takes the next", gone.holder[:10], gone.number, why)
        keeping = asyncio.create_task(tenure.keep(lambda fenced: log.warning("%s", fenced)))
        try:
            await self.follower.look()
            positions = await self._adopt_newest(tenure.number)
            await tenure.begin(self.log.head)
        except (Fenced, NobodyAnswers) as trouble:
            log.warning("%s", trouble)
            return None
        finally:
            keeping.cancel()
        return await self._go_on(tenure, positions, f"{gone.holder[:10]} {why}")

    async def _adopt_newest(self, number: int) -> dict[PeerId, int]:
        """Append what the seats hold beyond this copy. Returns from which place each of them needs the log.

        Raises StateError if they hold records that this node can never have: it was too far behind.
        """
        seats = [PeerId(s.worker) for s in self.state.seats.values() if s.status is not SeatStatus.LEFT]
        answers = await gather(self._transport, seats, term=number, first=self.log.head.seq + 1, clock=self._clock)
        found = adopt(
            self.log.head, (a.records for a in answers.values()), run=self._run, issuer=self.follower.issuer
        )  # fmt: skip
        for proof in found.proofs:
            with contextlib.suppress(TermRefused):
                await self._terms.revoke(proof)
        if found.records:
            self.follower.adopt(found.records)
        self.log.sync()
        newest = max((a.newest for a in answers.values() if not a.records), default=0)
        if newest > self.log.head.seq and not found.records:
            raise NotARun(
                f"This standby's log ends at record {self.log.head.seq}, the seats are at {newest}, and nobody has "
                f"what lies between. Copy the former coordinator's run.log to {self._directory.log}, then start again."
            )
        return {peer: min(a.newest, self.log.head.seq) + 1 for peer, a in answers.items()}

    async def _go_on(self, tenure: Tenure, positions: dict[PeerId, int], reason: str) -> Control:
        assert self._dataset is not None
        spec = RunSpec.parse(self.state.spec)
        run = OpenRun(self._directory, spec, self.log, self.state, self._dataset, self._key)
        self._control = control = Control(
            run, self._transport, self._board, trains=self._trains, dialler=self._dialler, follower=self.follower
        )
        await control.succeed(tenure, reason, positions, self._addresses)
        return control
