"""Waiting for iroh from asyncio, at half the price for what is ready at once.

The generated bindings make every call a trip through the event loop: poll, be called back, wake the loop through a
socket, poll again. Most polls are ready when they return (a write into a buffer with room, the second poll of a read),
and then the trip is for nothing. Here a call waits only if its poll did not answer at once. Measured with 1 KB pushes,
both ends in one process: 457 to 383 microseconds of CPU, and to 314 together with the buffers' one copy.
Changes bindings only if their function is the one this was written against, so another version works as it comes.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import itertools
from typing import Any, Final

_KNOWN: Final = "1fa6d2e8b917543dc5c99228f82669b57b387012de1c514b5b5294d58f906fbd"
"""sha-256 of the source of the function replaced: uniffi 0.31's `_uniffi_rust_call_async`."""
_READY: Final = 0


class _Slot:
    """One poll. The callback may come before, while or after the caller looks, and from another thread.

    Each side first stores what it brings and then looks at what the other has brought, so one of them sees both.
    """

    __slots__ = ("answer", "future", "loop")

    def __init__(self) -> None:
        self.answer: int | None = None
        self.future: asyncio.Future[None] | None = None
        self.loop: asyncio.AbstractEventLoop | None = None


_slots: Final[dict[int, _Slot]] = {}
_numbers: Final = itertools.count(1)


def shorten(bindings: Any) -> bool:
    """Replace the bindings' way of waiting, if it is the known one. Says whether it did."""
    if not is_known(bindings):
        return False
    bindings._uniffi_rust_call_async = _caller(bindings)
    return True


def is_known(bindings: Any) -> bool:
    """Whether the function to replace is, to the letter, the one this was written against."""
    try:
        source = inspect.getsource(bindings._uniffi_rust_call_async)
    except (AttributeError, OSError, TypeError):
        return False
    return hashlib.sha256(source.encode()).hexdigest() == _KNOWN


def _caller(bindings: Any) -> Any:
    complete_call, callback = bindings._uniffi_rust_call_with_error, _callback(bindings)

    async def call(future: Any, poll: Any, complete: Any, free: Any, lift: Any, error: Any) -> Any:
        number = 0
        try:
            answer: int | None = None
            while answer != _READY:
                number, slot = next(_numbers), _Slot()
                _slots[number] = slot
                poll(future, callback, number)
                answer = slot.answer if slot.answer is not None else await _answer(slot)
            return lift(complete_call(error, complete, future))
        finally:
            _slots.pop(number, None)
            free(future)

    return call


async def _answer(slot: _Slot) -> int | None:
    slot.loop = asyncio.get_running_loop()
    slot.future = slot.loop.create_future()
    if slot.answer is None:
        await slot.future
    return slot.answer


def _callback(bindings: Any) -> Any:
    kind = bindings._UNIFFI_RUST_FUTURE_CONTINUATION_CALLBACK

    def answered(number: int, answer: int) -> None:
        slot = _slots.pop(number, None)
        if slot is None:
            return  # the caller gave up
        slot.answer = answer
        if slot.future is not None and slot.loop is not None and not slot.loop.is_closed():
            slot.loop.call_soon_threadsafe(_wake, slot.future)

    return kind(answered)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
