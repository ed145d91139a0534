"""One thread for computing: results and errors come back, in order, and nothing is begun after the end."""

from __future__ import annotations

import asyncio
import threading

import pytest

from koinon.nodes.compute import ThreadCompute


def test_jobs_run_one_after_the_other_off_the_loops_thread() -> None:
    async def go() -> None:
        compute, seen = ThreadCompute(), []

        def job(number: int) -> int:
            seen.append((number, threading.current_thread() is threading.main_thread()))
            return number

        assert await asyncio.gather(*(compute.run(lambda n=n: job(n)) for n in range(20))) == list(range(20))
        assert seen == [(n, False) for n in range(20)]
        compute.close()

    asyncio.run(go())


def test_an_error_is_the_callers_and_the_thread_goes_on() -> None:
    async def go() -> None:
        compute = ThreadCompute()
        with pytest.raises(ZeroDivisionError):
            await compute.run(lambda: 1 // 0)
        assert await compute.run(lambda: 7) == 7
        compute.close()

    asyncio.run(go())


def test_what_was_not_begun_when_it_is_closed_or_given_up_is_never_run() -> None:
    async def go() -> None:
        compute, begun, go_on, ran = ThreadCompute(), threading.Event(), threading.Event(), []

        def slow() -> None:
            begun.set()
            go_on.wait()

        first = asyncio.create_task(compute.run(slow))
        given_up, never = (asyncio.create_task(compute.run(lambda n=n: ran.append(n))) for n in (1, 2))
        await asyncio.to_thread(begun.wait)
        given_up.cancel()
        await asyncio.sleep(0)
        closing = asyncio.create_task(asyncio.to_thread(compute.close))
        await asyncio.sleep(0.05)
        go_on.set()
        await asyncio.gather(first, closing)
        assert ran == []
        never.cancel()

    asyncio.run(go())
