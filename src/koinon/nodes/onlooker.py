"""Somebody who follows a run and takes no part in it: a page, a test, whoever started the processes.

Follows every succession, and never takes a term. Knows nothing of who listens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from koinon.errors import KoinonError
from koinon.net.identity import NodeKey
from koinon.net.transport import NodeAddr
from koinon.nodes.follower import Listener, RunFollower
from koinon.nodes.process import STATE_LIMIT
from koinon.nodes.switchboard import Switchboard
from koinon.run.events import Event
from koinon.run.record import genesis
from koinon.run.state import Phase, RunState
from koinon.run.terms import TermStore
from koinon.units import RunId


class Onlooker:
    def __init__(self, coordinator: NodeAddr, run: RunId, terms: TermStore, listeners: Sequence[Listener]) -> None:
        from koinon.net.iroh_transport import IrohTransport

        self._coordinator, self._board, self._terms = coordinator, Switchboard(STATE_LIMIT), terms
        self._transport = IrohTransport(NodeKey.generate(), bind="127.0.0.1:0")
        self._follower = RunFollower(self._transport, self._board, coordinator.peer, run, terms=terms, looks_on=True)
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._seeking: asyncio.Task[None] | None = None
        self._listeners, self._run, self._told = listeners, run, 0
        self._skipped = 0
        self._follower.listen(self._hear)
        self._follower.went_astray = self._go_back

    @property
    def state(self) -> RunState:
        return self._follower.state

    async def start(self) -> None:
        mine = await self._transport.start(self._board.services())
        self._transport.learn(self._coordinator)
        await self._terms.enrol(self._transport.me)
        await self._follower.start(mine.addresses)
        self._seeking = asyncio.create_task(self._follower.keep_seeking(), name="onlooker")

    async def ended(self) -> None:
        """Until the run leaves TRAINING. Raises what `give_up` was given."""
        await asyncio.shield(self._ended)

    def give_up(self, error: KoinonError) -> None:
        """The run cannot go on here."""
        if not self._ended.done():
            self._ended.set_exception(error)

    async def close(self) -> None:
        if self._seeking is not None:
            self._seeking.cancel()
        self._ended.cancel()
        await self._transport.close()

    def _go_back(self) -> None:
        """Read the log of the new term from its beginning. Nobody is told again what stayed as it was."""
        fork = self._follower.book.fork_after(self._follower.head.term)
        self._skipped = self._told = 0 if fork is None else min(fork.seq, self._told)
        self._follower.restart(genesis(self._run), RunState())

    def _hear(self, event: Event, state: RunState) -> None:
        if self._skipped:
            self._skipped -= 1
            return
        self._told += 1
        for listener in self._listeners:
            listener(event, state)
        self._note(state)

    def _note(self, state: RunState) -> None:
        if state.phase not in (Phase.TRAINING, Phase.PROPOSED) and not self._ended.done():
            self._ended.set_result(None)
