"""Short histories of runs, as events with their states: what the views of the command line are tested on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from koinon.cli.board import Board
from koinon.run import events as ev
from koinon.run.events import Member
from koinon.run.items import pack
from koinon.run.spec import RunSpec
from koinon.run.state import RunState, apply

START = 1_000_000.0
SPEC = RunSpec.of(
    name="story",
    model={"size": 32, "stages": 2, "layers": 2, "context": 32},
    train={"steps": 10, "batch": 2, "microbatch": 1, "eval_every": 5},
    league={"replicas": 2},
)
TOKENS = SPEC.step_tokens


def opened() -> ev.RunOpened:
    return ev.RunOpened(
        run=SPEC.run_id,
        spec=SPEC.to_toml(),
        coordinator="c" * 64,
        trainer="c" * 64,
        stages=2,
        microbatches=2,
        seed_commitment="",
        at=START,
    )


def seated(member: int, stage: int, seat: int, at: float) -> list[ev.Event]:
    taken = ev.Seated(
        member=Member(member),
        worker=f"{member:064x}",
        account=f"local-{stage}-{seat}",
        stage=stage,
        seat=seat,
        addresses=(),
        at=at,
    )
    return [taken, ev.SeatReady(member=Member(member), step=0, root="r", at=at + 0.5)]


def everyone(at: float = START) -> list[ev.Event]:
    """Members 0 to 3 in the seats 0-0, 1-0, 0-1, 1-1."""
    places = [(0, 0, 0), (1, 1, 0), (2, 0, 1), (3, 1, 1)]
    return [event for member, stage, seat in places for event in seated(member, stage, seat, at)]


def step(
    number: int, at: float, loss: float, members: tuple[tuple[int, ...], ...] = ((0, 2), (1, 3))
) -> list[ev.Event]:
    """One step of both stages; `members` of each stage share its items."""
    events: list[ev.Event] = []
    for stage, crew in enumerate(members):
        sets = tuple(pack([item]) if item < 2 else b"" for item in range(len(crew)))
        reduce = ev.ReduceOpened(
            stage=stage, step=number, attempt=0, members=tuple(map(Member, crew)), sets=sets, at=at
        )
        events.append(reduce)
        events += [
            ev.Contributed(member=Member(m), stage=stage, step=number, items=items, tokens=TOKENS // 2, flops=9, at=at)
            for m, items in zip(crew, sets, strict=True)
        ]
        events.append(
            ev.StageStepped(
                stage=stage, step=number, attempt=0, root=f"r{number}", gradient_norm=1.0, penalised=0.0, at=at
            )
        )
    events.append(ev.StepMeasured(step=number, loss=loss, penalty=0.0, tokens=TOKENS, at=at))
    return events


def story() -> list[ev.Event]:
    """Four workers take two steps a second apart; then one is killed, and replaced after two seconds."""
    return [
        opened(),
        *everyone(START + 1),
        ev.Evaluated(step=0, loss=5.6, tokens=64, at=START + 2),
        *step(0, START + 3, 5.5),
        *step(1, START + 4, 5.0),
        ev.SeatLeft(member=Member(1), reason="its process was killed by SIGKILL", at=START + 5),
        ev.ItemsReleased(step=2, stage=1, member=Member(1), items=pack([0]), reason="SeatLeft", at=START + 5),
        *seated(4, 1, 0, START + 6.5)[:1],
        ev.SeatReady(member=Member(4), step=2, root="r1", at=START + 7),
    ]


def told(events: Iterable[ev.Event]) -> Iterator[tuple[ev.Event, RunState]]:
    """Each event with the state after it."""
    state = RunState()
    for event in events:
        state = apply(state, event)
        yield event, state


def board(events: Iterable[ev.Event], spec: RunSpec = SPEC) -> Board:
    shown = Board(spec)
    for event, state in told(events):
        shown = shown.heard(event, state)
    return shown
