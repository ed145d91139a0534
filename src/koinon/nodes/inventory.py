"""Which snapshots on this machine can be trusted: their bytes are hashed again and held against the log.

The hashing runs in a process of its own, because the control process loads no torch.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from koinon.errors import StateError
from koinon.nodes.rundir import RunDir
from koinon.run.state import RunState


async def verified_snapshots(directory: RunDir, state: RunState) -> dict[int, dict[int, str]]:
    """Stage -> step -> root of every snapshot whose weights hash to the root that the log has for them."""
    roots = {s.index: {v.step: v.root for v in s.versions} for s in state.stages}
    order = [[str(path), stage, roots.get(stage, {})] for (stage, _), path in directory.seats().items()]
    checker = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "koinon.nodes.inventory",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is the caller's
    )
    answer, _ = await checker.communicate(json.dumps(order).encode())
    if checker.returncode != 0:
        raise StateError("The snapshots of this run could not be read; the error is printed above.")
    found: dict[int, dict[int, str]] = {}
    for stage, step, root in json.loads(answer):
        found.setdefault(stage, {})[step] = root
    return found


def _check(order: list[tuple[str, int, dict[str, str]]]) -> list[tuple[int, int, str]]:
    from koinon.nodes.syncer import snapshots, verified

    good = []
    for folder, stage, roots in order:
        for path, label in snapshots(Path(folder)).items():
            expected = roots.get(str(label.step))
            if label.stage == stage and expected == label.root and verified(path, expected):
                good.append((stage, label.step, label.root))
    return good


if __name__ == "__main__":
    print(json.dumps(_check(json.load(sys.stdin))))
