"""How a worker gets its stage's state, keeps it, and gives it to others.

A snapshot is written before the step is committed, so that whatever the log commits can be loaded. A stage's state goes
to members of the same stage only: weights and frozen tensors as content in chunks, from all of them at once; optimizer
state apart, from the one that has it. Knows nothing of items or reduces.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from koinon.errors import FrameMalformed, NothingToResume, PeerError, Refused, SnapshotCorrupt
from koinon.model.snapshot import load, root
from koinon.model.stage import Stage
from koinon.net.chunks import ChunkWanted
from koinon.net.transport import Answer, Transport
from koinon.nodes import messages as m
from koinon.nodes.clock import loop_time
from koinon.nodes.compute import Compute
from koinon.nodes.content import FROZEN, WEIGHTS, Content, over, under
from koinon.nodes.custody import Custody, Label, OwnDisk, snapshot_path, snapshots, verified
from koinon.nodes.download import Brought, Download, Progress
from koinon.nodes.engine import Engine, Prepared
from koinon.nodes.follower import RunFollower
from koinon.nodes.offers import Offers
from koinon.nodes.switchboard import Switchboard
from koinon.optim.update import State
from koinon.run.spec import RunSpec
from koinon.run.state import RunState, SeatStatus
from koinon.units import BitsPerSecond, PeerId, Seconds

log = logging.getLogger(__name__)
FETCH_PAUSE = 0.1
GLANCE = 0.02
WORTH_ATTENDING = 0.25
"""Steps that a stage takes during one fetch of its weights, from which on another fetch is likely to be late too."""
MOMENTUM_TRIES = 3
"""How often members that hardly have it are asked for optimizer state."""
FETCH_PATIENCE = Seconds(10.0)
"""Whoever waits longer for a first member to be ready asks anew: the one that everybody waits for may be gone."""
_MOMENTUM = "momentum/"
STATES_PER_TENSOR = 3
"""The most that an optimizer keeps of a tensor: AdamW two of its size, and some numbers."""
HEADER_ROOM = 1 << 20


class Syncer:
    """`progress`: of the fetch that is under way; None if there is none."""

    def __init__(
        self,
        transport: Transport,
        board: Switchboard,
        compute: Compute,
        directory: Path,
        secret: bytes | None,
        custody: Custody | None = None,
    ) -> None:
        """custody: who keeps the snapshots; the given directory if nobody else does."""
        self._transport, self._compute, self._secret = transport, compute, secret
        self._custody = custody or OwnDisk(directory)
        self._engine: Engine | None = None
        self._keep, self._every, self._steps = 3, 1, 0
        self._state: Callable[[], RunState] = RunState
        self._offers = Offers(None)
        self._pinning = asyncio.Lock()
        self._download = Download(transport, directory, self._on_progress)
        self.progress: Progress | None = None
        self._steps_per_fetch = self._took = 0.0
        board.on(m.ContentWanted, self._on_content_wanted)
        board.on(ChunkWanted, self._on_chunk_wanted)
        board.on(m.MomentumWanted, self._on_momentum_wanted)
        board.on(m.MomentumGiven, self._on_momentum_given, self._momentum_limit)
        board.on(m.InventoryWanted, self._on_inventory_wanted)

    def inventory(self, wanted: int | None) -> tuple[int | None, tuple[tuple[int, str], ...]]:
        """The stage to ask for, and the (step, root) of what can be restored here, newest first."""
        labels = self._custody.labels()
        stage = labels[0].stage if labels else wanted
        return stage, tuple((label.step, label.root) for label in labels if label.stage == stage)

    async def begin(self, welcome: m.Welcome, spec: RunSpec, follower: RunFollower) -> Engine:
        """Found, load or fetch, as the coordinator said. Raises StateError if none of them can be done."""
        self._state, self._engine = lambda: follower.state, None
        self._keep, self._every, self._steps = spec.train.keep_snapshots, spec.train.snapshot_every, spec.train.steps
        self._offers = Offers(BitsPerSecond.mbit(spec.link.rate_mbit) if spec.link.rate_mbit else None)
        config, momentum, before = spec.model, dict[str, State](), dict[str, Tensor]()
        match welcome.begin:
            case "found":
                step, stage = (
                    0,
                    await self._compute.run(lambda: Stage.found(config, welcome.stage, self._secret or os.urandom(32))),
                )
            case "load":
                step = welcome.step
                stage, momentum, before = await self._load(spec, welcome)
            case _:
                brought = await self._fetch(welcome.stage)
                step, stage = brought.step, Stage.restore(config, welcome.stage, brought.frozen, brought.weights)
                momentum = await self._lone_momentum(welcome.stage, step, sorted(brought.weights))
                before = await self._before(welcome.stage, brought)
        budget = spec.league.graph_budget_mib * 2**20
        self._engine = engine = Engine(config, spec.optim, stage, step, momentum, budget)
        await self._settle(engine, before)
        return engine

    async def catch_up(self, engine: Engine, follower: RunFollower) -> None:
        """Fetch the stage's newest weights into an engine that missed a step, if our copy of the log knows of one."""
        index = engine.stage.index
        if follower.state.stages[index].step <= engine.step:
            return
        if self._steps_per_fetch >= WORTH_ATTENDING:
            await self._attend(engine, follower)
            return
        try:
            brought = await self._fetch(index, newer_than=engine.step, seed=await self._current(engine))
        except NothingToResume as error:
            log.info("%s", error)  # whoever waits for us to be ready hears of it too
            return
        momentum = await self._lone_momentum(index, brought.step, engine.names)
        before = await self._before(index, brought)
        await self._compute.run(lambda: engine.adopt(brought.weights, momentum, brought.step))
        await self._settle(engine, before)

    async def _attend(self, engine: Engine, follower: RunFollower) -> None:
        """Wait until the engine has what a reduce updated: the stage steps faster than its weights can be fetched."""
        index, first, patience = engine.stage.index, engine.step, max(FETCH_PATIENCE.value, 4 * self._took)
        if (mine := follower.state.member_of(self._transport.me)) is None:
            return
        if mine.status is SeatStatus.SYNCING:
            await follower.insist(m.Attend(mine.member))
        moved, known = loop_time(), follower.state.stages[index].step
        while engine.step == first and follower.state.member_of(self._transport.me) is not None:
            await asyncio.sleep(GLANCE)
            stage = follower.state.stages[index]
            if stage.step != known or stage.reduce is not None:
                moved, known = loop_time(), stage.step
            elif loop_time() - moved > patience:
                self._steps_per_fetch = 0.0  # it has come to rest: what it has now can be fetched
                return
        momentum = await self._lone_momentum(index, engine.step, engine.names)
        step = engine.step
        await self._compute.run(lambda: engine.momentum.update(momentum) if engine.step == step else None)

    async def _settle(self, engine: Engine, before: dict[str, Tensor]) -> None:
        """Keep what just came, on disk too, and the weights of the step before, if the log knows them: a stage that has
        not taken that step yet may ask for one of its items again, and nobody else may be left who can execute it."""
        if before and root(before) == self._state().stages[engine.stage.index].root_at(engine.step - 1):
            engine.remember(before)
        await self._compute.run(lambda: self.save(engine, engine.current()))
        self._download.forget()

    # --- from our own snapshots

    async def _load(self, spec: RunSpec, welcome: m.Welcome) -> tuple[Stage, dict[str, State], dict[str, Tensor]]:
        path = await self._custody.restore(welcome.step)
        try:
            stage, momentum = await self._compute.run(lambda: _restored(spec, welcome.stage, path))
        except SnapshotCorrupt as error:
            self._custody.refuse(path)
            raise NothingToResume(f"{error} It was set aside.") from error
        older = await self._custody.restore(welcome.step - 1)
        return stage, momentum, await self._compute.run(lambda: _weights_at(older))

    # --- from others

    async def _fetch(self, stage: int, newer_than: int = -1, seed: Content | None = None) -> Brought:
        """From the members that are ready. Waits while there is hope of one."""
        began = loop_time()
        while True:
            state = self._state()
            if (mine := state.member_of(self._transport.me)) is None:
                raise NothingToResume(f"The seat in stage {stage} is void: ask for a seat again.")
            ready = [PeerId(s.worker) for s in state.ready(stage) if s.member != mine.member]
            known = state.stages[stage]
            try:
                brought = await self._download.bring(stage, ready, known.root_at, newer_than=newer_than, seed=seed)
                if brought is not None:
                    self._judge(stage, brought)
                    return brought
            except PeerError as error:
                log.info("the state of stage %s did not come whole: %s", stage, error)
            others = [s for s in state.seats_of(stage) if s.member != mine.member]
            if known.versions and not ready:
                began = (
                    loop_time()
                )  # the stage is emptied: whoever has it comes to us, or all go back and our seat ends
            elif not others or (not ready and loop_time() - began > FETCH_PATIENCE.value):
                raise NothingToResume(f"Nobody in stage {stage} has its state any more: ask for a seat again.")
            await asyncio.sleep(FETCH_PAUSE)

    def _judge(self, stage: int, brought: Brought) -> None:
        """How many steps the stage would take while its weights, and nothing else, were fetched again."""
        missed = max(0, self._state().stages[stage].step - brought.step)
        weights = sum(tensor.nbytes for tensor in brought.weights.values())
        self._steps_per_fetch = missed * min(1.0, weights / max(1, brought.fetched))
        self._took = brought.took

    async def _before(self, stage: int, brought: Brought) -> dict[str, Tensor]:
        """Weights of the step before, where some stage has not taken it; none if nobody has them any more."""
        state = self._state()
        if state.step >= brought.step or brought.step == 0:
            return {}
        ready = [PeerId(s.worker) for s in state.ready(stage) if s.worker != self._transport.me]
        seed = await asyncio.to_thread(Content.of, brought.step, brought.frozen, brought.weights)
        self._download.forget()
        try:
            found = await self._download.bring(
                stage, ready, state.stages[stage].root_at, step=brought.step - 1, seed=seed
            )
        except PeerError as error:
            log.info("nobody gave the weights of step %s: %s", brought.step - 1, error)
            return {}
        return {} if found is None else found.weights

    async def _lone_momentum(self, stage: int, step: int, names: list[str]) -> dict[str, State]:
        """Where only one member is ready, a newcomer is the only second that its optimizer state can have."""
        ready = [s for s in self._state().ready(stage) if s.worker != self._transport.me]
        if len(ready) != 1 or step == 0:
            return {}
        for _ in range(MOMENTUM_TRIES):
            try:
                return await self.momentum(PeerId(ready[0].worker), stage, step, names)
            except PeerError as error:
                log.info("member %s gave no optimizer state: %s", ready[0].member, error)
        return {}  # the reduce asks for it again

    async def momentum(self, peer: PeerId, stage: int, step: int, names: list[str]) -> dict[str, State]:
        """Optimizer state of these tensors before `step`, as far as `peer` has it.

        Raises PeerError; so also where it is not at that step: it may have to read yet that the step before is taken.
        """
        reply = await self._transport.request(peer, m.BULK, m.MomentumWanted(stage, step, tuple(names)))
        assert isinstance(reply.header, m.Tensors)
        return _states(_tensors(reply.body)) if reply.body else {}

    def _on_progress(self, progress: Progress | None) -> None:
        self.progress = progress

    # --- to disk

    def save(self, engine: Engine, prepared: Prepared) -> None:
        """Write a snapshot, if one is due at that step. Raises DiskFull. In the compute thread."""
        if prepared.step % self._every and prepared.step != self._steps:
            return
        tensors = over(engine.stage.frozen(), FROZEN) | over(prepared.weights, WEIGHTS)
        tensors |= _momentum(prepared.momentum)
        self._custody.keep(Label(engine.stage.index, prepared.step, prepared.root), tensors)

    def prune(self, step: int) -> None:
        """Keep the newest few snapshots up to `step`, and all later ones."""
        self._custody.release(step, self._keep)
        self._offers.tidy()

    def root_of(self, engine: Engine | None) -> str:
        assert engine is not None
        return root(engine.weights())

    # --- what others ask for

    async def _on_content_wanted(self, peer: PeerId, message: m.ContentWanted, _body: bytearray) -> Answer:
        engine = self._same_stage(peer, message.stage)
        async with self._pinning:  # hashing takes a second per gigabyte, and once is enough for all who ask
            content = await self._offered(engine, message)
        if content is None:
            return m.ContentOffered(-1, "", ""), b""
        encoded = content.manifest.encode()
        return m.ContentOffered(content.step, content.root, content.manifest.root, len(encoded)), encoded

    async def _offered(self, engine: Engine, wish: m.ContentWanted) -> Content | None:
        """The content to give, pinned. Weights change by being replaced, so what is taken hold of here stays."""
        pinned = self._offers.active(wish.newer_than) if wish.step is None else self._offers.pinned(wish.step)
        if pinned is not None:
            return pinned
        step, frozen, weights, previous = await self._compute.run(
            lambda: (engine.step, engine.stage.frozen(), engine.weights(), dict(engine.previous))
        )
        wanted = step if wish.step is None else wish.step
        if wanted <= wish.newer_than or wanted not in ((step, step - 1) if previous else (step,)):
            return None
        if (known := self._offers.pinned(wanted)) is not None:
            return known
        content = await asyncio.to_thread(Content.of, wanted, frozen, weights if wanted == step else previous)
        self._offers.pin(content)
        return content

    async def _current(self, engine: Engine) -> Content:
        """What this member holds itself, to begin a fetch with: its frozen tensors need not come again."""
        step, frozen, weights = await self._compute.run(lambda: (engine.step, engine.stage.frozen(), engine.weights()))
        return await asyncio.to_thread(Content.of, step, frozen, weights)

    async def _on_chunk_wanted(self, peer: PeerId, message: ChunkWanted, _body: bytearray) -> Answer:
        engine = self._same_stage(peer, None)
        reduce = self._state().stages[engine.stage.index].reduce
        return await self._offers.chunk(message.digest, None if reduce is None else (reduce.step, reduce.attempt))

    async def _on_momentum_wanted(self, peer: PeerId, message: m.MomentumWanted, _body: bytearray) -> Answer:
        engine = self._same_stage(peer, message.stage)

        def packed() -> bytes | None:
            if engine.step != message.step:
                return None
            tensors = _momentum({n: engine.momentum[n] for n in message.tensors if n in engine.momentum})
            return safetensors.torch.save(tensors) if tensors else b""

        body = await self._compute.run(packed)
        if body is None:
            raise Refused(f"This member is not at step {message.step}.")
        return m.Tensors(message.step, len(body)), body

    async def hand_over(self, peer: PeerId, engine: Engine, names: list[str]) -> None:
        """Give optimizer state to another member of the stage, who keeps what it lacks of it. Raises PeerError."""
        step, body = await self._compute.run(
            lambda: (engine.step, safetensors.torch.save(_momentum({name: engine.momentum[name] for name in names})))
        )
        await self._transport.request(peer, m.BULK, m.MomentumGiven(engine.stage.index, step, len(body)), body)

    def _momentum_limit(self, peer: PeerId, message: m.MomentumGiven) -> int:
        return STATES_PER_TENSOR * sum(self._same_stage(peer, message.stage).sizes.values()) + HEADER_ROOM

    async def _on_momentum_given(self, peer: PeerId, message: m.MomentumGiven, body: bytearray) -> Answer:
        engine = self._same_stage(peer, message.stage)
        given = _states(_tensors(body))

        def keep() -> bool:
            if engine.step == message.step:
                engine.momentum |= {n: s for n, s in given.items() if n in engine.sizes and n not in engine.momentum}
            return engine.step == message.step

        if not await self._compute.run(keep):
            raise Refused(f"This member is not at step {message.step}: hand over what you have then.")
        return m.Ack()

    async def _on_inventory_wanted(self, peer: PeerId, message: m.InventoryWanted, _body: bytearray) -> Answer:
        if peer != self._state().coordinator:
            raise Refused("Only the coordinator of the run asks what lies on a member's disk.")
        labels = await asyncio.to_thread(self._custody.verified, dict(message.versions))
        return m.Inventory(tuple(label.step for label in labels if label.stage == message.stage))

    def _same_stage(self, peer: PeerId, stage: int | None) -> Engine:
        """A stage's tensors go to its own members only. `stage`: what the peer believes it to be, if it says so."""
        seat = self._state().member_of(peer)
        if self._engine is None or seat is None or seat.status is SeatStatus.LEFT:
            raise Refused("Only members of the run are given state, and only by members that have it.")
        if seat.stage != self._engine.stage.index or stage not in (None, seat.stage):
            raise Refused("No account is ever given another stage's tensors.")
        return self._engine


def _weights_at(path: Path) -> dict[str, Tensor]:
    """The weights in a snapshot, unchecked; none if it is not there or cannot be read."""
    try:
        return under(load(path)[0], WEIGHTS) if path.exists() else {}
    except SnapshotCorrupt:
        return {}


def _restored(spec: RunSpec, stage: int, path: Path) -> tuple[Stage, dict[str, State]]:
    tensors, label = load(path)
    weights = under(tensors, WEIGHTS)
    if root(weights) != label.get("root"):
        raise SnapshotCorrupt(f"{path} is damaged: its weights are not those it was written with.")
    return Stage.restore(spec.model, stage, under(tensors, FROZEN), weights), _states(tensors)


def _momentum(states: Mapping[str, State]) -> dict[str, Tensor]:
    return {f"{_MOMENTUM}{name}/{part}": tensor for name, state in states.items() for part, tensor in state.items()}


def _states(tensors: Mapping[str, Tensor]) -> dict[str, State]:
    states: dict[str, State] = {}
    for key, tensor in under(tensors, _MOMENTUM).items():
        name, _, part = key.rpartition("/")
        states.setdefault(name, {})[part] = tensor
    return states


def _tensors(body: bytes | bytearray) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(bytes(body))
    except SafetensorError as error:
        raise FrameMalformed(f"A peer's tensors cannot be read: {error}") from error


__all__ = ["MOMENTUM_TRIES", "Label", "Syncer", "snapshot_path", "snapshots", "verified"]
