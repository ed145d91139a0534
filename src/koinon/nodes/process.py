"""A worker as a process: options in, exit status out. Signals end it cleanly; its host's death ends it too.

Knows nothing of how it was started.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from pathlib import Path
from typing import Any

import msgspec

from koinon.errors import KoinonError
from koinon.units import Bytes, PeerId, RunId

log = logging.getLogger(__name__)
STATE_LIMIT = Bytes.gib(4)


class WorkerOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that a worker process must be told."""

    directory: str
    """Its own folder: node key, snapshots, text log."""
    run: str
    coordinator: str
    coordinator_addresses: tuple[str, ...]
    account: str
    stage: int | None = None
    secret: str | None = None
    """Hex; what a founding replica draws its stage from. Without one: fresh entropy."""
    bind: str = "127.0.0.1:0"
    faults: tuple[tuple[str, int], ...] = ()
    """Points and steps at which it kills itself; see `koinon.nodes.faults`."""
    terms: str | None = None
    """Path of the term store, where the run has one: who coordinates, if the one named here does no more."""
    threads: int = 1


def main(options: dict[str, Any]) -> int:
    """Run one worker until its run ends. 0: ended as it should; 1: an error, which its text log names."""
    parsed = msgspec.convert(options, WorkerOptions)
    directory = Path(parsed.directory)
    directory.mkdir(parents=True, exist_ok=True)
    logging.raiseExceptions = False  # a full disk takes no lines; that is no reason to write tracebacks to a terminal
    logging.basicConfig(
        filename=directory / "worker.log", level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    try:
        asyncio.run(_work(parsed))
    except KoinonError as error:
        log.error("%s", error)  # noqa: TRY400 - the sentence is the message
        return 1
    except Exception:
        log.exception("the worker broke")
        return 1
    return 0


async def _work(options: WorkerOptions) -> None:
    import torch

    from koinon.net.identity import NodeKey
    from koinon.net.iroh_transport import IrohTransport
    from koinon.net.transport import NodeAddr
    from koinon.nodes.compute import ThreadCompute
    from koinon.nodes.faults import killed_at
    from koinon.nodes.switchboard import Switchboard
    from koinon.nodes.worker import Worker
    from koinon.run.termfile import FileTermStore

    torch.set_num_threads(options.threads)
    directory = Path(options.directory)
    key = NodeKey.load_or_create(directory / "key")
    transport = IrohTransport(key, bind=options.bind)
    board, compute = Switchboard(STATE_LIMIT), ThreadCompute()
    worker = Worker(
        transport,
        board,
        key,
        compute,
        coordinator=PeerId(options.coordinator),
        run=RunId(options.run),
        directory=directory,
        account=options.account,
        stage=options.stage,
        secret=bytes.fromhex(options.secret) if options.secret else None,
        reach=killed_at(options.faults),
        terms=FileTermStore(Path(options.terms), RunId(options.run)) if options.terms else None,
    )
    address = await transport.start(board.services())
    transport.learn(NodeAddr(PeerId(options.coordinator), options.coordinator_addresses))
    watch = asyncio.create_task(_leave_on_signal(worker))
    try:
        await worker.run(address.addresses)
    finally:
        watch.cancel()
        await transport.close()
        compute.close()


async def _leave_on_signal(worker: Any) -> None:
    """SIGTERM, or a host that is gone: end cleanly."""
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    host = os.getppid()
    while not told.is_set() and os.getppid() == host:
        try:
            async with asyncio.timeout(1.0):
                await told.wait()
        except TimeoutError:
            continue
    worker.end()
