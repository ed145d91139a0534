"""The process that is the network: makes the hosts, carries packets, obeys lines on a socket, cleans up after itself.

It ends on SIGTERM, SIGINT or SIGHUP, or, if it was started attached, when its standard input ends: so a network never
outlives whoever wanted it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from bench.wan.access import Access
from bench.wan.commands import obey
from bench.wan.machine import Host, hurry, remove
from bench.wan.switch import Switch

_LONGEST_SLEEP: Final = 1.0
_READ_AT_ONCE: Final = 64
"""Packets taken from one host before the others have their turn."""
_LARGEST: Final = 65535


def socket_path(network: str) -> Path:
    return Path(f"/run/kwan-{network}.sock")


class Service:
    """One network, from `start` to `close`."""

    def __init__(self, network: str, accesses: Mapping[int, Access], seed: int, *, attached: bool) -> None:
        self._network, self._attached = network, attached
        self._switch = Switch(accesses, seed)
        self._hosts: dict[int, Host] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._clients: dict[int, _Client] = {}
        self._ending = False

    def serve(self) -> None:
        """Until told to end. Prints one JSON line when the hosts are there. Raises HostError."""
        self._heed_signals()
        try:
            self._start()
            print(json.dumps({"ready": self._network, "hosts": list(self._hosts)}), flush=True)
            self._run()
        finally:
            self._close()

    def _heed_signals(self) -> None:
        def end(*_: object) -> None:
            self._ending = True

        for number in signal.SIGTERM, signal.SIGINT, signal.SIGHUP:
            signal.signal(number, end)
        reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writing)
        self._wake = reading

    def _start(self) -> None:
        self._socket.bind(str(socket_path(self._network)))
        self._socket.listen()
        for number in self._switch.accesses:
            self._hosts[number] = Host.make(self._network, number)
            if self._ending:
                return
        hurry(2)  # a late switch is a wrong network
        gc.disable()  # nothing here is cyclic, and a pause would look like jitter

    def _close(self) -> None:
        for client in self._clients.values():
            client.close()
        self._socket.close()
        socket_path(self._network).unlink(missing_ok=True)
        remove(*(host.name for host in self._hosts.values()))
        for host in self._hosts.values():
            os.close(host.tun)

    def _run(self) -> None:
        host_of = {host.tun: number for number, host in self._hosts.items()}
        while not self._ending:
            self._deliver()
            waiting = [*host_of, *self._clients, self._socket.fileno(), self._wake, *([0] if self._attached else [])]
            for ready in select.select(waiting, [], [], self._patience())[0]:
                if ready in host_of:
                    self._take(host_of[ready], ready)
                else:
                    self._hear(ready)

    def _patience(self) -> float:
        due = self._switch.next_due
        return _LONGEST_SLEEP if due is None else min(_LONGEST_SLEEP, max(0.0, due - time.monotonic()))

    def _take(self, sender: int, tun: int) -> None:
        with contextlib.suppress(BlockingIOError):  # all has been read
            for _ in range(_READ_AT_ONCE):
                packet = os.read(tun, _LARGEST)
                self._switch.take(time.monotonic(), sender, packet)

    def _deliver(self) -> None:
        for receiver, packet in self._switch.advance(time.monotonic()):
            with contextlib.suppress(BlockingIOError):  # its device is full, as a real one may be
                os.write(self._hosts[receiver].tun, packet)

    def _hear(self, ready: int) -> None:
        """Anything but packets."""
        if ready == self._socket.fileno():
            client = _Client(self._socket.accept()[0])
            self._clients[client.connection.fileno()] = client
        elif ready == self._wake:
            os.read(self._wake, 64)
        elif ready in self._clients:
            if not self._clients[ready].answer(self._switch):
                self._clients.pop(ready).close()
        elif not os.read(0, 4096):
            self._ending = True


class _Client:
    """Somebody on the socket: lines in, one JSON line back for each."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._rest = b""

    def answer(self, switch: Switch) -> bool:
        """What has come. False when it has hung up."""
        try:
            data = self.connection.recv(65536)
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self._say(obey(switch, line.decode(errors="replace")))
        except OSError:
            return False
        return bool(data)

    def close(self) -> None:
        self.connection.close()

    def _say(self, answer: dict[str, Any]) -> None:
        self.connection.sendall(json.dumps(answer).encode() + b"\n")


def tell(network: str, line: str) -> dict[str, Any]:
    """Say a line to a network that runs on this machine. Raises OSError if there is none of that name."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(socket_path(network)))
        with connection.makefile("rw", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            answer: dict[str, Any] = json.loads(file.readline())
            return answer
