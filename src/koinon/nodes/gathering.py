"""Asking the seats what they hold of the log: the first thing that the holder of a new term does.

Each seat that answers heeds no lower term from then on, so what it told is all that it will ever know of them.
Knows nothing of what the records mean.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from koinon.errors import FrameMalformed, NobodyAnswers, PeerError, Refused
from koinon.net.transport import Transport
from koinon.nodes import messages as m
from koinon.nodes.clock import loop_time
from koinon.run.record import Record, decode_record
from koinon.run.terms import has_enough, is_alone
from koinon.units import PeerId, Seconds

TAIL_LIMIT = 4096
"""Records that are taken from one seat at most."""
_PAUSE = 0.05


@dataclass(slots=True)
class Answer:
    """What one seat holds behind the successor's own copy."""

    records: list[Record] = field(default_factory=list)
    newest: int = 0
    """Place of the newest record that it holds."""


async def gather(
    transport: Transport,
    seats: Iterable[PeerId],
    *,
    term: int,
    first: int,
    clock: Callable[[], float] = loop_time,
) -> dict[PeerId, Answer]:
    """The tails from record `first` on, of the seats that answer; ends as `has_enough` says. Raises NobodyAnswers."""
    answers: dict[PeerId, Answer] = {}
    took: list[float] = []
    began = clock()

    async def ask(peer: PeerId) -> None:
        found = await _tail_of(transport, peer, term, first)
        answers[peer] = found
        took.append(clock() - began)

    asked = [asyncio.create_task(ask(peer)) for peer in seats]
    try:
        while not has_enough(took, len(asked), waited := Seconds(clock() - began)):
            if is_alone(len(took), len(asked), waited):
                raise NobodyAnswers(len(asked))
            await asyncio.sleep(_PAUSE / 5)
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
    return answers


async def _tail_of(transport: Transport, peer: PeerId, term: int, first: int) -> Answer:
    """Page by page, again and again until the seat answers: whoever waits for it decides how long."""
    found = Answer()
    while True:
        wanted = m.TailWanted(term, first + len(found.records))
        try:
            reply = await transport.request(peer, m.CTL, wanted)
        except Refused:
            await asyncio.sleep(10 * _PAUSE)  # it does not see our term yet
            continue
        except PeerError:
            await asyncio.sleep(_PAUSE)
            continue
        assert isinstance(reply.header, m.Tail)
        found.newest = reply.header.newest
        with contextlib.suppress(FrameMalformed):
            page = [decode_record(raw) for raw in reply.header.records]
            found.records += page
            if page and wanted.first + len(page) <= found.newest and len(found.records) < TAIL_LIMIT:
                continue
        return found
