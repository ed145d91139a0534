"""A node of its own process that echoes, for tests that kill it: `python -m tests.net.echo_node KEY_NAME HOST:PORT`."""

from __future__ import annotations

import asyncio
import sys

from koinon.net.iroh_transport import IrohTransport
from tests.net.support import key, service


async def main(name: str, bind: str) -> None:
    node = IrohTransport(key(name), bind=bind)
    addr = await node.start([service()])
    print(addr.addresses[0], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
