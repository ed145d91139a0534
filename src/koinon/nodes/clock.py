"""The clock that roles judge lateness by: the event loop's own, so that virtual time is one time for all of them.

Knows nothing of dates; events for people carry Unix time.
"""

from __future__ import annotations

import asyncio


def loop_time() -> float:
    """Monotonic seconds of the running event loop."""
    return asyncio.get_running_loop().time()
