"""What the tests of `net` share: a tiny vocabulary, and nodes on either carrier that know each other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from hashlib import sha256
from typing import Any

from koinon.net.clock import run_virtual
from koinon.net.exchange import Exchange
from koinon.net.frames import Header, NBytes, Wire
from koinon.net.identity import NodeKey
from koinon.net.iroh_transport import IrohTransport
from koinon.net.memory import Faults, Hub, MemoryTransport
from koinon.net.transport import Gate, Hello, NodeAddr, Service, open_gate, up_to

WORK, CTL = "test/work/1", "test/ctl/1"


class Ask(Header, frozen=True):
    word: str
    nbytes: NBytes = 0


class Tell(Header, frozen=True):
    word: str
    nbytes: NBytes = 0


class Stray(Header, frozen=True):
    """On no wire."""


ASKS, TELLS = Wire(Ask), Wire(Tell)


async def echo(_peer: str, message: Any, body: bytearray) -> Any:
    return Tell(message.word, len(body)), body


def service(handler: Any = echo, alpn: str = WORK, **options: Any) -> Service:
    options.setdefault("body_limit", up_to(1 << 26))
    return Service(alpn, ASKS, TELLS, handler, **options)


def key(name: str) -> NodeKey:
    """The same key for the same name, so that a failure happens again."""
    return NodeKey(sha256(name.encode()).digest())


class Net:
    """Nodes of one test. `carrier` is "memory" or "iroh"."""

    def __init__(self, carrier: str, faults: Faults | None = None, seed: int = 0) -> None:
        self.carrier = carrier
        self.hub = Hub(seed, faults)
        self.nodes: list[Exchange] = []

    async def node(
        self,
        name: str,
        services: Sequence[Service] | None = None,
        *,
        hello: Hello | None = None,
        gate: Gate = open_gate,
        known: bool = True,
    ) -> Any:
        """A started node. `known`: it and the nodes before it can dial each other."""
        node: Any
        if self.carrier == "memory":
            node = MemoryTransport(self.hub, key(name), hello=hello, gate=gate)
        else:
            node = IrohTransport(key(name), bind="127.0.0.1:0", hello=hello, gate=gate)
        addr: NodeAddr = await node.start([service()] if services is None else services)
        node.addr = addr
        if known:
            for other in self.nodes:
                other.learn(addr)
                node.learn(other.addr)  # type: ignore[attr-defined]
        self.nodes.append(node)
        return node

    async def close(self) -> None:
        await asyncio.gather(*(node.close() for node in self.nodes))  # type: ignore[attr-defined]


def play(carrier: str, scene: Callable[[Net], Awaitable[None]], **options: Any) -> None:
    """Run a scene: in virtual time on the twin, in real time on the network."""

    async def main() -> None:
        net = Net(carrier, **options)
        try:
            await scene(net)
        finally:
            await net.close()

    if carrier == "memory":
        run_virtual(main())
    else:
        asyncio.run(main())
