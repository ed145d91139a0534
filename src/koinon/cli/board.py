"""What a person sees of a run, as a value: folded from the log's events, and from what workers tell of their traffic.

Live view, plain lines and `koinon status` show the same board, so they cannot disagree. Pure: time is passed in, Unix
seconds as in the events. Knows nothing of terminals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from koinon.cli.sentences import Tone, place, sentence, tone, waiting
from koinon.cli.series import Pace, Series
from koinon.nodes.messages import Telemetry
from koinon.run import events as ev
from koinon.run.events import Member
from koinon.run.spec import RunSpec
from koinon.run.state import Phase, RunState, Seat, SeatStatus

NOTES_KEPT = 50


@dataclass(frozen=True, slots=True)
class Note:
    """Something worth telling."""

    at: float
    text: str
    tone: Tone


@dataclass(frozen=True, slots=True)
class Cell:
    """One place of the grid of stages and seats."""

    word: str
    """A SeatStatus, or "empty"."""
    since: float
    """When it became that; 0 if it never was anything else."""
    tokens_per_second: float = 0.0
    replaced: int = 0
    """Processes that had this seat before, since the run was opened or resumed."""


@dataclass(frozen=True, slots=True)
class Board:
    """All that is shown of one run."""

    spec: RunSpec
    state: RunState = field(default_factory=RunState)
    began: float = 0.0
    """When the run was opened or resumed last."""
    last: float = 0.0
    """When the newest event happened."""
    earlier: float = 0.0
    """Seconds that it ran before it was resumed."""
    training: Series = field(default_factory=Series)
    heldout: Series = field(default_factory=Series)
    steps: Pace = field(default_factory=Pace)
    tokens: Pace = field(default_factory=Pace)
    work: Mapping[Member, Pace] = field(default_factory=dict)
    """Tokens per member, as committed."""
    traffic: Mapping[Member, tuple[int, int]] = field(default_factory=dict)
    """(bytes, tokens) that each member said it sent across boundaries."""
    since: Mapping[Member, float] = field(default_factory=dict)
    """When each member's status changed last."""
    lost: Mapping[tuple[int, int], float] = field(default_factory=dict)
    """Seats that wait for somebody, and since when."""
    recoveries: tuple[float, ...] = ()
    """Seconds from the loss of a worker to its seat being ready again."""
    losses_at: tuple[int, ...] = ()
    """Steps at which a worker was lost."""
    notes: tuple[Note, ...] = ()
    noted: int = 0
    """Notes ever made; the oldest are let go of."""

    # --- what changes it

    def heard(self, event: ev.Event, state: RunState) -> Board:
        """With one more event; `state` is the fold up to and with it."""
        paused = {pause.stage for pause in self.state.pauses}
        board = self._heard(event, state)
        if isinstance(event, ev.RunResumed):
            return board  # everybody takes a seat anew
        for pause in state.pauses:
            if pause.stage not in paused:
                board = board.told(waiting(pause), event.at, Tone.BAD)
        return board

    def _heard(self, event: ev.Event, state: RunState) -> Board:
        board = replace(self, state=state, last=event.at)
        match event:
            case ev.RunOpened(at=at):
                return replace(board, began=at)
            case ev.RunResumed(at=at, step=step):
                return replace(board, earlier=self.elapsed(self.last))._resumed(step, at)._noted(event)
            case ev.StepMeasured(at=at, step=step, loss=loss, tokens=tokens):
                training, steps = self.training.add(step, loss), self.steps.add(at, 1)
                return replace(board, training=training, steps=steps, tokens=self.tokens.add(at, tokens))
            case ev.Evaluated(step=step, loss=loss):
                return replace(board, heldout=self.heldout.add(step, loss))._noted(event)
            case ev.Contributed(at=at, member=member, tokens=tokens):
                pace = self.work.get(member, Pace()).add(at, tokens)
                return replace(board, work={**self.work, member: pace})
            case (
                ev.SeatReady()
                | ev.SeatLeft()
                | ev.Draining()
                | ev.Attending()
                | ev.Seated()
                | ev.Unreachable()
                | ev.Returned()
            ):
                return board._seat_changed(event)
            case _:
                return board._noted(event)

    def measured(self, telemetry: Mapping[Member, Telemetry]) -> Board:
        """With what the workers told of themselves last. What a lost worker had sent stays counted."""
        traffic = {member: (told.boundary_bytes, told.boundary_tokens) for member, told in telemetry.items()}
        return replace(self, traffic={**self.traffic, **traffic})

    def told(self, text: str, at: float, tone: Tone = Tone.NOTED) -> Board:
        """With a note that is not in the log."""
        return replace(self, notes=(*self.notes, Note(at, text, tone))[-NOTES_KEPT:], noted=self.noted + 1)

    def news(self, noted: int) -> tuple[Note, ...]:
        """Notes made since there were `noted`."""
        return self.notes[-(self.noted - noted) :] if self.noted > noted else ()

    # --- what it shows

    @property
    def workers(self) -> int:
        """That the run starts with."""
        return self.spec.model.stages * self.spec.league.replicas

    @property
    def ready(self) -> int:
        """Workers that hold their stage's weights."""
        return sum(len(self.state.ready(stage)) for stage in range(self.spec.model.stages))

    @property
    def share_done(self) -> float:
        return min(1.0, self.state.step / self.spec.train.steps)

    def elapsed(self, now: float) -> float:
        """Seconds that the run has been at work, pauses left out."""
        return self.earlier + max(0.0, now - self.began) if self.began else 0.0

    def seconds_left(self, now: float) -> float | None:
        """None while nothing is known."""
        per_second = self.steps.per_second(now)
        return (self.spec.train.steps - self.state.step) / per_second if per_second else None

    def tokens_per_second(self, now: float) -> float:
        return self.tokens.per_second(now)

    @property
    def bytes_per_token(self) -> float | None:
        """Measured: what crossed boundaries, headers included, per token, boundary and direction."""
        sent = sum(count for count, _ in self.traffic.values())
        carried = sum(tokens for _, tokens in self.traffic.values())
        return sent / carried if carried else None

    @property
    def compression(self) -> float | None:
        """How many times more the whole stream in fp32 would be."""
        measured = self.bytes_per_token
        return 4 * self.spec.model.size / measured if measured else None

    def grid(self, now: float) -> tuple[tuple[Cell, ...], ...]:
        """A row per stage, a column per seat."""
        holders: dict[tuple[int, int], list[Seat]] = {}
        for _, seat in sorted(self.state.seats.items()):
            holders.setdefault((seat.stage, seat.seat), []).append(seat)
        width = max([self.spec.league.replicas, *(seat + 1 for _, seat in holders)])
        return tuple(
            tuple(self._cell(holders.get((stage, seat), []), now) for seat in range(width))
            for stage in range(self.spec.model.stages)
        )

    def _cell(self, holders: list[Seat], now: float) -> Cell:
        if not holders:
            return Cell("empty", 0.0)
        seat = holders[-1]
        works = seat.status is SeatStatus.READY and seat.member in self.work
        speed = self.work[seat.member].per_second(now) if works else 0.0
        before = sum(holder.member in self.since for holder in holders[:-1])
        return Cell(seat.status.value, self.since.get(seat.member, 0.0), speed, before)

    # --- how

    def _noted(self, event: ev.Event) -> Board:
        mood = tone(event)
        return self if mood is Tone.ROUTINE else self.told(sentence(event, self.state), event.at, mood)

    def _resumed(self, step: int, at: float) -> Board:
        return replace(
            self,
            began=at,
            training=self.training.before(step),
            heldout=self.heldout.before(step + 1),
            steps=Pace(),
            tokens=Pace(),
            work={},
            traffic={},
            since={},
            lost={},
            notes=(),
        )

    def _seat_changed(
        self, event: ev.SeatReady | ev.SeatLeft | ev.Draining | ev.Attending | ev.Seated | ev.Unreachable | ev.Returned
    ) -> Board:
        board = replace(self, since={**self.since, event.member: event.at})
        seat = self.state.seats.get(event.member)
        if seat is None:
            return board
        here = (seat.stage, seat.seat)
        if self.state.phase is not Phase.TRAINING:
            return board  # the end of the run is not the loss of a worker
        if isinstance(event, ev.SeatLeft) and not event.drained:
            board = replace(board, lost={**self.lost, here: event.at}, losses_at=(*self.losses_at, self.state.step))
            return board._noted(event)
        if isinstance(event, ev.SeatReady) and here in self.lost:
            return board._recovered(event, here)
        if self._is_starting(seat):
            return board._started(event)
        return board if isinstance(event, ev.SeatReady | ev.Seated) else board._noted(event)

    def _is_starting(self, seat: Seat) -> bool:
        return not self.steps.seen and (seat.stage, seat.seat) not in self.lost

    def _started(self, event: ev.Event) -> Board:
        """Say it once, when everybody has come, rather than twice for each."""
        if self.ready < self.workers or not isinstance(event, ev.SeatReady):
            return self
        return self.told(f"All {self.ready} workers are ready.", event.at, Tone.GOOD)

    def _recovered(self, event: ev.SeatReady, here: tuple[int, int]) -> Board:
        took = max(0.0, event.at - self.lost[here])
        lost = {seat: at for seat, at in self.lost.items() if seat != here}
        text = f"{place(event.member, self.state)} works again: a fresh process was ready {took:.1f} s after the loss."
        return replace(self, lost=lost, recoveries=(*self.recoveries, took)).told(text, event.at, Tone.GOOD)
