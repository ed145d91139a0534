"""Who may talk to whom. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable


class Cuts:
    """Paths between hosts that carry nothing, by direction."""

    def __init__(self, hosts: Collection[int]) -> None:
        self._hosts = frozenset(hosts)
        self._blocked: set[tuple[int, int]] = set()

    def partition(self, *groups: Iterable[int]) -> None:
        """Cut every path between the groups, both ways. Hosts in no group keep all theirs."""
        sides = [self._known(group) for group in groups]
        if len(sides) < 2:
            raise ValueError("A partition needs at least two groups of hosts.")
        for here, there in itertools.permutations(sides, 2):
            if here & there:
                raise ValueError(f"Host {min(here & there)} is in two groups of a partition.")
            self._blocked |= set(itertools.product(here, there))

    def block(self, sender: int, receiver: int) -> None:
        """Cut one direction."""
        self._known((sender, receiver))
        self._blocked.add((sender, receiver))

    def heal(self) -> None:
        """Undo every cut."""
        self._blocked.clear()

    def is_cut(self, sender: int, receiver: int) -> bool:
        return (sender, receiver) in self._blocked

    def _known(self, hosts: Iterable[int]) -> frozenset[int]:
        named = frozenset(hosts)
        if strangers := named - self._hosts:
            raise ValueError(f"There is no host {min(strangers)}: there are {_listed(self._hosts)}.")
        return named


def _listed(hosts: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(hosts)))
