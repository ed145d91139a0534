"""How a worker gets its stage's state, keeps it on disk, and gives it to others.

A snapshot is one safetensors file per step: frozen tensors, weights, and the optimizer state of the tensors that this
member owns or seconds. It is written before the step is committed, so that whatever the log commits can be loaded.
A stage's state goes to members of the same stage only. Knows nothing of items or reduces.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from koinon.errors import FrameMalformed, NothingToResume, PeerError, Refused, SnapshotCorrupt, StateError
from koinon.model.snapshot import load, metadata, root, save
from koinon.model.stage import Stage
from koinon.net.transport import Answer, Transport
from koinon.nodes import messages as m
from koinon.nodes.clock import loop_time
from koinon.nodes.compute import Compute
from koinon.nodes.engine import Engine, Prepared
from koinon.nodes.follower import RunFollower
from koinon.nodes.switchboard import Switchboard
from koinon.optim.update import State
from koinon.run.spec import RunSpec
from koinon.run.state import RunState, SeatStatus
from koinon.units import PeerId, Seconds

log = logging.getLogger(__name__)
FETCH_PAUSE = 0.1
FETCH_PATIENCE = Seconds(10.0)
"""Whoever waits longer for a first member to be ready asks anew: the one that everybody waits for may be gone."""
_FROZEN, _WEIGHTS, _MOMENTUM, _BEFORE = "frozen/", "weights/", "momentum/", "before/"


class Label(msgspec.Struct, frozen=True):
    """What a snapshot says of itself. `root` is that of the weights."""

    stage: int
    step: int
    root: str


def snapshot_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}.safetensors"


def snapshots(directory: Path) -> dict[Path, Label]:
    """Readable snapshots of a worker's directory, newest first. Unreadable ones are passed over with a warning."""
    found: dict[Path, Label] = {}
    for path in sorted(directory.glob("step-*.safetensors"), reverse=True):
        try:
            found[path] = msgspec.convert(metadata(path), Label, strict=False)
        except (SnapshotCorrupt, msgspec.ValidationError) as error:
            log.warning("%s cannot be used: %s", path, error)
    return found


class Syncer:
    def __init__(
        self, transport: Transport, board: Switchboard, compute: Compute, directory: Path, secret: bytes | None
    ) -> None:
        self._transport, self._compute, self._directory, self._secret = transport, compute, directory, secret
        self._engine: Engine | None = None
        self._keep, self._every, self._steps = 3, 1, 0
        self._state: Callable[[], RunState] = RunState
        directory.mkdir(parents=True, exist_ok=True)
        board.on(m.StateWanted, self._on_state_wanted)
        board.on(m.MomentumWanted, self._on_momentum_wanted)

    def inventory(self, wanted: int | None) -> tuple[int | None, tuple[tuple[int, str], ...]]:
        """The stage to ask for, and the (step, root) of what lies on this disk, newest first."""
        labels = list(snapshots(self._directory).values())
        stage = labels[0].stage if labels else wanted
        return stage, tuple((label.step, label.root) for label in labels if label.stage == stage)

    async def begin(self, welcome: m.Welcome, spec: RunSpec, follower: RunFollower) -> Engine:
        """Found, load or fetch, as the coordinator said. Raises StateError if none of them can be done."""
        self._state = lambda: follower.state
        self._keep, self._every, self._steps = spec.train.keep_snapshots, spec.train.snapshot_every, spec.train.steps
        config = spec.model
        match welcome.begin:
            case "found":
                stage = await self._compute.run(
                    lambda: Stage.found(config, welcome.stage, self._secret or os.urandom(32))
                )
                step, momentum, before = 0, dict[str, State](), dict[str, Tensor]()
            case "load":
                path = snapshot_path(self._directory, welcome.step)
                step = welcome.step
                try:
                    stage, momentum = await self._compute.run(lambda: _restored(spec, welcome.stage, path))
                except SnapshotCorrupt as error:
                    path.rename(path.with_suffix(".damaged"))  # kept for whoever wants to know why
                    raise NothingToResume(f"{error} It was set aside.") from error
                before = await self._compute.run(lambda: _weights_at(snapshot_path(self._directory, step - 1)))
            case _:
                step, tensors = await self._fetch(welcome.stage, follower)
                stage = Stage.restore(config, welcome.stage, _under(tensors, _FROZEN), _under(tensors, _WEIGHTS))
                momentum, before = _states(tensors), _under(tensors, _BEFORE)
        budget = spec.league.graph_budget_mib * 2**20
        self._engine = engine = Engine(config, spec.optim, stage, step, momentum, budget)
        self._remember(engine, before, follower.state)
        await self._compute.run(lambda: self.save(engine, engine.current()))
        return engine

    async def catch_up(self, engine: Engine, follower: RunFollower) -> None:
        """Fetch the stage's newest weights into an engine that missed a step, if our copy of the log knows of one."""
        if follower.state.stages[engine.stage.index].step <= engine.step:
            return
        step, tensors = await self._fetch(engine.stage.index, follower, newer_than=engine.step)
        await self._compute.run(lambda: engine.adopt(_under(tensors, _WEIGHTS), _states(tensors), step))
        self._remember(engine, _under(tensors, _BEFORE), follower.state)
        await self._compute.run(lambda: self.save(engine, engine.current()))

    def _remember(self, engine: Engine, before: dict[str, Tensor], state: RunState) -> None:
        """Keep the weights of the step before, if the log knows them: a stage that has not taken that step yet may ask
        for one of its items again, and nobody else may be left who can execute it."""
        if before and root(before) == state.stages[engine.stage.index].root_at(engine.step - 1):
            engine.remember(before)

    async def _fetch(self, stage: int, follower: RunFollower, newer_than: int = -1) -> tuple[int, dict[str, Tensor]]:
        """(step, tensors) from any member that is ready. Waits while there is hope of one."""
        began = loop_time()
        while True:
            seats = [s for s in follower.state.ready(stage) if s.worker != self._transport.me]
            for seat in seats:
                try:
                    reply = await self._transport.request(PeerId(seat.worker), m.BULK, m.StateWanted(stage))
                    assert isinstance(reply.header, m.Tensors)
                    if reply.header.step > newer_than and reply.body:
                        return reply.header.step, _tensors(reply.body)
                except PeerError as error:
                    log.info("member %s gave no state: %s", seat.member, error)
            others = [s for s in follower.state.seats_of(stage) if s.worker != self._transport.me]
            in_vain = not others or (not seats and loop_time() - began > FETCH_PATIENCE.value)
            if in_vain and newer_than < 0:
                raise NothingToResume(f"Nobody in stage {stage} has its state any more: ask for a seat again.")
            if newer_than >= 0 and follower.state.stages[stage].step <= newer_than:
                raise StateError("there is nothing newer to fetch")
            await asyncio.sleep(FETCH_PAUSE)

    async def momentum(self, peer: PeerId, stage: int, step: int, names: list[str]) -> dict[str, State]:
        """Optimizer state of these tensors before `step`, as far as `peer` has it."""
        reply = await self._transport.request(peer, m.BULK, m.MomentumWanted(stage, step, tuple(names)))
        assert isinstance(reply.header, m.Tensors)
        return _states(_tensors(reply.body)) if reply.body else {}

    def save(self, engine: Engine, prepared: Prepared) -> None:
        """Write a snapshot, if one is due at that step. Raises DiskFull. In the compute thread."""
        if prepared.step % self._every and prepared.step != self._steps:
            return
        label = Label(engine.stage.index, prepared.step, prepared.root)
        tensors = _over(engine.stage.frozen(), _FROZEN) | _over(prepared.weights, _WEIGHTS)
        tensors |= _momentum(prepared.momentum)
        path = snapshot_path(self._directory, prepared.step)
        save(path, tensors, {k: str(v) for k, v in msgspec.to_builtins(label).items()})

    def prune(self, step: int) -> None:
        """Keep the newest few snapshots up to `step`, and all later ones."""
        older = [
            path
            for path in sorted(self._directory.glob("step-*.safetensors"))
            if path <= snapshot_path(self._directory, step)
        ]
        for path in older[: -self._keep]:
            path.unlink(missing_ok=True)

    def root_of(self, engine: Engine | None) -> str:
        assert engine is not None
        return root(engine.weights())

    # --- what others ask for

    async def _on_state_wanted(self, peer: PeerId, message: m.StateWanted, _body: bytearray) -> Answer:
        engine = self._same_stage(peer, message.stage)

        # Where nobody else is ready, the newcomer is the only second that optimizer state can have.
        is_alone = len(self._state().ready(message.stage)) == 1
        others_lag = self._state().step < engine.step

        def packed() -> tuple[int, bytes]:
            tensors = _over(engine.stage.frozen(), _FROZEN) | _over(engine.weights(), _WEIGHTS)
            if is_alone:
                tensors |= _momentum(engine.momentum)
            if others_lag:
                tensors |= _over(engine.previous, _BEFORE)
            return engine.step, safetensors.torch.save({k: t.contiguous() for k, t in tensors.items()})

        step, body = await self._compute.run(packed)
        return m.Tensors(step, len(body)), body

    async def _on_momentum_wanted(self, peer: PeerId, message: m.MomentumWanted, _body: bytearray) -> Answer:
        engine = self._same_stage(peer, message.stage)

        def packed() -> bytes:
            if engine.step != message.step:
                return b""
            tensors = _momentum({n: engine.momentum[n] for n in message.tensors if n in engine.momentum})
            return safetensors.torch.save(tensors) if tensors else b""

        body = await self._compute.run(packed)
        return m.Tensors(message.step, len(body)), body

    def _same_stage(self, peer: PeerId, stage: int) -> Engine:
        """A stage's tensors go to its own members only."""
        seat = self._state().member_of(peer)
        if self._engine is None or seat is None or seat.status is SeatStatus.LEFT:
            raise Refused("Only members of the run are given state, and only by members that have it.")
        if seat.stage != self._engine.stage.index or stage != seat.stage:
            raise Refused("No account is ever given another stage's tensors.")
        return self._engine


def verified(path: Path, expected: str) -> bool:
    """Whether a snapshot's weights really hash to `expected`: its label alone proves nothing."""
    try:
        tensors, _ = load(path)
    except SnapshotCorrupt:
        return False
    return root(_under(tensors, _WEIGHTS)) == expected


def _weights_at(path: Path) -> dict[str, Tensor]:
    """The weights in a snapshot, unchecked; none if it is not there or cannot be read."""
    try:
        return _under(load(path)[0], _WEIGHTS) if path.exists() else {}
    except SnapshotCorrupt:
        return {}


def _restored(spec: RunSpec, stage: int, path: Path) -> tuple[Stage, dict[str, State]]:
    tensors, label = load(path)
    weights = _under(tensors, _WEIGHTS)
    if root(weights) != label.get("root"):
        raise SnapshotCorrupt(f"{path} is damaged: its weights are not those it was written with.")
    stage_ = Stage.restore(spec.model, stage, _under(tensors, _FROZEN), weights)
    return stage_, _states(tensors)


def _momentum(states: Mapping[str, State]) -> dict[str, Tensor]:
    return {f"{_MOMENTUM}{name}/{part}": tensor for name, state in states.items() for part, tensor in state.items()}


def _states(tensors: Mapping[str, Tensor]) -> dict[str, State]:
    states: dict[str, State] = {}
    for key, tensor in _under(tensors, _MOMENTUM).items():
        name, _, part = key.rpartition("/")
        states.setdefault(name, {})[part] = tensor
    return states


def _tensors(body: bytes | bytearray) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(bytes(body))
    except SafetensorError as error:
        raise FrameMalformed(f"A peer's tensors cannot be read: {error}") from error


def _over(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


__all__ = ["Label", "Syncer", "snapshot_path", "snapshots", "verified"]
