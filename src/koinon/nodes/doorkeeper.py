"""Who may connect to this node: strangers to be admitted or measured, members for everything else.

A member is whoever has a living seat in the log, or shows a pass that the coordinator signed for a seat of which the
log here does not tell yet. So nobody is asked on the data path, and a log that lags keeps no newcomer out. Where a term
store says who coordinates, its holder is let in before the log says so, and so are those that stand by or look on.
Knows nothing of what is said after the hello.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from koinon.errors import Refused, StateError
from koinon.net.lanes import LANE
from koinon.net.passes import GRACE, Pass, check
from koinon.net.transport import Hello
from koinon.nodes import messages as m
from koinon.run.state import RunState
from koinon.run.terms import Book
from koinon.units import PeerId, RunId

OPEN: Final = frozenset({m.JOIN, LANE})
"""For everybody. A piece on a lane is taken only with the token of a body that was admitted elsewhere."""


class Doorkeeper:
    """`admit` is a transport's gate. It knows the run's state from `watch` on; before, it believes passes alone."""

    def __init__(self, coordinator: PeerId, run: RunId, *, now: Callable[[], float] = time.time) -> None:
        self._coordinator, self._run, self._now = coordinator, run, now
        self._state: Callable[[], RunState] = RunState
        self._hang_up: Callable[[PeerId, str], None] = _ignored
        self._book: Callable[[], Book] | None = None
        self._by_pass: dict[PeerId, asyncio.TimerHandle] = {}
        """Who is here by a pass alone, until that expires."""

    def watch(
        self,
        state: Callable[[], RunState],
        hang_up: Callable[[PeerId, str], None],
        book: Callable[[], Book] | None = None,
    ) -> None:
        """The run as this node knows it, how to end the connections of a peer, and what the term store says."""
        self._state, self._hang_up, self._book = state, hang_up, book

    def admit(self, peer: PeerId, alpn: str, hello: Hello) -> None:
        """Raises Refused with a sentence for the peer's operator."""
        state, book = self._state(), self._read()
        if hello.run and hello.run != self._run:
            raise Refused(f"This node is of run {self._run[:10]}, not of {hello.run[:10]}.")
        if hello.shown is not None and hello.shown.node != peer:  # a stolen pass shows what its bearer is, everywhere
            raise Refused(f"The pass belongs to {hello.shown.node[:10]}, not to {peer[:10]}.")
        if alpn in OPEN or peer in self._officers(state, book) or (alpn == m.CTL and peer in book.guests):
            return
        if peer in state.revoked:
            raise Refused(f"This node takes no part in the run any more: {state.revoked[peer]}")
        if state.member_of(peer) is None:
            self._believe(peer, hello.shown, state, book)

    def knows(self, peer: PeerId) -> bool:
        """Whether it is no stranger: only then it may keep much of this node busy."""
        state, book = self._state(), self._read()
        if peer in self._officers(state, book) or peer in book.guests or peer in self._by_pass:
            return True
        return state.member_of(peer) is not None

    def _read(self) -> Book:
        """An empty one where there is no store, or none that can be believed: the log decides then."""
        try:
            return Book(self._run) if self._book is None else self._book()
        except StateError:
            return Book(self._run)

    def _officers(self, state: RunState, book: Book) -> tuple[str, ...]:
        """Who holds the newest term, as far as anybody here knows."""
        holder = self._coordinator if book.current is None else book.current.holder
        return holder, state.trainer, state.coordinator

    def _issuer(self, term: int, state: RunState, book: Book) -> PeerId:
        """Who signs passes in that term."""
        said = book.holder_of(term) if book.terms else state.holder_of(term)
        return PeerId(said) if said else self._coordinator

    def _believe(self, peer: PeerId, shown: Pass | None, state: RunState, book: Book) -> None:
        """The pass, if it speaks of a seat that is newer than the log here."""
        if shown is None:
            raise Refused("Only members of the run are served here, and no pass was shown: join the run first.")
        issuer = self._issuer(shown.term, state, book)
        check(shown, issuer=issuer, node=peer, run=self._run, now=self._now(), term=state.term)
        if shown.member is None or shown.member < state.next_member:  # the log here knows that seat, and it has left
            raise Refused("The seat of this pass is void: ask for a new one.")
        self._expire_later(peer, shown.not_after + GRACE.value - self._now())

    def _expire_later(self, peer: PeerId, seconds: float) -> None:
        if peer in self._by_pass:
            self._by_pass.pop(peer).cancel()
        self._by_pass[peer] = asyncio.get_running_loop().call_later(seconds, self._expire, peer)

    def _expire(self, peer: PeerId) -> None:
        self._by_pass.pop(peer, None)
        if self._state().member_of(peer) is None:
            self._hang_up(peer, "its pass has expired, and the log knows no seat of it")


def _ignored(_peer: PeerId, _reason: str) -> None:
    """Nothing is connected yet."""


__all__ = ["OPEN", "Doorkeeper"]
