"""Who sums and updates which tensor of a stage: an owner and, of another account, a second. Imports no torch.

A pure function of the members that are in the log, so every replica knows the answer without asking. Both hold the
tensor's optimizer state; whoever holds it already keeps it, as far as the balance of bytes allows, because moving a
tensor to a new owner moves its state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Owners = dict[str, tuple[str, str | None]]
"""Tensor name -> (owner, second); the second is None where no other account is present."""

SLACK = 1.25
"""A member keeps a tensor it held while its load stays within this factor of the mean."""


def owners(
    sizes: Mapping[str, int],
    members: Sequence[str],
    *,
    accounts: Mapping[str, str] | None = None,
    previous: Mapping[str, tuple[str, str | None]] | None = None,
) -> Owners:
    """Assign tensors of `sizes` bytes to members, largest first, each to the least loaded that may take it.

    accounts: member -> account (default: each its own). previous: the assignment before, whose members stay where they
    can; a second becomes owner where the owner left. The order of `members` and `sizes` does not matter.
    """
    if not members:
        raise ValueError("a stage without members owns nothing")
    account = accounts or {member: member for member in members}
    load = dict.fromkeys(sorted(members), 0)
    seconds = len({account[member] for member in members}) > 1
    cap = SLACK * (1 + seconds) * sum(sizes.values()) / len(load)
    assigned: Owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        held = [member for member in (previous or {}).get(name, ()) if member in load]
        owner = _taker(load, held, sizes[name], cap)
        load[owner] += sizes[name]
        others = {member: done for member, done in load.items() if account[member] != account[owner]}
        second = _taker(others, [m for m in held if m in others], sizes[name], cap) if others else None
        if second is not None:
            load[second] += sizes[name]
        assigned[name] = (owner, second)
    return assigned


def _taker(load: Mapping[str, int], held: Sequence[str], size: int, cap: float) -> str:
    """The first holder with room for it, else the least loaded member."""
    roomy = (member for member in held if load[member] + size <= cap)
    return next(roomy, None) or min(load, key=lambda member: (load[member], member))
