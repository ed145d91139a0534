"""The coordinator's process is killed with kill -9 in the middle of steps: how long does the league stand still, and
what is lost?

    pause_s_p50, pause_s_worst   seconds from the kill until a step is measured again
    events_lost                  events that an onlooker had been shown and that the final log does not hold
    loss_difference              greatest difference of a step's loss to a run that nobody disturbed, in nats

Real processes on this machine over loopback: one coordinator, standbys, workers. The disturbed and the undisturbed run
have the same spec and data.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.harness import Figure, main, median, progress
from koinon.local import LocalSwarm
from koinon.nodes.rundir import RunDir
from koinon.run import events as ev
from koinon.run.reader import LogReader
from koinon.run.spec import RunSpec
from koinon.run.state import Phase

PAUSE = 10.0
STANDBYS = 2


@dataclass
class Course:
    """How one run went, as an onlooker saw it."""

    losses: dict[int, float] = field(default_factory=dict)
    shown: list[bytes] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    completed: bool = False


def spec_of(steps: int) -> RunSpec:
    model = {"size": 32, "layers": 2, "stages": 2, "context": 32, "rank": 4, "codec": "fp32", "table": 64}
    train = {"steps": steps, "batch": 16, "microbatch": 1, "eval_every": 0, "eval_sequences": 4}
    return RunSpec.of(
        name="failover",
        seed=7,
        model=model,
        train=train,
        optim={},
        league={"replicas": 1},
        data={"max_bytes": 100_000},
    )


def run(spec: RunSpec, folder: Path, kills: frozenset[int]) -> Course:
    """Train; once a step of `kills` is measured, kill the coordinator while a later one is under way.

    What is read here may lie some steps behind, so a pause ends with the first step that a successor has measured.
    """
    course, due = Course(), sorted(kills)
    killed, succeeded = None, False
    with LocalSwarm(spec, folder, standbys=STANDBYS if kills else 0) as swarm:
        for event in swarm.events():
            course.shown.append(ev.encode(event))
            if isinstance(event, ev.TermBegan):
                succeeded = killed is not None
            if not isinstance(event, ev.StepMeasured):
                continue
            course.losses[event.step] = event.loss
            if killed is not None and succeeded:
                course.pauses.append(time.monotonic() - killed)
                progress(f"step {event.step} came {course.pauses[-1]:.1f} s after the kill")
                killed, succeeded = None, False
            if killed is None and due and event.step >= due[0]:
                due.pop(0)
                swarm.kill_coordinator()
                killed = time.monotonic()
        course.completed = swarm.state.phase is Phase.COMPLETE
    return course


def lost(course: Course, folder: Path, run_id: str) -> int:
    """Events that were shown and are in no log of a control process that lived to the end."""
    logs = [RunDir(folder).log, *(RunDir(folder).standby(number).log for number in range(STANDBYS))]
    most: set[bytes] = set()
    for path in logs:
        with LogReader(path, run=run_id, decode=ev.decode) as reader:
            held = {ev.encode(event) for event in reader.poll()}
        most = max(most, held, key=len)
    return len([event for event in course.shown if event not in most])


def measure(quick: bool) -> Iterator[Figure]:
    steps, kills = (120, frozenset({2, 40})) if quick else (600, frozenset(range(3, 500, 60)))
    spec = spec_of(steps)
    with tempfile.TemporaryDirectory(prefix="koinon-failover-") as name:
        folder = Path(name)
        calm = run(spec, folder / "calm", frozenset())
        progress(f"undisturbed: {len(calm.losses)} steps")
        disturbed = run(spec, folder / "killed", kills)
        missing = lost(disturbed, folder / "killed", spec.run_id)
    both = set(calm.losses) & set(disturbed.losses)
    difference = max((abs(calm.losses[s] - disturbed.losses[s]) for s in both), default=float("nan"))
    yield Figure("kills", len(disturbed.pauses))
    yield Figure("completed", float(disturbed.completed), at_least=1.0)
    yield Figure("pause_s_p50", median(disturbed.pauses) if disturbed.pauses else float("nan"))
    yield Figure("pause_s_worst", max(disturbed.pauses, default=float("nan")), at_most=PAUSE)
    yield Figure("events_lost", missing, at_most=0)
    yield Figure("steps_without_a_loss", len(set(calm.losses) - set(disturbed.losses)), at_most=0)
    yield Figure("loss_difference", difference, at_most=1e-4)


if __name__ == "__main__":
    sys.exit(main("failover", measure))
