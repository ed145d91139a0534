"""Does a crowd at the door hurt? Wishes for a seat decided per second with 10,000 waiting, and what members feel.

    python -m bench.admission [--quick]

A league of the smallest recipe works at full cap, 10,000 tickets are in its run log, and a process of its own with 48
keys asks over the real transport. The tickets of the others come from as many keys by the coordinator's own handler, in
this process, since 10,000 endpoints do not fit on one machine; every one of them is in the log, in memory and in line.

per_second      answers over the transport, as fast as they come, of a league that does nothing else
per_cpu_second  the same per second of processor time of the control process, its network threads included: what is
                left of it when the machine is busy otherwise
decided         answers of the handler alone, new wishes and repeated ones, batches written to the log included
filled_mib      memory of the control process for 10,000 tickets
growth_mib      what that process, of a league that does nothing else, grew by in a siege of ever new connections
step_ratio      steps per second during a siege over those without, in turns. The siege: polls at the rate at which
                10,000 waiters are told to ask, each with a connection of its own, and beside them connections that
                say nothing, rubbish and half frames.
                The besiegers run at the lowest priority, since besiegers have machines of their own; `siege_rate` is
                what they got through per second. It is the hardest case: the steps of this recipe are a dozen exchanges
                each and little arithmetic, so they wait for the control process more than for anything else
siege_share     of one core, what the control process spent more under siege than in peace
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil

from bench.harness import Figure, main, median, progress
from bench.peers.besiegers import Siege, command
from koinon.local import League
from koinon.nodes import messages as m
from koinon.run import events as ev
from koinon.run.events import Member
from koinon.run.policies.admission import poll_after
from koinon.run.spec import RunSpec
from koinon.run.state import RunState, SeatStatus
from koinon.units import PeerId

WAITING = 10_000
KEYS = 48
SEATS = 3
POLLS = sum(1 / poll_after(place) for place in range(1, WAITING + 1))
"""Per second, of 10,000 waiters who do as they are told."""
GROWTH_MIB = 48.0


@dataclass
class Found:
    per_second: float = 0.0
    per_cpu_second: float = 0.0
    decided_new: float = 0.0
    decided_repeated: float = 0.0
    filled_mib: float = 0.0
    growth_mib: float = 0.0
    waiting: int = 0
    siege_rate: float = 0.0
    ratios: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)


def rss() -> float:
    return psutil.Process().memory_info().rss / 2**20


class Bench:
    def __init__(self, league: League, quick: bool) -> None:
        self.league, self.quick, self.found, self.steps = league, quick, Found(), list[float]()
        league.listen(self._hear)

    def _hear(self, event: ev.Event, _state: RunState) -> None:
        if isinstance(event, ev.StepMeasured):
            self.steps.append(time.monotonic())

    async def run(self) -> Found:
        """Both halves of what a working league feels."""
        while len(self.steps) < 2:
            await asyncio.sleep(0.1)
        assert sum(seat.status is not SeatStatus.LEFT for seat in self.league.state.seats.values()) == SEATS
        before = rss()
        await self.fill()
        self.found.filled_mib, self.found.waiting = rss() - before, len(self.league.state.line)
        progress(f"{self.found.waiting} wait, {self.found.filled_mib:.1f} MiB")
        await self._besiege(Siege(*self._where(), KEYS, 3.0))  # what connections and code cost once
        await self._turns(3.0 if self.quick else 6.0, 5 if self.quick else 12)
        return self.found

    async def rate(self) -> None:
        """Of a league whose seats are taken, and whose members do nothing."""
        for member in range(SEATS):
            seated = ev.Seated(Member(member), f"member {member}", f"account {member}", member, 0, ())
            self.league.control.coordinator.write(seated)
        await self.fill()
        await self._besiege(Siege(*self._where(), KEYS, 1.0))
        spent = time.process_time()
        answers = await self._besiege(Siege(*self._where(), KEYS, 6.0 if self.quick else 20.0))
        self.found.per_second = answers["answered"] / answers["seconds"]
        self.found.per_cpu_second = answers["answered"] / (time.process_time() - spent)
        progress(f"over the transport: {answers}")
        before = rss()
        siege = Siege(*self._where(), KEYS, 6.0 if self.quick else 60.0, rate=150.0, redials=True, hostile=True)
        progress(f"redialling: {await self._besiege(siege)}")
        self.found.growth_mib = rss() - before

    async def fill(self) -> None:
        """By the handler itself, 500 at a time, as many keys and accounts as tickets."""
        coordinator = self.league.control.coordinator

        async def ask(number: int) -> Any:
            peer = PeerId(sha256(f"waiter {number}".encode()).hexdigest())
            return await coordinator._on_join(peer, m.Join(f"account-{number}", (), "wish"), bytearray())

        for again in False, True:
            began = time.process_time()
            for start in range(0, WAITING, 500):
                for ration in coordinator.room._asked, coordinator.room._tickets:
                    ration._all.left = 500.0  # rations are not what is measured
                told = await asyncio.gather(*(ask(number) for number in range(start, start + 500)))
                assert all(isinstance(one, m.Waiting) for one in told)
            rate = WAITING / (time.process_time() - began)
            if again:
                self.found.decided_repeated = rate
            else:
                self.found.decided_new = rate

    async def _turns(self, seconds: float, turns: int) -> None:
        """The same besiegers all the time, who are stopped and go on (SIGSTOP, SIGCONT), in turns."""
        self._count_answers()
        siege = Siege(*self._where(), KEYS, 600.0, rate=POLLS, redials=True, hostile=True, niceness=19)
        process = await asyncio.create_subprocess_exec(*command(siege), stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        besiegers, pressed_for = psutil.Process(process.pid), 0.0
        try:
            async with asyncio.timeout(180.0):
                assert await process.stdout.readline() == b"ready\n"
            self._answers = 0
            for turn in range(turns):
                besiegers.suspend()
                calm, calm_share = await self._pace(seconds)
                besiegers.resume()
                await asyncio.sleep(1.0)  # whoever was stopped asks at once: no crowd does that every three seconds
                began, before = time.monotonic(), self._answers
                pressed, share = await self._pace(seconds)
                pressed_for += time.monotonic() - began
                self.found.shares.append(share - calm_share)
                self.found.ratios.append(pressed / calm)
                progress(f"turn {turn + 1}: {calm:.3f} steps/s in peace, {pressed:.3f} and {self._answers - before} "
                         "answers under siege")  # fmt: skip
        finally:
            process.kill()
            await process.wait()
        self.found.siege_rate = self._answers / pressed_for

    def _count_answers(self) -> None:
        room, self._answers = self.league.control.coordinator.room, 0
        line_up = room.line_up

        async def counted(*asked: Any) -> Any:
            self._answers += 1
            return await line_up(*asked)

        room.line_up = counted  # type: ignore[method-assign]

    async def _pace(self, seconds: float) -> tuple[float, float]:
        """Steps per second, between the first and the last that end in that time; and the share of a core of this
        process."""
        self.steps.clear()
        began, spent = time.monotonic(), time.process_time()
        await asyncio.sleep(seconds)
        while len(self.steps) < 3:
            await asyncio.sleep(0.1)
        share = (time.process_time() - spent) / (time.monotonic() - began)
        return (len(self.steps) - 1) / (self.steps[-1] - self.steps[0]), share

    def _where(self) -> tuple[str, tuple[str, ...]]:
        return self.league.address.peer, self.league.address.addresses

    async def _besiege(self, siege: Siege) -> dict[str, float]:
        process = await asyncio.create_subprocess_exec(*command(siege), stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        try:
            async with asyncio.timeout(siege.seconds + 180.0):
                assert await process.stdout.readline() == b"ready\n"
                answer: dict[str, float] = json.loads(await process.stdout.readline())
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
        return answer


async def besieged(quick: bool) -> Found:
    overrides = [f"league.max_workers={SEATS}", "league.grace_s=100000", "train.steps=100000", "train.eval_every=0"]
    spec = RunSpec.recipe("tiny", overrides=overrides)
    with tempfile.TemporaryDirectory() as folder:
        idle = Bench(League(spec, Path(folder) / "idle", workers=0, trains=False), quick)
        async with idle.league:
            await idle.rate()
        busy = Bench(League(spec, Path(folder) / "busy"), quick)
        async with busy.league:
            found = await busy.run()
    found.per_second, found.per_cpu_second = idle.found.per_second, idle.found.per_cpu_second
    found.growth_mib = idle.found.growth_mib
    return found


def measure(quick: bool) -> Iterator[Figure]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    found = asyncio.run(besieged(quick))
    yield Figure("waiting", found.waiting)
    yield Figure("per_second", round(found.per_second), at_least=500)
    yield Figure("per_cpu_second", round(found.per_cpu_second))
    yield Figure("decided_new", round(found.decided_new), at_least=500)
    yield Figure("decided_repeated", round(found.decided_repeated), at_least=500)
    yield Figure("filled_mib", round(found.filled_mib, 1), at_most=GROWTH_MIB)
    yield Figure("growth_mib", round(found.growth_mib, 1), at_most=GROWTH_MIB)
    yield Figure("step_ratio", round(median(found.ratios), 3), at_least=0.9)
    yield Figure("step_ratios", [round(ratio, 3) for ratio in found.ratios])
    yield Figure("siege_share", round(median(found.shares), 3))
    yield Figure("siege_rate", round(found.siege_rate, 1))


if __name__ == "__main__":
    sys.exit(main("admission", measure))
