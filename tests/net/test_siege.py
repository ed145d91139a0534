"""Strangers who say nothing, drip, shout or send rubbish, over the real network: bounded, and members are served.

Raw connections stand in for hostile ones; loopback only, some dozens at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import iroh
import msgspec
import pytest

from koinon.errors import PeerError, Refused
from koinon.net import iroh_connections, iroh_pipe, turnstile
from koinon.net.allowance import Rate
from koinon.net.identity import NodeKey
from koinon.net.iroh_channel import HELLO, HELLO_LIMIT, STRANGER_HEADER
from koinon.net.iroh_transport import IrohTransport
from koinon.net.threshold import HALF_OPEN, Threshold
from koinon.net.transport import Hello
from koinon.units import PeerId, Seconds
from tests.net.support import WORK, Ask, Tell, key, service

MEMBERS = {key("member").peer_id}


class Siege:
    """A node that knows one member; raw strangers."""

    async def __aenter__(self) -> Siege:
        self.node = IrohTransport(key("node"), bind="127.0.0.1:0", knows=lambda peer: peer in MEMBERS)
        self.address = await self.node.start([service()])
        self.member = await self.friend("member")
        self.raw: list[Any] = []
        return self

    async def __aexit__(self, *_: object) -> None:
        for endpoint in self.raw:
            await endpoint.close()
        await self.member.close()
        await self.node.close()

    async def friend(self, name: str) -> IrohTransport:
        one = IrohTransport(key(name), bind="127.0.0.1:0")
        await one.start([service()])
        one.learn(self.address)
        return one

    async def connect(self) -> Any:
        """A stranger's connection, with nothing said on it yet."""
        options = iroh.EndpointOptions(
            preset=iroh.preset_minimal(),
            relay_mode=iroh.RelayMode.disabled(),
            bind_addr="127.0.0.1:0",
            secret_key=NodeKey.generate().raw,
            alpns=[],
        )
        endpoint = await iroh.Endpoint.bind(options)
        self.raw.append(endpoint)
        where = iroh.EndpointAddr(iroh.EndpointId.from_string(self.address.peer), None, list(self.address.addresses))
        return await endpoint.connect(where, WORK.encode())

    async def introduced(self) -> Any:
        """A stream of a stranger that has said hello."""
        stream = await (await self.connect()).open_bi()
        await stream.send().write_all(HELLO.head(Hello()))
        await stream.recv().read(1024)
        return stream

    async def member_is_served(self) -> None:
        assert (await self.member.request(self.address.peer, WORK, Ask("x"))).header == Tell("x")

    @property
    def connections(self) -> Any:
        return self.node._connections


def besieged(act: Callable[[Siege], Awaitable[None]]) -> None:
    async def go() -> None:
        async with asyncio.timeout(60.0), Siege() as siege:
            await act(siege)

    asyncio.run(go())


def frame(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def test_connections_that_say_nothing_are_closed_and_a_member_gets_in_beside_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Threshold, "patience", lambda _self: Seconds(1.5))

    async def act(siege: Siege) -> None:
        silent = [await siege.connect() for _ in range(12)]
        await siege.member_is_served()
        assert 0 < len(siege.connections._threshold) <= HALF_OPEN
        await asyncio.gather(*(connection.closed() for connection in silent))
        assert len(siege.connections._threshold) == 0
        assert not siege.connections._strangers
        await siege.member_is_served()

    besieged(act)


def test_a_header_that_drips_is_given_up_however_the_bytes_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iroh_pipe, "STALL", Seconds(0.6))

    async def act(siege: Siege) -> None:
        stream = await siege.introduced()
        sent = 0

        async def drip() -> None:
            nonlocal sent
            for byte in frame(b"\x93" * 4000):
                await stream.send().write_all(bytes([byte]))
                sent += 1
                await asyncio.sleep(0.05)

        with pytest.raises(iroh.IrohError):
            await drip()
        assert 1 < sent < 100
        await siege.member_is_served()

    besieged(act)


def test_a_long_hello_and_a_long_header_are_refused_before_they_are_read() -> None:
    async def act(siege: Siege) -> None:
        connection = await siege.connect()
        stream = await connection.open_bi()
        await stream.send().write_all((HELLO_LIMIT + 1).to_bytes(4, "big"))
        await connection.closed()
        late = await siege.introduced()
        await late.send().write_all((STRANGER_HEADER + 1).to_bytes(4, "big"))
        assert b"was announced" in await late.recv().read(4096)
        await siege.member_is_served()

    besieged(act)


RUBBISH = {"zeros": b"\x00" * 64, "ones": b"\xff" * 64, "empty": frame(b""), "short": frame(b"\x91\xa3Ask")}


@pytest.mark.parametrize("rubbish", RUBBISH.values(), ids=RUBBISH)
def test_rubbish_ends_its_own_stream_and_nothing_else(rubbish: bytes) -> None:
    async def act(siege: Siege) -> None:
        for stream in [await siege.introduced(), await (await siege.connect()).open_bi()]:
            await stream.send().write_all(rubbish)
        await asyncio.sleep(0.3)
        await siege.member_is_served()

    besieged(act)


def test_a_stranger_that_is_silent_longest_makes_room_and_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iroh_connections, "MAX_STRANGERS", 3)

    async def act(siege: Siege) -> None:
        guests = [await siege.friend(f"guest {number}") for number in range(8)]
        for guest in guests:
            await guest.request(siege.address.peer, WORK, Ask("x"))
            await siege.member_is_served()
        await asyncio.sleep(0.3)
        assert len(siege.connections._strangers) <= 3
        assert siege.connections.standing(MEMBERS.copy().pop(), WORK), "a member is not closed for a stranger"
        assert len(list(siege.node._edges.peers())) <= 5
        assert (await guests[0].request(siege.address.peer, WORK, Ask("again"))).header == Tell("again")
        for guest in guests:
            await guest.close()
        await asyncio.sleep(0.5)
        assert not siege.connections._strangers
        assert set(siege.node._edges.peers()) <= MEMBERS

    besieged(act)


def test_one_key_holds_few_connections_and_begins_few() -> None:
    async def act(siege: Siege) -> None:
        guest = await siege.friend("guest")
        for _ in range(iroh_connections.PER_STRANGER):
            await guest._connections.dial(PeerId(siege.address.peer), WORK)
        with pytest.raises(Refused, match="you hold 8 connections"):
            await guest._connections.dial(PeerId(siege.address.peer), WORK)
        for _ in range(16):
            await siege.member._connections.dial(PeerId(siege.address.peer), WORK)
        for _ in range(int(iroh_connections.CALLS[0].burst)):
            with pytest.raises(PeerError, match=r"8 connections|too often"):
                await guest._connections.dial(PeerId(siege.address.peer), WORK)
        with pytest.raises(PeerError, match="too often; call again in"):
            await guest._connections.dial(PeerId(siege.address.peer), WORK)
        await guest.close()

    besieged(act)


def test_a_flood_of_one_stranger_is_left_unread_and_a_members_requests_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turnstile, "FRAMES", (Rate(5, 5.0), Rate(1000, 1000.0)))

    async def act(siege: Siege) -> None:
        siege.node._turnstile = turnstile.Turnstile()
        siege.node._turnstile._frames = type(siege.node._turnstile._frames)(*turnstile.FRAMES)
        guest = await siege.friend("guest")
        flood = [
            asyncio.ensure_future(guest.request(siege.address.peer, WORK, Ask("x"), deadline=Seconds(60.0)))
            for _ in range(40)
        ]
        for _ in range(40):
            await siege.member_is_served()
        assert sum(one.done() for one in flood) < 30
        for one in flood:
            one.cancel()
        await guest.close()

    besieged(act)


def test_a_hello_fits_its_limit() -> None:
    from koinon.net.passes import issue

    shown = issue(
        key("control"), run="ab" * 32, node=key("a").peer_id, account="a" * 64, role="worker", stage=1, term=9,
        not_after=2**40, member=2**30,
    )  # fmt: skip
    assert len(HELLO.head(Hello(run="ab" * 32, build="1.2.3", boot="c" * 16, shown=shown))) < HELLO_LIMIT // 4
    assert msgspec.msgpack.encode(shown)
