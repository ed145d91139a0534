"""A league in one process over the in-memory twin, whose links and cores take time on a virtual clock.

Stands in for `bench.wan` where no namespaces can be made. Nodes, frames and arithmetic are the real ones.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeVar

from bench.harness import progress
from koinon.net.clock import run_virtual
from koinon.net.hub import Faults
from koinon.nodes.compute import InlineCompute
from koinon.run import events as ev
from koinon.run.spec import RunSpec
from koinon.units import BitsPerSecond, Seconds

T = TypeVar("T")
_FAR: Final = Faults(delay=Seconds.ms(25), rate=BitsPerSecond.mbit(80))
LINKS: Final = {"near": Faults(delay=Seconds.ms(0.1)), "straw": _FAR, "lossy": replace(_FAR, late=0.05)}
"""A letter is five packets or so; where one is lost in a hundred, one letter in twenty is late."""


def twin_turns(spec: RunSpec, repeats: int, steps: int, *, slower: float) -> dict[str, list[float]]:
    """Tokens per virtual second of each turn, by links. A step after each change is not measured."""
    with tempfile.TemporaryDirectory(prefix="koinon-twin-") as folder:
        return run_virtual(_turns(spec, Path(folder) / "run", repeats, steps, slower))


async def _turns(spec: RunSpec, folder: Path, repeats: int, steps: int, slower: float) -> dict[str, list[float]]:
    from tests.twin import TwinLeague

    class Slowed(InlineCompute):
        """A core of its own, so many times slower than this machine's."""

        async def run(self, job: Callable[[], T]) -> T:
            cpu = time.thread_time()
            done = job()
            took = slower * (time.thread_time() - cpu)
            self.busy_seconds += took
            await asyncio.sleep(took)
            return done

    clock = asyncio.get_running_loop().time
    found: dict[str, list[float]] = {links: [] for links in LINKS}
    taken: asyncio.Queue[float] = asyncio.Queue()

    def heard(event: ev.Event, _state: object) -> None:
        if isinstance(event, ev.StepMeasured):
            taken.put_nowait(clock())

    async with TwinLeague(spec, folder, faults=LINKS["near"], make_compute=Slowed) as league:
        league.control.follower.listen(heard)
        await taken.get()
        for _ in range(repeats):
            for links, faults in LINKS.items():
                league.hub.faults = faults
                began = await taken.get()
                ended = [await taken.get() for _ in range(steps)][-1]
                found[links].append(steps * spec.step_tokens / (ended - began))
                progress(f"{links}: {found[links][-1]:.0f} tokens per virtual second")
    return found
