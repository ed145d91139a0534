"""Virtual time: hours pass at once, in order, and a deadlock is an error."""

from __future__ import annotations

import asyncio
import threading

import pytest

from koinon.net.clock import NothingLeft, run_virtual


def now() -> float:
    return asyncio.get_running_loop().time()


def test_time_jumps_from_timer_to_timer_in_order() -> None:
    async def main() -> list[tuple[float, str]]:
        seen: list[tuple[float, str]] = []

        async def sleeper(name: str, seconds: float) -> None:
            await asyncio.sleep(seconds)
            seen.append((now(), name))

        await asyncio.gather(sleeper("day", 86400.0), sleeper("hour", 3600.0), sleeper("second", 1.0))
        return seen

    assert run_virtual(main()) == [(1.0, "second"), (3600.0, "hour"), (86400.0, "day")]


def test_timeouts_are_in_virtual_time() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1000.0):
                await asyncio.Event().wait()
        return now()

    assert run_virtual(main()) == 1000.0


def test_a_deadlock_is_an_error() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(NothingLeft):
        run_virtual(main())


def test_time_stands_still_while_a_thread_works() -> None:
    async def main() -> tuple[str, float]:
        release = threading.Event()
        timer = asyncio.get_running_loop().call_later(0.001, lambda: None)

        def work() -> str:
            release.wait(5)
            return "done"

        job = asyncio.ensure_future(asyncio.to_thread(work))
        await asyncio.sleep(0)
        threading.Timer(0.05, release.set).start()
        result = await job
        timer.cancel()
        return result, now()

    assert run_virtual(main()) == ("done", 0.0)


def test_what_is_left_is_cancelled_at_the_end() -> None:
    ended: list[str] = []

    async def background() -> None:
        try:
            await asyncio.sleep(1e9)
        finally:
            ended.append("cancelled")

    async def main() -> None:
        task = asyncio.ensure_future(background())
        await asyncio.sleep(1)
        assert not task.done()

    run_virtual(main())
    assert ended == ["cancelled"]
