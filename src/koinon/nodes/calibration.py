"""How fast this machine computes items of a stage: the real engine on random tokens, in a process of its own.

The process is `python -m koinon.nodes.calibration`: an order on its standard input, lines of JSON on its output. It
loads torch, so the caller need not, and stays as responsive as it was. The stage is the run's dearest, because a seat
is drawn. Knows nothing of the network.

    in   {"spec": "...", "threads": 1, "seconds": 2.0}
    out  {"share": 0.4}   ...   {"result": {...}}
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec

from koinon.errors import StateError
from koinon.model.flops import item_flops
from koinon.nodes.machine import Calibration
from koinon.run.spec import RunSpec
from koinon.units import Seconds

LASTS: Final = Seconds(2.0)
ITEMS: Final = 64
"""At most; small stages are done sooner than the time is up."""
Progress = Callable[[float], None]


def dearest_stage(spec: RunSpec) -> int:
    """The stage whose items cost most."""
    size, context = spec.train.microbatch, spec.model.context
    return max(range(spec.model.stages), key=lambda s: item_flops(spec.model, s, size, context).total.count)


async def calibrate(spec: RunSpec, progress: Progress, *, threads: int = 1, lasts: Seconds = LASTS) -> Calibration:
    """Measure. `progress` hears shares of 1. Raises StateError if the stage cannot be computed here."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "koinon.nodes.calibration",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is the caller's
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        order = {"spec": spec.to_toml(), "threads": threads, "seconds": lasts.value}
        process.stdin.write(json.dumps(order).encode())
        process.stdin.close()
        async for line in process.stdout:
            said: dict[str, Any] = json.loads(line)
            if "result" in said:
                return msgspec.convert(said["result"], Calibration)
            progress(float(said["share"]))
        assert process.stderr is not None
        cause = (await process.stderr.read()).decode(errors="replace").strip().splitlines()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
    raise StateError(
        f"An item of this run cannot be computed here: {cause[-1] if cause else 'the process was killed'}."
    )


def measure(spec: RunSpec, stage: int, seconds: float, progress: Progress) -> Calibration:
    """Compute items of the stage for about that long, after one that is not counted. In a process that has torch."""
    import torch

    size, context = spec.train.microbatch, spec.model.context
    items = _items(spec, stage)
    next(items)
    began, done, passed = time.perf_counter(), 0, 0.0
    while not done or (done < ITEMS and passed < seconds):
        next(items)
        done, passed = done + 1, time.perf_counter() - began
        progress(max(passed / seconds, done / ITEMS))
    return Calibration(
        stage=stage,
        items=done,
        seconds_per_item=passed / done,
        flops_per_item=item_flops(spec.model, stage, size, context).total.count,
        tokens_per_item=size * context,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        device=f"CPU, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}",
        has_unused_gpu=torch.cuda.is_available(),
    )


def _items(spec: RunSpec, stage: int) -> Iterator[None]:
    """Each step computes one item, forward and backward, and folds it."""
    import numpy as np
    import torch

    from koinon.model import codec
    from koinon.model.stage import Stage
    from koinon.nodes.engine import Engine

    model, size = spec.model, spec.train.microbatch
    engine = Engine(model, spec.optim, Stage.found(model, stage, bytes(32)), 0, {}, spec.league.graph_budget_mib << 20)
    draw, tokens = np.random.default_rng(0), size * model.context
    noise = torch.Generator().manual_seed(0)

    def coefficients() -> bytes:
        return codec.encode(torch.randn(tokens, model.boundary_width, generator=noise), model.codec)

    for number in range(1 << 30):
        key, ids = (0, 0, number), draw.integers(0, model.vocab, (size, model.context + 1))
        entered = None if engine.is_first else coefficients()
        if engine.is_last:
            engine.finish(key, 0, ids[:, :-1], ids[:, 1:], entered, spec.step_tokens, fold=True)
        else:
            engine.forward(key, 0, ids[:, :-1], entered, train=True)
            engine.backward(key, 0, ids[:, :-1], entered, coefficients(), fold=True)
        yield


def main() -> None:
    order = json.load(sys.stdin)
    import torch

    torch.set_num_threads(order["threads"])
    spec = RunSpec.parse(order["spec"])
    result = measure(spec, dearest_stage(spec), order["seconds"], lambda share: _say(share=round(min(1.0, share), 3)))
    _say(result=msgspec.to_builtins(result))


def _say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
