"""The way into a run, hop by hop: each is tried in order, and the first that fails ends the walk with what to do.

    invitation, clock, software, UDP socket, dial, protocol, clock against the coordinator, run,
    round trip, up, down, link against the spec, seen from outside, memory, disk, compute, link against compute

Everything before `memory` takes about a second; nothing is downloaded. Knows nothing of terminals.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from koinon.errors import (
    DeadlinePassed,
    FrameError,
    InvitationError,
    InvitationExpired,
    KoinonError,
    PeerError,
    PeerUnreachable,
    ProtocolMismatch,
    Refused,
    SpecError,
    StateError,
)
from koinon.net.identity import NodeKey
from koinon.net.invitation import Invitation, day, read
from koinon.net.passes import AddressRecord, verify_record
from koinon.net.transport import PROTOCOL, NodeAddr, Transport
from koinon.nodes import join_messages as j
from koinon.nodes import machine
from koinon.nodes import messages as m
from koinon.nodes.calibration import Progress, calibrate
from koinon.nodes.findings import Finding, Verdict, bad, doubtful, good
from koinon.nodes.introducer import Introducer
from koinon.nodes.linkmeter import ANSWER, ECHOES, LinkMeter
from koinon.nodes.machine import Calibration, LinkMeasured
from koinon.nodes.needs import needs
from koinon.nodes.reception import answer_at, stranger
from koinon.nodes.switchboard import Switchboard
from koinon.run.spec import RunSpec
from koinon.run.state import Phase
from koinon.units import BitsPerSecond, Bytes, PeerId, Seconds

MakeTransport = Callable[[NodeKey, str], Transport]
"""A transport of that key, bound to that address."""
REACH_PATIENCE: Final = Seconds(15.0)
FIREWALL: Final = "Check that the league runs, and that UDP to this address is open on both sides (firewall, router)."


@dataclass(frozen=True, slots=True)
class Way:
    """How this machine goes: its own key and socket. `advertise`: where it can be reached, if not where it listens."""

    directory: Path
    key: NodeKey
    make: MakeTransport
    bind: str = "0.0.0.0:0"
    advertise: tuple[str, ...] = ()
    threads: int = 1
    now: Callable[[], float] = time.time


@dataclass(slots=True)
class Learned:
    """What a walk has found out so far."""

    invitation: Invitation | None = None
    opened: j.Opened | None = None
    spec: RunSpec | None = None
    coordinator: tuple[str, ...] = ()
    """Addresses of the coordinator that answered."""
    mine: tuple[str, ...] = ()
    port: int = 0
    """Where this machine listened."""
    link: LinkMeasured | None = None
    computed: Calibration | None = None
    waits: bool = False
    """Everything is well, but there is no seat (now)."""


class Examination:
    """One walk. `text` None: this machine alone. `learned` is filled on the way."""

    def __init__(self, text: str | None, way: Way, progress: Progress = lambda _share: None) -> None:
        self._text, self._way, self._progress = text, way, progress
        self.learned = Learned()
        self._began = 0.0

    async def walk(self, *, computes: bool = True) -> AsyncIterator[Finding]:
        """The findings in order; none follows a bad one. Go on to the end: there the socket is closed.

        computes: False leaves out the calibration.
        """
        async with aclosing(self._hops(computes)) as hops:  # the socket is closed now, and not when somebody cleans up
            async for finding in hops:
                yield finding
                if finding.verdict is Verdict.BAD:
                    return

    async def _hops(self, computes: bool) -> AsyncGenerator[Finding]:
        if self._text is not None:
            yield self._invitation(self._text)
            yield self._clock()
        facts = machine.facts(self._way.directory)
        yield machine.check_software(facts)
        board = Switchboard(Bytes(j.PROBE_LIMIT))
        Introducer(board, None)
        transport = self._way.make(self._way.key, self._way.bind)
        try:
            yield await self._socket(transport, board)
            if self._text is not None:
                async for finding in self._way_in(transport):
                    yield finding
        finally:
            await transport.close()
        asked = needs(self._spec())
        yield machine.check_memory(facts, asked)
        yield machine.check_disk(facts, asked)
        if computes:
            yield await self._compute()
        if self.learned.link is not None and self.learned.computed is not None:
            yield machine.check_balance(self.learned.link, self.learned.computed, self._spec())

    async def _way_in(self, transport: Transport) -> AsyncIterator[Finding]:
        yield await self._dial()
        yield await self._protocol(transport)
        yield self._agreement()
        yield self._run()
        meter = LinkMeter(transport, self._given().coordinator)
        for hop, measure in (("round trip", self._rtt), ("up", self._up), ("down", self._down)):
            yield await self._measured(hop, measure(hop, meter))
        yield machine.check_link(self._link(), self._spec())
        yield await self._seen(transport)

    # --- before anything is sent

    def _invitation(self, text: str) -> Finding:
        try:
            self.learned.invitation = given = read(text)
        except InvitationError as error:
            return bad("invitation", str(error), "")
        others = f" and {len(given.introducers)} who introduce" if given.introducers else ""
        where = ", ".join(given.addresses) or "no address"
        return good("invitation", f"To run {given.run[:10]} of {given.coordinator[:10]} at {where}{others}.")

    def _clock(self) -> Finding:
        given, now = self._given(), self._way.now()
        try:
            given.check_time(now)
        except InvitationExpired as error:
            return bad("clock", str(error), "")
        return good("clock", f"{day(now)}; the invitation is good until {day(given.not_after)}.")

    async def _socket(self, transport: Transport, board: Switchboard) -> Finding:
        hop = "UDP socket"
        try:
            mine = await transport.start(board.services())
        except KoinonError as error:
            return bad(hop, str(error), "Choose another with --bind.")
        self.learned.mine = self._way.advertise or mine.addresses
        port = mine.addresses[0].rpartition(":")[2]
        self.learned.port = int(port) if port.isdigit() else 0
        told = f"; told to others as {', '.join(self._way.advertise)}" if self._way.advertise else ""
        return good(hop, f"Listening at {', '.join(mine.addresses)}{told}.")

    # --- the way there

    async def _dial(self) -> Finding:
        given = self._given()
        answers = await self._try(given.coordinator, given.addresses)
        if not any(_connected(answer) for answer in answers.values()) and given.introducers:
            known = await self._ask_introducers(given)
            answers |= await self._try(given.coordinator, [a for a in known if a not in answers])
        self.learned.coordinator = tuple(address for address, answer in answers.items() if _connected(answer))
        told = "; ".join(f"{address}: {answer or 'there'}" for address, answer in answers.items())
        if self.learned.coordinator:
            return good("dial", f"{told}.")
        moved = (
            "It may have moved: ask for a new invitation. " if answers else "Ask for an invitation with an address. "
        )
        return bad("dial", f"Nobody answers as {given.coordinator[:10]} ({told or 'no address'}).", moved + FIREWALL)

    async def _try(self, peer: PeerId, addresses: Sequence[str]) -> dict[str, str]:
        """What each address answers: "" if `peer` is there, else the error."""
        answers = await asyncio.gather(*(self._try_one(peer, address) for address in addresses))
        return dict(zip(addresses, answers, strict=True))

    async def _try_one(self, peer: PeerId, address: str) -> str:
        """With a socket of its own, so that no address profits from another."""
        try:
            found = await resolved(address)
        except OSError as error:
            return f"the name is not known ({error.strerror or error})"
        async with stranger(lambda: self._way.make(NodeKey.generate(), _any_port(self._way.bind))) as node:
            node.learn(NodeAddr(peer, found))
            try:
                await node.request(peer, m.JOIN, j.Knock(), deadline=ANSWER)
            except (Refused, ProtocolMismatch) as error:
                return f"{_ANSWERED}{error}"
            except PeerError as error:
                return answer_at(found[0], error)
        return ""

    async def _ask_introducers(self, given: Invitation) -> tuple[str, ...]:
        """Where the coordinator is now, as the newest record says that a peer of the run has."""
        records = await asyncio.gather(*(self._introduced(peer, given) for peer in given.introducers))
        newest = max((r for r in records if r is not None), default=None, key=lambda record: record.sequence)
        return () if newest is None else newest.addresses

    async def _introduced(self, peer: NodeAddr, given: Invitation) -> AddressRecord | None:
        async with stranger(lambda: self._way.make(NodeKey.generate(), _any_port(self._way.bind))) as node:
            node.learn(peer)
            try:
                reply = await node.request(peer.peer, m.JOIN, j.Whereabouts(given.run), deadline=ANSWER)
                assert isinstance(reply.header, j.Known)
                record = reply.header.record
                if record.node != given.coordinator:
                    return None
                return verify_record(record, run=given.run, now=self._way.now())
            except PeerError:
                return None

    async def _protocol(self, transport: Transport) -> Finding:
        hop, given = "protocol", self._given()
        transport.learn(NodeAddr(given.coordinator, await self.coordinator()))
        self._began = self._way.now()
        try:
            reply = await transport.request(given.coordinator, m.JOIN, j.Knock(), deadline=ANSWER)
        except ProtocolMismatch as error:
            return bad(hop, f"The versions have nothing in common: {error}.", "")
        except FrameError as error:
            return bad(hop, f"It answers in another way ({error}).", "Use the same version of koinon on both sides.")
        except Refused as refusal:
            return bad(hop, f"{refusal}", "If that says nothing else: use the same version of koinon on both sides.")
        except (PeerUnreachable, DeadlinePassed) as error:
            return bad(hop, f"It was there a moment ago, and does not answer now: {error}", "Try again.")
        assert isinstance(reply.header, j.Opened)
        self.learned.opened = reply.header
        return good(hop, f"Both speak {min(PROTOCOL[1], reply.header.protocol[1])}; koinon {reply.header.build} there.")

    async def knock(self) -> j.Opened:
        """Ask again, at the addresses that answered, how the run stands. Raises PeerErrors."""
        given = self._given()
        async with stranger(lambda: self._way.make(self._way.key, _any_port(self._way.bind))) as node:
            node.learn(NodeAddr(given.coordinator, await self.coordinator()))
            reply = await node.request(given.coordinator, m.JOIN, j.Knock(), deadline=ANSWER)
        assert isinstance(reply.header, j.Opened)
        self.learned.opened = reply.header
        return reply.header

    async def coordinator(self) -> tuple[str, ...]:
        """Where the coordinator answered, as IP addresses. Raises OSError for a name that is not known any more."""
        return tuple([ip for address in self.learned.coordinator for ip in await resolved(address)])

    def _agreement(self) -> Finding:
        opened, ended = self._opened(), self._way.now()
        return machine.check_clock(Seconds((self._began + ended) / 2 - opened.now))

    def _run(self) -> Finding:
        hop, given, opened = "run", self._given(), self._opened()
        if opened.run != given.run:
            return bad(
                hop,
                f"The invitation is to run {given.run[:10]}, and this coordinator now leads run {opened.run[:10]}.",
                "Ask for a new invitation.",
            )
        try:
            self.learned.spec = spec = RunSpec.parse(opened.spec, source="the run's spec")
        except SpecError as error:
            return bad(hop, str(error), "Use the version of koinon that the league uses.")
        if spec.run_id != opened.run:
            return bad(
                hop, "Its spec does not hash to the run's id.", "Use the version of koinon that the league uses."
            )
        what = f"{spec.name}: step {opened.step} of {spec.train.steps}, {opened.taken} of {opened.places} seats taken"
        if opened.phase == Phase.FAILED:
            return bad(hop, f"{what}. It has failed: {opened.reason}", "Wait until it is resumed.")
        if opened.phase == Phase.COMPLETE:
            return bad(hop, f"{what}. It is complete.", "There is nothing left to do in it.")
        if opened.phase == Phase.STOPPED:
            self.learned.waits = True
            return doubtful(hop, f"{what}. It is stopped: {opened.reason}", "It takes workers again when it goes on.")
        if opened.taken >= opened.places and not opened.has_seat:
            self.learned.waits = True
            return doubtful(hop, f"{what}. The league is full.", "Wait until a seat is free.")
        return good(hop, f"{what}.")

    # --- the link

    async def _measured(self, hop: str, measuring: Awaitable[Finding]) -> Finding:
        try:
            return await measuring
        except PeerError as error:
            return bad(
                hop, f"The measurement broke off: {error}", "Try again; if it happens again, much is lost on the way."
            )

    async def _rtt(self, hop: str, meter: LinkMeter) -> Finding:
        rtt = await meter.rtt()
        self.learned.link = LinkMeasured(rtt, BitsPerSecond(0.0), BitsPerSecond(0.0))
        return good(hop, f"{rtt.value * 1e3:.3g} ms (median of {ECHOES}).")

    async def _up(self, hop: str, meter: LinkMeter) -> Finding:
        link = self._link()
        self.learned.link = measured = replace(link, up=await meter.up(link.rtt))
        return good(hop, f"{machine.mbit(measured.up)}.")

    async def _down(self, hop: str, meter: LinkMeter) -> Finding:
        link = self._link()
        self.learned.link = measured = replace(link, down=await meter.down(link.rtt))
        return good(hop, f"{machine.mbit(measured.down)}.")

    async def _seen(self, transport: Transport) -> Finding:
        hop, mine = "seen from outside", self.learned.mine[: j.ADDRESS_LIMIT]
        try:
            found = [ip for address in mine for ip in await resolved(address)][: j.ADDRESS_LIMIT]
            message = j.Reach(tuple(found))
            reply = await transport.request(self._given().coordinator, m.JOIN, message, deadline=REACH_PATIENCE)
        except (PeerError, OSError) as error:
            return bad(hop, f"The other side could not look: {error}", "Try again in a minute.")
        assert isinstance(reply.header, j.Reached)
        answers = dict(zip(found, reply.header.answers, strict=False))
        told = "; ".join(f"{address}: {answer or 'seen'}" for address, answer in answers.items())
        if "" in answers.values():
            return good(hop, f"{told}.")
        port = mine[0].rpartition(":")[2]
        return bad(
            hop,
            f"Other workers cannot reach this machine ({told}).",
            f"Open UDP port {port} in its firewall; behind a router, forward a UDP port to this machine and say both: "
            f"--bind 0.0.0.0:PORT --advertise PUBLIC-ADDRESS:PORT.",
        )

    # --- the machine

    async def _compute(self) -> Finding:
        try:
            self.learned.computed = computed = await calibrate(self._spec(), self._progress, threads=self._way.threads)
        except StateError as error:
            return bad("compute", str(error), "Close other programs, and try again; or report it.")
        return machine.check_compute(computed)

    def _given(self) -> Invitation:
        assert self.learned.invitation is not None, "the walk ends at the first bad hop"
        return self.learned.invitation

    def _link(self) -> LinkMeasured:
        assert self.learned.link is not None, "the walk ends at the first bad hop"
        return self.learned.link

    def _opened(self) -> j.Opened:
        assert self.learned.opened is not None, "the walk ends at the first bad hop"
        return self.learned.opened

    def _spec(self) -> RunSpec:
        """The run's; without an invitation, one that every machine should be able to serve."""
        return self.learned.spec or RunSpec.recipe("demo")


_ANSWERED: Final = "it answers: "


def _connected(answer: str) -> bool:
    return not answer or answer.startswith(_ANSWERED)


def _any_port(bind: str) -> str:
    return f"{bind.rpartition(':')[0]}:0"


async def resolved(address: str) -> tuple[str, ...]:
    """A host name and port as IP addresses; anything else as it is. Raises OSError if the name is not known."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or host.startswith("[") or host.replace(".", "").isdigit() or host == "memory":
        return (address,)
    found = await asyncio.get_running_loop().getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)
    ips = dict.fromkeys(f"[{where[0]}]:{port}" if ":" in str(where[0]) else f"{where[0]}:{port}" for *_, where in found)
    return tuple(ips)


__all__ = ["Examination", "Learned", "Way", "resolved"]
