"""Small leagues over the twin for the tests of this folder: specs, a compute that takes virtual time, what must hold.

A step of these takes about a virtual second, so that a fault lasting some seconds meets a league at work.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import pytest

from koinon.errors import KoinonError
from koinon.net.clock import run_virtual
from koinon.nodes.compute import InlineCompute
from koinon.run import events as ev
from koinon.run.items import unpack
from koinon.run.spec import RunSpec
from koinon.run.state import Phase
from tests.twin import TwinLeague

T = TypeVar("T")
PATIENCE = 3600.0
"""Virtual seconds after which a league that has not ended is stuck."""
SEED = 3


class Paced(InlineCompute):
    """Every job takes 50 virtual milliseconds."""

    async def run(self, job: Callable[[], T]) -> T:
        await asyncio.sleep(0.05)
        return job()


def spec_of(replicas: int = 1, stages: int = 2, **tables: dict[str, Any]) -> RunSpec:
    """A league of tiny stages with the exact codec. `tables` override single keys."""
    model = {"size": 16, "layers": stages, "stages": stages, "context": 16, "rank": 4, "codec": "fp32", "table": 16}
    train = {"steps": 4, "batch": 8, "microbatch": 2, "eval_every": 0, "eval_sequences": 4}
    return RunSpec.of(
        name="league",
        seed=SEED,
        model=model | tables.get("model", {}),
        train=train | tables.get("train", {}),
        optim=tables.get("optim", {}),
        league={"replicas": replicas} | tables.get("league", {}),
        data={"max_bytes": 100_000} | tables.get("data", {}),
    )


@dataclass
class Rehearsal(TwinLeague):
    """A twin in which nothing is left to chance (node keys included), with a host that replaces workers that end."""

    ended_at: float = 0.0

    async def __aenter__(self) -> Rehearsal:
        _lay_keys(self.path, self.spec)
        await super().__aenter__()
        self._host = asyncio.create_task(self._replace_the_ended())
        return self

    async def __aexit__(self, *details: object) -> None:
        self._host.cancel()
        await super().__aexit__(*details)

    async def vanish(self) -> None:
        """Everything is gone at once, control process included: what is on the disk is all there is."""
        self._host.cancel()
        for task in self.control._tasks:
            task.cancel()
        self.control.transport.kill()
        for stage, seat in list(self.workers):
            await self.kill(stage, seat, tell=False)
        self.control.run_.log.close()

    async def _replace_the_ended(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            if self.state.phase in (Phase.STOPPED, Phase.FAILED):
                return
            for place, one in list(self.workers.items()):
                if one.task.done() and (one.task.cancelled() or isinstance(one.task.exception(), KoinonError | None)):
                    del self.workers[place]
                    one.transport.kill()
                    self.control.coordinator.vanished(one.transport.me, "its process ended")
                    await self.start(*place)


def _lay_keys(path: Path, spec: RunSpec) -> None:
    folders = [path / "seats" / f"{stage:02d}-{seat:02d}" for stage in range(spec.model.stages) for seat in range(8)]
    for folder in (path / "control", *folders):
        folder.mkdir(parents=True, exist_ok=True)
        key = folder / "key"
        key.write_text(sha256(str(folder.relative_to(path)).encode()).hexdigest())
        key.chmod(0o600)


def run_league(spec: RunSpec, path: Path, act: Callable[[Rehearsal], Any] | None = None, **more: Any) -> Rehearsal:
    """Train to the end while `act(league)`, a coroutine function, does what it likes to the league."""

    async def go() -> Rehearsal:
        async with asyncio.timeout(PATIENCE), Rehearsal(spec, path, **more) as league:
            acting = asyncio.create_task(act(league)) if act else None
            await league.trained()
            if acting is not None:
                await acting
            league.ended_at = asyncio.get_running_loop().time()
            return league

    return run_virtual(go())


def assert_whole(league: TwinLeague, undisturbed: dict[int, float]) -> None:
    """It completed, with the losses of the undisturbed run, and every item is in one committed set of each stage.

    Where every member of a stage lost its seat, the log says that optimizer state is gone: losses are equal until then.

    A step that was committed and not yet measured when everything vanished has no loss in the log: only it may lack.
    """
    assert league.state.phase is Phase.COMPLETE, league.state.reason
    losses = league.losses()
    unmeasured = set(undisturbed) - set(losses)
    assert unmeasured <= {event.step - 1 for event in league.events if isinstance(event, ev.RunResumed)}
    momentum_lost = min((event.step for event in league.events if isinstance(event, ev.MomentumLost)), default=math.inf)
    comparable = {step: loss for step, loss in losses.items() if step <= momentum_lost}
    assert comparable == pytest.approx({step: undisturbed[step] for step in comparable}, abs=1e-4)
    assert league.state.tally.items_dropped == 0
    assert_each_item_once(league)


def assert_each_item_once(league: TwinLeague) -> None:
    spec = league.spec
    folded = items_folded(league.events)
    for stage in range(spec.model.stages):
        for step in range(spec.train.steps):
            items = sorted(folded[stage, step])
            assert items == list(range(spec.train.microbatches)), f"stage {stage}, step {step}: each item once"


def items_folded(events: list[ev.Event]) -> dict[tuple[int, int], list[int]]:
    """(stage, step) -> the items of its committed sets, with repeats. What a resume voided does not count."""
    folded: dict[tuple[int, int], list[int]] = defaultdict(list)
    for event in events:
        match event:
            case ev.Contributed(stage=stage, step=step, items=items):
                folded[stage, step] += unpack(items)
            case ev.RunResumed(step=first):
                folded = defaultdict(list, {key: kept for key, kept in folded.items() if key[1] < first})
            case _:
                pass
    return folded
