"""A process that has torch loaded and forks workers from itself: eight workers start in the time of one import.

It is started as `python -m koinon.nodes.zygote`, talks JSON lines over its standard input and output, and ends, workers
included, when its input does: nobody has to clean up after a crash. Unlike multiprocessing's fork server it never runs
the caller's main script again, so a league can be started from any script or notebook.
It never starts a thread, so forking is safe. Knows nothing of what a worker does.

    in   {"spawn": 3, "options": {...}}
    out  {"ready": true}   {"started": 3, "pid": 4711}   {"ended": 3, "status": -9}
"""

from __future__ import annotations

import gc
import json
import os
import selectors
import signal
from typing import Any

GRACE_SECONDS = 5.0


class Zygote:
    def __init__(self) -> None:
        self._children: dict[int, int] = {}  # pid -> the caller's number
        self._rest = b""
        self._wake, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wakeup)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's: it ends us by closing our input

    def run(self) -> None:
        """Until the input ends; then end the workers."""
        self._say(ready=True)
        with selectors.DefaultSelector() as selector:
            selector.register(0, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            while self._serve({key.fd for key, _ in selector.select()}):
                pass
        self._end_children()

    def _serve(self, readable: set[int]) -> bool:
        if self._wake in readable:
            os.read(self._wake, 4096)
            self._reap()
        if 0 not in readable:
            return True
        data = os.read(0, 65536)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._spawn(json.loads(line))
        return bool(data)

    def _spawn(self, order: dict[str, Any]) -> None:
        pid = os.fork()
        if pid == 0:
            self._become_worker(order["options"])
        self._children[pid] = order["spawn"]
        self._say(started=order["spawn"], pid=pid)

    def _become_worker(self, options: dict[str, Any]) -> None:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 0)
            os.dup2(2, 1)  # what a worker prints is not part of our protocol
            from koinon.nodes.process import main

            status = main(options)
        finally:
            os._exit(status)

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._say(ended=self._children.pop(pid), status=os.waitstatus_to_exitcode(status))

    def _end_children(self) -> None:
        for pid in self._children:
            os.kill(pid, signal.SIGTERM)
        signal.signal(signal.SIGALRM, lambda *_: self._kill_children())
        signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)
        while self._children:
            pid, _ = os.waitpid(-1, 0)
            self._children.pop(pid, None)

    def _kill_children(self) -> None:
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)

    def _say(self, **message: Any) -> None:
        try:
            os.write(1, json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            pass  # the caller is gone; our input ends too


if __name__ == "__main__":
    import torch

    import koinon.net.iroh_transport
    import koinon.nodes.worker  # noqa: F401  - torch and all: what the workers share
    from koinon.nodes.engine import warm_up

    torch.set_num_threads(1)
    warm_up()
    # What is loaded stays: workers that look through it for garbage would find none, and copy its pages.
    gc.collect()
    gc.freeze()
    Zygote().run()
