"""A control process that can be killed: coordinator and trainer, or a standby for them. Loads no torch.

Options in, exit status out: 0 when the run has ended or this process was told to, 1 for an error, which `control.log`
in its directory names (that its term is over, say). Started by `koinon.nodes.controls` as

    python -m koinon.nodes.controlling '{"directory": ..., "run": ..., ...}'

it says on one line where it can be reached, and ends when its standard input does. Knows nothing of workers' processes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from koinon.errors import KoinonError
from koinon.net.identity import NodeKey
from koinon.net.transport import NodeAddr, Transport
from koinon.nodes.control import Control, reopen
from koinon.nodes.coordinator import FAREWELL
from koinon.nodes.doorkeeper import Doorkeeper
from koinon.nodes.process import STATE_LIMIT
from koinon.nodes.rundir import RunDir
from koinon.nodes.standby import Standby
from koinon.nodes.switchboard import Switchboard
from koinon.run.termfile import FileTermStore
from koinon.units import PeerId, RunId

log = logging.getLogger(__name__)
Started = Callable[[NodeAddr], None]


class ControlOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    directory: str
    """Its own: node key, log, and `control.log`."""
    run: str
    terms: str
    """Path of the term store, the same for all processes of the run."""
    coordinator: str = ""
    """Whom to stand by for; empty: this process opens the run in its directory and coordinates."""
    coordinator_addresses: tuple[str, ...] = ()
    data: str | None = None
    """Prepared data, if they do not lie in the directory."""
    resume_step: int | None = None
    bind: str = "127.0.0.1:0"
    trains: bool = True
    lingers: bool = False
    """Serve followers after the run's end, until told to stop."""


async def coordinate_or_stand_by(options: ControlOptions, stop: asyncio.Event, started: Started) -> None:
    """Until the run has ended or `stop` is set; `started` is told where this node listens. Raises KoinonError."""
    from koinon.net.iroh_transport import IrohTransport

    directory, run = RunDir(Path(options.directory)), RunId(options.run)
    terms, board = FileTermStore(Path(options.terms), run), Switchboard(STATE_LIMIT)
    elsewhere = f"{options.bind.rpartition(':')[0]}:0"

    def dialler() -> Transport:
        return IrohTransport(NodeKey.generate(), bind=elsewhere)

    if not options.coordinator:
        opened = reopen(directory)
        door = Doorkeeper(opened.key.peer_id, run)
        transport = IrohTransport(opened.key, bind=options.bind, gate=door.admit, knows=door.knows)
        control = Control(opened, transport, board, trains=options.trains, dialler=dialler, terms=terms)
        door.watch(lambda: control.coordinator.state, transport.hang_up, terms.read)
        if options.resume_step is not None:
            control.resume(options.resume_step)
        try:
            started(await control.start())
            await _coordinate(control, stop, options)
        finally:
            await control.close()
        return
    key = NodeKey.load_or_create(directory.key)
    door = Doorkeeper(PeerId(options.coordinator), run)
    transport = IrohTransport(key, bind=options.bind, gate=door.admit, knows=door.knows)
    standby = Standby(
        transport,
        board,
        key,
        coordinator=PeerId(options.coordinator),
        run=run,
        directory=directory,
        terms=terms,
        data=Path(options.data) if options.data else None,
        trains=options.trains,
        dialler=dialler,
    )
    door.watch(lambda: standby.state, transport.hang_up, terms.read)
    address = await transport.start(board.services())
    transport.learn(NodeAddr(PeerId(options.coordinator), options.coordinator_addresses))
    started(address)
    try:
        await _stand_by(standby, address, stop, options)
    finally:
        await transport.close()
        standby.close()


async def _stand_by(standby: Standby, address: NodeAddr, stop: asyncio.Event, options: ControlOptions) -> None:
    standing, told = asyncio.create_task(standby.run(address.addresses)), asyncio.create_task(stop.wait())
    await asyncio.wait([standing, told], return_when=asyncio.FIRST_COMPLETED)
    told.cancel()
    if not standing.done():
        standing.cancel()
        await asyncio.gather(standing, return_exceptions=True)
    elif (control := standing.result()) is not None:
        try:
            await _coordinate(control, stop, options)
        finally:
            await control.close()


async def _coordinate(control: Control, stop: asyncio.Event, options: ControlOptions) -> None:
    ended, told = asyncio.create_task(control.ended()), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([ended, told], return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            await control.drain("asked to stop")
            return
        ended.result()
        if options.lingers:
            await stop.wait()
        else:
            await asyncio.sleep(FAREWELL.value)
    finally:
        ended.cancel()
        told.cancel()


def main(options: ControlOptions) -> int:
    """The process. Its end is its status."""
    directory = Path(options.directory)
    directory.mkdir(parents=True, exist_ok=True)
    logging.raiseExceptions = False
    logging.basicConfig(
        filename=directory / "control.log", level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    try:
        asyncio.run(_serve(options))
    except KoinonError as error:
        log.error("%s", error)  # noqa: TRY400 - the sentence is the message
        return 1
    except Exception:
        log.exception("the control process broke")
        return 1
    return 0


async def _serve(options: ControlOptions) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_reader(0, lambda: stop.set() if not sys.stdin.buffer.read1(64) else None)  # type: ignore[union-attr]

    def say(address: NodeAddr) -> None:
        print(json.dumps({"peer": address.peer, "addresses": address.addresses}), flush=True)

    await coordinate_or_stand_by(options, stop, say)


if __name__ == "__main__":
    sys.exit(main(msgspec.json.decode(sys.argv[1], type=ControlOptions)))
