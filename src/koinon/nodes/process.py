"""A worker as a process: options in, exit status out. Signals end it cleanly; its host's death ends it too.

Knows nothing of how it was started.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from koinon.errors import KoinonError, PeerError, Refused
from koinon.net.passes import AddressRecord
from koinon.nodes.compute import Compute, ThreadCompute
from koinon.nodes.report import Report
from koinon.units import Bytes, PeerId, RunId, Seconds

if TYPE_CHECKING:
    from koinon.net.transport import Transport
    from koinon.nodes.worker import Worker

log = logging.getLogger(__name__)
STATE_LIMIT = Bytes.gib(4)
GOODBYE = Seconds(3.0)
"""How long a worker that was told to end may take for it."""
REPORT_EVERY = Seconds(0.5)
Tell = Callable[[Report], None]


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
    advertise: tuple[str, ...] = ()
    """Where others reach it, if not where it listens."""
    whereabouts: AddressRecord | None = None
    """The coordinator's own word on where it is, for those who hold an old invitation."""


def _nobody(_report: Report) -> None:
    """Nobody watches."""


def main(options: dict[str, Any], tell: Tell = _nobody, *, make_compute: Callable[[], Compute] = ThreadCompute) -> int:
    """Run one worker until its run ends. 0: ended as it should; 1: an error, which its text log names.

    tell: hears what the worker does, twice a second.
    """
    parsed = msgspec.convert(options, WorkerOptions)
    directory = Path(parsed.directory)
    directory.mkdir(parents=True, exist_ok=True)
    logging.raiseExceptions = False  # a full disk takes no lines; that is no reason to write tracebacks to a terminal
    logging.basicConfig(
        filename=directory / "worker.log", level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    try:
        asyncio.run(_work(parsed, tell, make_compute))
    except KoinonError as error:
        log.error("%s", error)  # noqa: TRY400 - the sentence is the message
        tell(Report("ended", error=str(error), is_refused=isinstance(error, Refused)))
        return 1
    except Exception as error:
        log.exception("the worker broke")
        tell(Report("ended", error=f"The worker broke ({error!r}): {directory / 'worker.log'} has the account of it."))
        return 1
    return 0


async def _work(options: WorkerOptions, tell: Tell, make_compute: Callable[[], Compute]) -> None:
    import torch

    from koinon.net.identity import NodeKey
    from koinon.net.iroh_transport import IrohTransport
    from koinon.net.transport import NodeAddr
    from koinon.nodes.doorkeeper import Doorkeeper
    from koinon.nodes.faults import killed_at
    from koinon.nodes.introducer import Introducer
    from koinon.nodes.switchboard import Switchboard
    from koinon.nodes.worker import Worker
    from koinon.run.termfile import FileTermStore

    torch.set_num_threads(options.threads)
    directory = Path(options.directory)
    key = NodeKey.load_or_create(directory / "key")
    door = Doorkeeper(PeerId(options.coordinator), RunId(options.run))
    transport = IrohTransport(key, bind=options.bind, advertise=options.advertise, gate=door.admit, knows=door.knows)
    board, compute = Switchboard(STATE_LIMIT), make_compute()
    terms = FileTermStore(Path(options.terms), RunId(options.run)) if options.terms else None
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
        terms=terms,
    )
    door.watch(lambda: worker.state, transport.hang_up, None if terms is None else terms.read)
    Introducer(board, options.whereabouts)
    address = await transport.start(board.services())
    transport.learn(NodeAddr(PeerId(options.coordinator), options.coordinator_addresses))
    running = asyncio.create_task(worker.run(address.addresses))
    others = [
        asyncio.create_task(_leave_on_signal(worker, running, transport)),
        asyncio.create_task(_report(worker, transport, tell)),
    ]
    try:
        await asyncio.wait({running})
        if not running.cancelled():
            running.result()
        tell(_reported(worker, transport))
    finally:
        for task in others:
            task.cancel()
        await transport.close()
        compute.close()


async def _report(worker: Worker, transport: Transport, tell: Tell) -> None:
    while True:
        tell(_reported(worker, transport))
        await asyncio.sleep(REPORT_EVERY.value)


def _reported(worker: Worker, transport: Transport) -> Report:
    received = sum(sum(link.received.values()) for link in transport.links().values())
    return msgspec.structs.replace(worker.report(), received=received)


async def _leave_on_signal(worker: Worker, running: asyncio.Task[None], transport: Transport) -> None:
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
    await asyncio.wait({running}, timeout=GOODBYE.value)
    if not running.done():  # it waits for a seat or for its stage's state
        await _give_back(worker, transport)
        running.cancel()


async def _give_back(worker: Worker, transport: Transport) -> None:
    """Nobody need wait for a seat that was taken and not used yet, or keep a place in line."""
    from koinon.nodes import messages as m

    with contextlib.suppress(PeerError):
        await worker.applicant.withdraw()
    seat = worker.state.member_of(transport.me)
    if seat is not None:
        with contextlib.suppress(PeerError):
            leaving = m.Leave(seat.member, "its process was told to end before it was ready")
            await worker.follower.ask(leaving, deadline=Seconds(1.0))
