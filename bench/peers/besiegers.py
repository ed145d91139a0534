"""Clients of `bench.admission`, in a process of their own: many keys that ask for a seat over the real transport.

Options come as JSON on the command line; "ready" is printed when every key has its connection and its number, and one
JSON line at the end. Loopback only, bounded in time and in number.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import iroh

from koinon.errors import PeerError
from koinon.net.identity import NodeKey
from koinon.net.iroh_transport import IrohTransport
from koinon.net.transport import NodeAddr
from koinon.nodes import messages as m
from koinon.nodes.switchboard import Switchboard
from koinon.units import Bytes, PeerId, Seconds

HOSTILE_EVERY = 0.25


@dataclass(frozen=True)
class Siege:
    """`rate`: requests per second of all keys together; None: as fast as they are answered. `redials`: a connection per
    request, as whoever asks every ten minutes needs. `hostile`: and beside them connections that say nothing, and
    streams of rubbish. `niceness`: so much they leave the processor to others."""

    peer: str
    addresses: tuple[str, ...]
    keys: int
    seconds: float
    rate: float | None = None
    redials: bool = False
    hostile: bool = False
    niceness: int = 0


class Crowd:
    def __init__(self, siege: Siege) -> None:
        self.siege, self.numbers, self.answered, self.refused = siege, list[int](), 0, 0

    async def run(self) -> None:
        asking = [asyncio.create_task(self._one(number)) for number in range(self.siege.keys)]
        while len(self.numbers) < self.siege.keys and not all(task.done() for task in asking):
            await asyncio.sleep(0.05)
        self.answered = self.refused = 0
        print("ready", flush=True)
        hostile = asyncio.create_task(self._annoy()) if self.siege.hostile else None
        began = time.monotonic()
        await asyncio.sleep(self.siege.seconds)
        took = time.monotonic() - began
        print(json.dumps({"answered": self.answered, "refused": self.refused, "seconds": took}), flush=True)
        for task in [*asking, *([hostile] if hostile else [])]:
            task.cancel()

    async def _one(self, number: int) -> None:
        node = IrohTransport(NodeKey.generate(), bind="127.0.0.1:0")
        await node.start(Switchboard(Bytes.mib(1)).services())
        coordinator = PeerId(self.siege.peer)
        node.learn(NodeAddr(coordinator, self.siege.addresses))
        wish = m.Join(f"besieger-{node.me[:12]}", (), "wish")
        pause = self.siege.keys / self.siege.rate if self.siege.rate else 0.0
        while True:
            try:
                reply = await node.request(coordinator, m.JOIN, wish, deadline=Seconds(20.0))
            except PeerError:
                self.refused += 1
                await asyncio.sleep(0.2)
                continue
            if isinstance(reply.header, m.Waiting):
                self.answered += 1
                if len(self.numbers) < self.siege.keys and self.answered <= self.siege.keys:
                    self.numbers.append(reply.header.ticket)
            if self.siege.redials:
                node.hang_up(coordinator, "until next time")
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))

    async def _annoy(self) -> None:
        options = iroh.EndpointOptions(
            preset=iroh.preset_minimal(),
            relay_mode=iroh.RelayMode.disabled(),
            bind_addr="127.0.0.1:0",
            secret_key=NodeKey.generate().raw,
            alpns=[],
        )
        endpoint = await iroh.Endpoint.bind(options)
        where = iroh.EndpointAddr(iroh.EndpointId.from_string(self.siege.peer), None, list(self.siege.addresses))
        for rubbish in _rubbish():
            with contextlib.suppress(iroh.IrohError):
                connection = await endpoint.connect(where, m.JOIN.encode())
                if rubbish:
                    await (await connection.open_bi()).send().write_all(rubbish)
            await asyncio.sleep(HOSTILE_EVERY)


def _rubbish() -> Iterator[bytes]:
    """Nothing, a length that is too long, a frame that is none, the beginning of one."""
    while True:
        yield from (b"", b"\xff" * 64, b"\x00\x00\x00\x10" + b"\xc1" * 16, b"\x00\x00\x0f\x00\x93")


def command(siege: Siege) -> list[str]:
    return [sys.executable, "-m", "bench.peers.besiegers", json.dumps(asdict(siege))]


def main() -> None:
    given: dict[str, Any] = json.loads(sys.argv[1])
    siege = Siege(**{**given, "addresses": tuple(given["addresses"])})
    os.nice(siege.niceness)
    asyncio.run(Crowd(siege).run())
    sys.stdout.flush()
    os._exit(0)  # some hundred endpoints need no good-bye


if __name__ == "__main__":
    main()
