"""What this machine has to lend: network namespaces, TUN devices, and whether it may be asked for them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.wan.switch import address

TUN: Final = Path("/dev/net/tun")
MTU: Final = 1500
_TUNSETIFF: Final = 0x400454CA
_TUN_WITHOUT_HEADER: Final = 0x1001
_CLONE_NEWNET: Final = 0x40000000
_NICE: Final = -15
_QUEUE: Final = 4000
_GRACE: Final = 2.0
"""Seconds that a host's processes have to end after SIGTERM."""


def why_not() -> str | None:
    """Why no network can be made on this machine, as a sentence for people; None where it can be tried."""
    if not sys.platform.startswith("linux"):
        return f"Network namespaces are Linux's; this is {sys.platform}."
    if os.geteuid() != 0:
        return "Making network namespaces needs root."
    if shutil.which("ip") is None:
        return "The command `ip` is missing: install iproute2."
    if not TUN.exists():
        return f"{TUN} is missing: load the module `tun`, or give the container that device."
    return _probed()


def _probed() -> str | None:
    """Root in a container may still be refused: make a namespace and take it down."""
    name = f"kwan-probe-{os.getpid()}"
    try:
        _ip("netns", "add", name)
        _ip("netns", "del", name)
        os.close(os.open(TUN, os.O_RDWR))
    except (HostError, OSError) as error:
        return f"This machine refuses: {error}."
    return None


class HostError(RuntimeError):
    """A host could not be made; the sentence carries what the system said."""


@dataclass(frozen=True, slots=True)
class Host:
    """A namespace and its one network device; packets are read from and written to `tun`."""

    name: str
    tun: int

    @classmethod
    def make(cls, network: str, number: int) -> Host:
        """Raises HostError, leaving nothing behind."""
        name, device = namespace(network, number), f"kw{network}.{number}"
        tun = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _as_tun(tun, device)
            _ip("netns", "add", name)
            _ip("link", "set", device, "netns", name)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", device, "mtu", str(MTU), "txqueuelen", str(_QUEUE), "up")
            _ip("-n", name, "addr", "add", f"{address(number)}/24", "dev", device)
            _ip("-n", name, "route", "add", "default", "dev", device)
        except BaseException:
            os.close(tun)
            remove(name)
            raise
        return cls(name, tun)


def namespace(network: str, number: int) -> str:
    return f"kwan-{network}-{number}"


def remove(*names: str) -> None:
    """End every process of these namespaces, first politely, and remove them; they need not exist."""
    for how in signal.SIGTERM, signal.SIGKILL:
        until = time.monotonic() + _GRACE
        for name in names:
            _signal(name, how)
        while any(map(pids, names)) and time.monotonic() < until:
            time.sleep(0.02)
    for name in names:
        with contextlib.suppress(HostError):
            _ip("netns", "del", name)


def pids(name: str) -> list[int]:
    """Processes in a namespace; none if it does not exist."""
    try:
        return [int(pid) for pid in _ip("netns", "pids", name).split()]
    except HostError:
        return []


def inside(name: str, command: list[str]) -> list[str]:
    """The command line that runs `command` in a namespace; the process keeps its id."""
    return ["ip", "netns", "exec", name, *command]


def enter(name: str) -> None:
    """Move this process into a namespace: its sockets from now on are that host's. Call it before any thread begins."""
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns came with Python 3.12
    with open(f"/run/netns/{name}", "rb") as namespace_:
        if libc.setns(namespace_.fileno(), _CLONE_NEWNET):
            raise HostError(f"cannot enter {name}: {os.strerror(ctypes.get_errno())}")


def hurry(urgency: int) -> None:
    """Put this process, and what it starts, ahead of everything that is not as urgent, as far as the machine allows.

    Niceness is not enough: it does not count between sessions where the kernel groups processes by them.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(urgency))
    except OSError:
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, _NICE)


def _signal(name: str, how: signal.Signals) -> None:
    for pid in pids(name):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, how)


def _as_tun(tun: int, device: str) -> None:
    import fcntl

    try:
        fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _TUN_WITHOUT_HEADER))
    except OSError as error:
        raise HostError(f"no TUN device ({error.strerror})") from error


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostError(f"`ip {' '.join(words)}`: {done.stderr.strip() or f'status {done.returncode}'}")
    return done.stdout
