"""Koinon: a league of four workers and one control process on the loopback, as `koinon.local` starts it.

The meter reads the tree of this process: control, zygote and workers. It runs from the moment in which the last warm-up
step is known to be taken by all stages to the same moment of the last measured step.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from bench.meter import Reading, read_tree
from bench.peers.work import Outcome, Work, outcome, run
from koinon.errors import StateError
from koinon.local import League
from koinon.run import events as ev
from koinon.run.state import RunState

SETTLED = 1.5
"""Seconds after which every worker has told of its last step: heartbeats come once a second."""


class Watch:
    """Reads the meter when the first and the last measured step have ended."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self.loss = 0.0
        self.began: Reading | None = None
        self.spent: asyncio.Future[Reading] = asyncio.get_running_loop().create_future()

    def __call__(self, event: ev.Event, _state: RunState) -> None:
        match event:
            case ev.StepMeasured(step=step, loss=loss):
                self._on_step(step, loss)
            case ev.RunFailed(reason=reason) if not self.spent.done():
                self.spent.set_exception(StateError(reason))
            case _:
                pass

    def _on_step(self, step: int, loss: float) -> None:
        if step == self._work.warmup - 1:
            self.began = read_tree(os.getpid())
        elif step == self._work.warmup + self._work.steps - 1 and self.began is not None:
            self.loss = loss
            self.spent.set_result(read_tree(os.getpid()) - self.began)


async def league(work: Work, folder: Path) -> Outcome:
    watch = Watch(work)
    swarm = League(work.spec, folder / "run")
    swarm.listen(watch)
    async with swarm:
        spent = await watch.spent
        await asyncio.sleep(SETTLED)
        told = swarm.telemetry.values()
        recomputed = sum(t.recomputed_flops for t in told) / max(1, sum(t.flops for t in told))
    return outcome(work, spent, loss=watch.loss, recomputed=recomputed)


def train(work: Work, folder: Path) -> Outcome:
    if work.warmup < 1:
        raise ValueError("A league's start is not measured: give it at least one step of `warmup`.")
    return asyncio.run(league(work, folder))


if __name__ == "__main__":
    run(train)
