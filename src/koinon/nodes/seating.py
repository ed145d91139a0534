"""How a worker comes to its seat and keeps it: it joins, gets its stage's state, tells that it lives, says it is ready.

A member that was unreachable, or was left out of a reduce, gets ready in the same way again. Knows nothing of items.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable

from koinon.errors import DiskFull, KoinonError, NothingToResume, PeerError, Refused
from koinon.net.transport import Transport
from koinon.nodes import messages as m
from koinon.nodes.compute import Compute
from koinon.nodes.engine import Engine
from koinon.nodes.follower import RunFollower
from koinon.nodes.syncer import Syncer
from koinon.nodes.workbench import Workbench
from koinon.run.events import Member
from koinon.run.spec import RunSpec
from koinon.units import PeerId, Seconds

log = logging.getLogger(__name__)
HEARTBEAT_SECONDS = 1.0
READING = Seconds(10.0)
"""How long a worker waits to read of its own seat before it asks for another."""


class Seating:
    """`ask`: brings the wish for a seat to whoever gives seats. `telemetry`: what heartbeats carry."""

    def __init__(
        self,
        transport: Transport,
        account: str,
        stage: int | None,
        follower: RunFollower,
        syncer: Syncer,
        ask: Callable[[m.Join], Awaitable[m.Welcome]],
        telemetry: Callable[[], m.Telemetry],
    ) -> None:
        self._transport, self._account, self._wanted = transport, account, stage
        self._follower, self._syncer, self._ask, self._telemetry = follower, syncer, ask, telemetry
        self._syncing = asyncio.Lock()

    async def take(self, addresses: tuple[str, ...]) -> tuple[m.Welcome, RunSpec, Engine, asyncio.Task[None]]:
        """Ask for a seat and get its stage's state; the task tells that we live, and ends when we are unseated.

        If that happens already here, or the last member that had the state dies, ask again: the stage may have to be
        founded anew, or loaded from this very disk.
        """
        while True:
            welcome = await self._join(addresses)
            spec, beats = RunSpec.parse(welcome.spec), asyncio.create_task(self._heartbeats(welcome.member))
            beginning = asyncio.create_task(self._begin(welcome, spec, addresses))
            try:
                await asyncio.wait((beats, beginning), return_when=asyncio.FIRST_COMPLETED)
                if beginning.done():
                    return welcome, spec, beginning.result(), beats
            except NothingToResume as error:
                log.info("%s", error)
            except DiskFull as error:  # its own text log may have no room to say so
                await self.tell_broken(welcome.member, welcome.stage, error)
                beats.cancel()
                raise
            except BaseException:
                beats.cancel()
                raise
            finally:
                beginning.cancel()
            beats.cancel()
            await asyncio.sleep(0.1)

    async def _begin(self, welcome: m.Welcome, spec: RunSpec, addresses: tuple[str, ...]) -> Engine:
        giver = self._follower.coordinator
        await self._follower.start(addresses)
        await self._read_of(Member(welcome.member), giver)
        return await self._syncer.begin(welcome, spec, self._follower)

    async def _read_of(self, member: Member, giver: PeerId) -> None:
        """Until our copy of the log has our seat. Where that takes long the log may be sent to nobody: it is to those
        alone who have a seat, and ours may have become void in between. What was read by then is kept. Nor is it ours
        if whoever gave it was replaced before anybody else had heard of it."""
        try:
            async with asyncio.timeout(READING.value):
                while not self._has(member):
                    if self._follower.coordinator != giver:
                        raise NothingToResume("Whoever gave this seat coordinates no more: ask its successor.")
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise NothingToResume(f"The log did not tell of this worker's seat within {READING}: ask again.") from None

    def _has(self, member: Member) -> bool:
        seat = self._follower.state.seats.get(member)
        return seat is not None and seat.worker == self._transport.me

    async def get_ready(self, engine: Engine, bench: Workbench, compute: Compute) -> None:
        """Fetch until the coordinator agrees that this member has what the stage has.

        One at a time: a fetch that ends when the member is at work again would throw away what it has folded.
        """
        async with self._syncing:
            while not await self._is_ready(engine, bench, compute):
                await asyncio.sleep(0.1)
                await self._syncer.catch_up(engine, self._follower)
                bench.step = engine.step

    async def tell_broken(self, member: int, stage: int, error: KoinonError) -> None:
        """Something that no retry mends: it ends the run."""
        await self._follower.insist(m.Broken(member, f"Stage {stage}: {error}"))

    async def _is_ready(self, engine: Engine, bench: Workbench, compute: Compute) -> bool:
        root = await compute.run(lambda: self._syncer.root_of(engine))
        try:
            await self._follower.insist(m.Ready(bench.member, engine.step, root))
        except Refused as refusal:
            log.info("not ready yet: %s", refusal)
            return False
        return True

    async def _join(self, addresses: tuple[str, ...]) -> m.Welcome:
        stage, have = self._syncer.inventory(self._wanted)
        return await self._ask(m.Join(self._account, addresses, secrets.token_hex(8), stage, have))

    async def _heartbeats(self, member: int) -> None:
        """Until the coordinator no longer knows this member."""
        while True:
            beat = m.Heartbeat(member, self._telemetry())
            try:
                await self._follower.ask(beat)
            except Refused as refusal:
                log.warning("unseated: %s", refusal)
                return
            except PeerError as error:
                log.info("the coordinator does not answer: %s", error)
            await asyncio.sleep(HEARTBEAT_SECONDS)
