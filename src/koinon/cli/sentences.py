"""What happened, in words: one sentence per event of the run log.

A rendering and nothing else: no program reads these sentences. Knows nothing of terminals or colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import assert_never

from koinon.run import events as ev
from koinon.run.items import unpack
from koinon.run.state import Pause, RunState
from koinon.units import Flops


class Tone(Enum):
    """How much an event matters to somebody who watches."""

    ROUTINE = "routine"
    """Happens all the time; shown in a log and nowhere else."""
    GOOD = "good"
    NOTED = "noted"
    BAD = "bad"


def tone(event: ev.Event) -> Tone:
    match event:
        case ev.Draining() | ev.Attending():
            return Tone.NOTED
        case ev.Evaluated() | ev.RunCompleted() | ev.Returned() | ev.SeatReady() | ev.RunResumed():
            return Tone.GOOD
        case ev.ItemsReleased() | ev.ReduceAborted() | ev.MomentumLost() | ev.RunStopped() | ev.Seated():
            return Tone.NOTED
        case ev.Revoked():
            return Tone.BAD
        case ev.SeatLeft(drained=drained):
            return Tone.NOTED if drained else Tone.BAD
        case ev.Unreachable() | ev.Excluded() | ev.RunFailed() | ev.Disputed() | ev.ItemDropped():
            return Tone.BAD
        case _:
            return Tone.ROUTINE


def sentence(event: ev.Event, state: RunState) -> str:
    """`state` is the fold up to and with the event: it knows whose seat a member has."""
    match event:
        case ev.RunOpened(run=run, stages=stages, microbatches=microbatches):
            return f"Run {run[:12]} was opened: {stages} stages, {_count(microbatches, 'microbatch')} in a step."
        case ev.RunStopped(reason=reason):
            return f"The run was stopped ({reason}). It can be resumed."
        case ev.RunResumed(step=step, term=term):
            return f"The run goes on from step {step}, in term {term} of its log."
        case ev.RunCompleted(step=step):
            return f"The run is complete: {step} steps."
        case ev.RunFailed(reason=reason):
            return f"The run has failed. {reason}"
        case ev.StepMeasured(step=step, loss=loss, penalty=penalty):
            beside = f", penalty {penalty:.4f}" if penalty else ""
            return f"Step {step}: loss {loss:.4f}{beside}."
        case ev.Evaluated(step=step, loss=loss):
            return f"Held-out loss with the weights of step {step}: {loss:.4f}."
        case ev.Queued(tickets=tickets):
            return f"{_count(len(tickets), 'worker')} more wait{'s' if len(tickets) == 1 else ''} for a seat."
        case ev.Dequeued(workers=workers, reason=reason):
            left = "does" if len(workers) == 1 else "do"
            return f"{_count(len(workers), 'worker')} {left} not wait any more: {reason}."
        case ev.Revoked(worker=worker, reason=reason):
            return f"Worker {worker[:10]} takes no part any more: {reason}."
        case (
            ev.Seated()
            | ev.SeatReady()
            | ev.Attending()
            | ev.SeatMoved()
            | ev.Unreachable()
            | ev.Returned()
            | ev.Draining()
            | ev.SeatLeft()
            | ev.Excluded()
            | ev.Contributed()
        ):
            return f"{place(event.member, state)} {_of_member(event)}."
        case ev.TermBegan(term=term, coordinator=coordinator, reason=reason):
            return f"Term {term} begins: {coordinator[:10]} coordinates from here on ({reason})."
        case ev.Equivocated(term=term, coordinator=coordinator):
            return f"The coordinator of term {term}, {coordinator[:10]}, signed two histories: it holds no term again."
        case ev.ItemsReleased(step=step, member=member, items=items):
            number, where = len(unpack(items)), place(member, state, within=True)
            goes = "goes" if number == 1 else "go"
            return f"{_count(number, 'work item')} of step {step} {goes} from {where} to others."
        case ev.ItemDropped(step=step, microbatch=microbatch, stages=stages, reason=reason):
            return f"Microbatch {microbatch} of step {step} was dropped by {_stages(stages)}: {reason}."
        case ev.ReduceOpened() | ev.ReduceAborted() | ev.Disputed() | ev.MomentumLost() | ev.StageStepped():
            return f"Stage {event.stage}, step {event.step}: {_of_reduce(event, state)}."
        case _:
            assert_never(event)


def waiting(pause: Pause) -> str:
    """Why a run stands still, and what ends that."""
    return (
        f"Paused: nobody holds stage {pause.stage} at step {pause.step} any more. Everything is kept; it goes on when "
        "a worker that held the stage comes back."
    )


def place(member: int, state: RunState, *, within: bool = False) -> str:
    """Which seat a member has, in words. `within` a sentence it begins with a small letter."""
    seat = state.seats.get(ev.Member(member))
    words = f"member {member}" if seat is None else f"stage {seat.stage}, seat {seat.seat}"
    return words if within else words.capitalize()


_OfMember = (
    ev.Seated
    | ev.SeatReady
    | ev.Attending
    | ev.SeatMoved
    | ev.Unreachable
    | ev.Returned
    | ev.Draining
    | ev.SeatLeft
    | ev.Excluded
    | ev.Contributed
)
_OfReduce = ev.ReduceOpened | ev.ReduceAborted | ev.Disputed | ev.MomentumLost | ev.StageStepped


def _of_member(event: _OfMember) -> str:
    match event:
        case ev.Seated(worker=worker, account=account):
            return f"was taken by worker {worker[:10]} of {account}"
        case ev.SeatReady(step=step):
            return f"is ready at step {step}"
        case ev.Attending():
            return "catches up: it is sent what each step updates"
        case ev.SeatMoved():
            return "can be reached at another address"
        case ev.Unreachable(reason=reason):
            return f"cannot be reached ({reason}): its work goes to others"
        case ev.Returned():
            return "answers again"
        case ev.Draining(reason=reason):
            return f"finishes what it has begun, then leaves: {reason}"
        case ev.SeatLeft(reason=reason):
            return f"is gone: {reason}"
        case ev.Excluded(step=step, reason=reason):
            return f"is left out of step {step}: {reason}"
        case ev.Contributed(step=step, items=items, tokens=tokens, flops=flops):
            work = f"{_count(len(unpack(items)), 'work item')} of step {step}"
            return f"is credited with {work}: {tokens:,} tokens, {Flops(flops)}"


def _of_reduce(event: _OfReduce, state: RunState) -> str:
    match event:
        case ev.ReduceOpened(attempt=attempt, members=members):
            again = f", attempt {attempt + 1}" if attempt else ""
            return f"all items are folded; {_count(len(members), 'member')} add up their gradients{again}"
        case ev.ReduceAborted(reason=reason):
            return f"the sum is begun again: {reason}"
        case ev.Disputed(owner=owner, second=second, tensor=tensor, error=error):
            pair = f"{place(owner, state, within=True)} and {place(second, state, within=True)}"
            return f"{pair} computed different updates of {tensor} (by {error:.1e})"
        case ev.MomentumLost(tensors=tensors):
            return f"nobody has the momentum of {_count(len(tensors), 'tensor')} any more; it begins at zero"
        case ev.StageStepped(root=root, gradient_norm=norm):
            return f"every member holds the new weights {root[:12]} (gradient norm {norm:.3g})"


def _count(number: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def _stages(stages: Sequence[int]) -> str:
    return f"stage{'' if len(stages) == 1 else 's'} {', '.join(map(str, stages))}"
