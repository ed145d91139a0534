"""What a worker counts about itself, for people and for routing; credit comes from the log alone."""

from __future__ import annotations

import resource
from collections import deque
from statistics import median

import msgspec

from koinon.nodes import messages as m
from koinon.nodes.messages import Kind
from koinon.nodes.workbench import Item

_LENGTH_PREFIX = 4
_REMEMBERED = 32
"""Crossings whose median is told: some seconds' worth, so that a link that changes is noticed."""


class Counters:
    """Of one worker, since it started."""

    def __init__(self) -> None:
        self.items = self.tokens = self.boundary_bytes = self.boundary_tokens = self.flops_per_item = 0
        self._crossings: deque[float] = deque(maxlen=_REMEMBERED)

    def count(self, item: Item) -> None:
        """An item was folded, or answered."""
        if item.lease.kind is Kind.TRAIN:
            self.items += 1
            self.tokens += _tokens(item)

    def sent(self, header: m.Message, body: bytes, item: Item, seconds: float) -> None:
        """A neighbour took this frame; its verdict was here after so long."""
        if item.lease.kind is Kind.TRAIN:
            self._crossings.append(seconds)
            self.boundary_bytes += _LENGTH_PREFIX + len(msgspec.msgpack.encode(header)) + len(body)
            self.boundary_tokens += _tokens(item)

    def as_message(self, state: str, busy: float, queued: int, recomputed: int) -> m.Telemetry:
        """busy: seconds of compute; queued: jobs that could run; recomputed: forwards that were run again."""
        return m.Telemetry(
            state=state,
            tokens=self.tokens,
            busy=busy,
            seconds_per_item=busy / self.items if self.items else 0.0,
            queued=queued,
            boundary_bytes=self.boundary_bytes,
            boundary_tokens=self.boundary_tokens,
            flops=self.items * self.flops_per_item,
            recomputed_flops=recomputed * self.flops_per_item // 3,
            memory_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            seconds_per_crossing=median(self._crossings) if self._crossings else 0.0,
        )


def _tokens(item: Item) -> int:
    sequences, length = item.ids.shape
    return int(sequences * (length - 1))
