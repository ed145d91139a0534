"""The nodes of a league, each as a process of its own on a host of an emulated network.

    python -m bench.peers.hosted control DIRECTORY ADDRESS SPEC.toml     coordinator and trainer
    python -m bench.peers.hosted workers SLOWER SEATS                    [[namespace, options], ...] as JSON

The control process tells what it knows as JSON lines: first where it can be dialled, then each step with the moment at
which it was measured (the machine's monotonic clock) and what the members have sent. It ends when its input ends.
The workers are forked from a process that has torch loaded, as the product's zygote does it, and each goes to its host
before it does anything else. These are the product's own nodes, but for one thing: each worker has a core of its own
that is SLOWER times slower than this machine's: see `SlowedCompute`.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from bench.wan.machine import enter, hurry
from koinon.net.iroh_transport import IrohTransport
from koinon.nodes.compute import ThreadCompute
from koinon.nodes.control import Control, create
from koinon.nodes.process import STATE_LIMIT, main
from koinon.nodes.rundir import RunDir
from koinon.nodes.switchboard import Switchboard
from koinon.run import events as ev
from koinon.run.spec import RunSpec

T = TypeVar("T")


class SlowedCompute(ThreadCompute):
    """A core that nobody else uses, `slower` times slower than this machine's.

    A job takes that many times the CPU time that it really needed; the thread sleeps through the rest. Five hosts then
    fit on two cores, each at the speed that it would have alone. Where the machine is so busy that a job took longer
    than that anyway, the excess is counted.
    """

    def __init__(self, slower: float, told: Path) -> None:
        """told: the file that holds the seconds in excess."""
        super().__init__()
        self._slower, self._overrun = slower, 0.0
        self._told = told

    async def run(self, job: Callable[[], T]) -> T:
        return await super().run(lambda: self._slowed(job))

    def _slowed(self, job: Callable[[], T]) -> T:
        began, cpu = time.perf_counter(), time.thread_time()
        done = job()
        rest = self._slower * (time.thread_time() - cpu) - (time.perf_counter() - began)
        if rest > 0:
            time.sleep(rest)
        else:
            self._overrun -= rest
            self._told.write_text(f"{self._overrun:.6f}")
        return done


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


async def control(directory: Path, address: str, spec: RunSpec) -> None:
    """Coordinator and trainer until the input ends, then drained."""
    run = create(spec, RunDir(directory), lambda *_: None)
    node = Control(run, IrohTransport(run.key, bind=f"{address}:0"), Switchboard(STATE_LIMIT))

    def heard(event: ev.Event, _state: object) -> None:
        match event:
            case ev.StepMeasured(step=step, loss=loss):
                told = node.coordinator.telemetry.values()
                say(
                    step=step,
                    at=time.monotonic(),
                    loss=loss,
                    boundary_bytes=sum(t.boundary_bytes for t in told),
                    boundary_tokens=sum(t.boundary_tokens for t in told),
                    recomputed_flops=sum(t.recomputed_flops for t in told),
                )
            case ev.RunFailed(reason=reason):
                say(failed=reason)
            case _:
                pass

    node.follower.listen(heard)
    found = await node.start()
    say(peer=found.peer, addresses=found.addresses, run=spec.run_id)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await node.drain("measured")
    await node.close()


def workers(slower: float, seats: list[tuple[str, dict[str, Any]]]) -> None:
    """One process per seat, each in its namespace; until all have ended. SIGTERM is passed on to them."""
    import torch

    from koinon.nodes.engine import warm_up

    torch.set_num_threads(1)
    warm_up()
    children = [_worker(slower, name, options) for name, options in seats]

    def end(*_: object) -> None:
        for child in children:
            os.kill(child, signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    for child in children:
        os.waitpid(child, 0)


def _worker(slower: float, name: str, options: dict[str, Any]) -> int:
    """Id of the process."""
    if child := os.fork():
        return child
    status = 1
    try:
        enter(name)
        told = Path(options["directory"]) / "overrun"
        status = main(options, make_compute=lambda: SlowedCompute(slower, told))
    finally:
        os._exit(status)


if __name__ == "__main__":
    hurry(1)  # a host that waits for a core of this machine is not the host that it stands for
    role, *given = sys.argv[1:]
    if role == "workers":
        workers(float(given[0]), json.loads(given[1]))
    else:
        folder, where, text = given
        asyncio.run(control(Path(folder), where, RunSpec.load(text)))
