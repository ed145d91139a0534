"""An emulated network, from Python: a context manager around the process that is the network."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.wan.access import Access
from bench.wan.machine import inside, namespace, why_not
from bench.wan.service import tell
from bench.wan.stats import Stats
from bench.wan.switch import address

ROOT = Path(__file__).resolve().parents[2]
_ENDING = 15.0
"""Seconds that the network may take to clean up."""


class WanError(RuntimeError):
    """The network cannot be made, or does not do what it was told; the sentence says why."""


class Wan:
    """Hosts 1 to `hosts`, alike but for what `set` changes. Every instance has a name of its own, so that two of them,
    or what a killed one left behind, do not meet. Values are numbers or text: see `quantities`."""

    def __init__(self, hosts: int, *, seed: int = 0, **settings: str | float) -> None:
        """settings: rate, rtt, loss, jitter, queue, up, down, delay of every host. Raises ValueError."""
        if not 1 <= hosts <= 254:
            raise ValueError(f"A network has 1 to 254 hosts, not {hosts}.")
        Access().changed(settings)  # refuses nonsense before anything is made
        self.name = secrets.token_hex(3)
        self.hosts = range(1, hosts + 1)
        self._seed, self._settings = seed, dict(settings)
        self._service: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        """Raises WanError where `why_not` has a reason."""
        if reason := why_not():
            raise WanError(reason)
        command = [sys.executable, "-m", "bench.wan", "up", "--attached", "--name", self.name]
        command += ["--hosts", str(len(self.hosts)), "--seed", str(self._seed)]
        command += [f"{name}={value}" for name, value in self._settings.items()]
        self._service = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self._service.stdout is not None
        if not self._service.stdout.readline():
            _, said = self._service.communicate()
            raise WanError(f"The network did not come up: {said.strip()}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process on the hosts, and take the hosts down. Twice is once."""
        if self._service is not None:
            self._service.terminate()
            self._service.communicate(timeout=_ENDING)
            self._service = None

    def address(self, host: int) -> str:
        """IPv4 address of a host, as seen from every host and from nowhere else."""
        return address(self._known(host))

    def namespace(self, host: int) -> str:
        """What `ip netns` calls it."""
        return namespace(self.name, self._known(host))

    def popen(
        self, host: int, command: Sequence[str], *, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """Start a command on a host; `env` is added to this process's own. It ends with the network at the latest."""
        return subprocess.Popen(
            inside(self.namespace(host), list(command)), env={**os.environ, **(env or {})}, **options
        )

    def set(self, *hosts: int, **settings: str | float) -> None:
        """Change the links of these hosts (of all, if none is named) from now on. Raises WanError."""
        values = " ".join(f"{name}={value}" for name, value in settings.items())
        for host in hosts or ("all",):
            self._tell(f"set {host} {values}")

    def partition(self, *groups: Iterable[int]) -> None:
        """Cut every path between the groups, both ways, packets under way included."""
        self._tell("partition " + " ".join(",".join(map(str, group)) for group in groups))

    def block(self, sender: int, receiver: int) -> None:
        """Cut one direction."""
        self._tell(f"block {sender} {receiver}")

    def heal(self) -> None:
        """Undo every cut."""
        self._tell("heal")

    def stats(self) -> Stats:
        """What was done since the start."""
        return Stats.of_json(self._tell("stats"))

    def _tell(self, line: str) -> dict[str, Any]:
        answer = tell(self.name, line)
        if "refused" in answer:
            raise WanError(f"`{line}` was refused: {answer['why']}")
        found: dict[str, Any] = answer["stats"]
        return found

    def _known(self, host: int) -> int:
        if host not in self.hosts:
            raise ValueError(f"There is no host {host}: there are 1 to {len(self.hosts)}.")
        return host
