"""What every league of this folder is watched for: a contribution's list names the items whose gradients are in it.

Losses alone would not tell: one lost microbatch moves them by a few millionths.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

from koinon.nodes.engine import Engine
from koinon.nodes.reducer import Reducer


@pytest.fixture(autouse=True)
def folded_as_listed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each engine's folds since its accumulators were last empty are held against what the log says it contributes."""
    folds: dict[int, list[int]] = defaultdict(list)
    wrong: list[str] = []
    backward, finish, zero, send = Engine.backward, Engine.finish, Engine.zero, Reducer._send_slices

    def counted(compute: Any) -> Any:
        def call(self: Engine, key: tuple[int, int, int], *rest: Any, fold: bool) -> Any:
            if fold:
                folds[id(self)].append(key[2])
            return compute(self, key, *rest, fold=fold)

        return call

    def emptied(self: Engine) -> None:
        folds[id(self)].clear()
        zero(self)

    async def compared(self: Reducer, reduce: Any, *rest: Any) -> None:
        folded, listed = sorted(folds[id(self._engine)]), list(reduce.items_of(self._member))
        if folded != listed:
            wrong.append(f"stage {self._stage}, step {reduce.step}, member {self._member}: {folded}, listed {listed}")
        await send(self, reduce, *rest)

    monkeypatch.setattr(Engine, "backward", counted(backward))
    monkeypatch.setattr(Engine, "finish", counted(finish))
    monkeypatch.setattr(Engine, "zero", emptied)
    monkeypatch.setattr(Reducer, "_send_slices", compared)
    yield
    assert not wrong
