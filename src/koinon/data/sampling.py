"""Which windows of the store a step reads: a pure function of (seed, step).

The store is cut into windows of `context` tokens. In each pass over the data the cut is shifted and the windows are
permuted, both by a keyed hash, so every window is read once per pass, any trainer can continue at any step without
state, and who does not know the seed cannot tell what comes. Integers and SHA-256 only: every machine agrees.
Knows nothing of files or tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from koinon.errors import EmptyCorpus

_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class Windows:
    """`count` windows of `context` tokens that may begin up to `slack` tokens into the store."""

    count: int
    context: int
    slack: int

    @classmethod
    def cut(cls, tokens: int, context: int) -> Windows:
        """How a store of `tokens` is cut; a window also needs the token after it. Raises EmptyCorpus."""
        count = max(1, _fit(tokens, context) - 1)  # one window less leaves room to shift the cut by a whole window
        return cls(count, context, tokens - 1 - count * context)


def _fit(tokens: int, context: int) -> int:
    if tokens <= context:
        raise EmptyCorpus(
            f"There are {tokens} tokens, but one sequence of `context` {context} needs {context + 1}. "
            "Add text, or lower `context`."
        )
    return (tokens - 1) // context


def draw(seed: bytes, step: int, batch: int, tokens: int, context: int) -> tuple[int, ...]:
    """The sample ids (offsets of first tokens) of one step, shape (batch,).

    Equal for equal arguments on every machine; over `count` consecutive samples each window comes once.
    Raises EmptyCorpus when the store is shorter than one sequence.
    """
    windows = Windows.cut(tokens, context)
    return tuple(_sample(seed, number, windows) for number in range(step * batch, (step + 1) * batch))


def microbatches(
    seed: bytes, step: int, batch: int, microbatch: int, tokens: int, context: int
) -> list[tuple[int, ...]]:
    """The samples of one step in groups of `microbatch`; the last is shorter where it does not divide `batch`.

    The grouping does not change which samples a step has, so two runs that differ in it alone are comparable.
    """
    samples = draw(seed, step, batch, tokens, context)
    return grouped(samples, microbatch)


def grouped(samples: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(samples[start : start + size]) for start in range(0, len(samples), size)]


def evenly(sequences: int, tokens: int, context: int) -> tuple[int, ...]:
    """At most `sequences` sample ids spread over the store without overlap: the fixed windows of an evaluation."""
    fit = _fit(tokens, context)
    sequences = min(sequences, fit)
    return tuple(context * (number * fit // sequences) for number in range(sequences))


def _sample(seed: bytes, number: int, windows: Windows) -> int:
    sweep, place = divmod(number, windows.count)
    key = sha256(b"koinon/sampling/1\0" + sha256(seed).digest() + sweep.to_bytes(8, "big")).digest()
    shift = int.from_bytes(sha256(key + b"shift").digest()[:8], "big") % (windows.slack + 1)
    return shift + windows.context * permuted(key, place, windows.count)


def permuted(key: bytes, place: int, size: int) -> int:
    """Where a keyed permutation of range(size) takes `place`.

    A Feistel network of SHA-256 rounds (Luby and Rackoff, 1988) permutes the next power of four; walking its cycle
    until it falls below `size` (Black and Rogaway, 2002) makes that a permutation of range(size). On average it takes
    fewer than four walks.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    while True:
        left, right = divmod(place, 1 << half)
        for turn in range(_ROUNDS):
            mixed = sha256(key + bytes([turn]) + right.to_bytes(8, "big")).digest()
            left, right = right, left ^ (int.from_bytes(mixed[:8], "big") & ((1 << half) - 1))
        place = (left << half) | right
        if place < size:
            return place
