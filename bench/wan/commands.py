"""The lines by which a running network is changed: one line in, one JSON answer out.

partition 1,2 3,4      cut every path between the groups, packets under way included
block 1 2              cut one direction
heal                   undo every cut
set 3 loss=5% up=5mbit change a host's link; `set all ...` changes every host's
stats                  what was delivered, lost, late
"""

from __future__ import annotations

from typing import Any

from bench.wan.switch import Switch


def obey(switch: Switch, line: str) -> dict[str, Any]:
    """Carry a line out. One that makes no sense changes nothing, and the answer says why."""
    try:
        _carry_out(switch, line.split())
    except ValueError as error:
        return {"refused": line, "why": str(error)}
    return {"did": line, "stats": switch.stats().as_json()}


def _carry_out(switch: Switch, words: list[str]) -> None:
    match words:
        case ["partition", *groups]:
            switch.cuts.partition(*([int(host) for host in group.split(",")] for group in groups))
        case ["block", sender, receiver]:
            switch.cuts.block(int(sender), int(receiver))
        case ["heal"]:
            switch.cuts.heal()
        case ["set", which, *settings] if settings:
            _change(switch, which, settings)
        case ["stats"]:
            pass
        case _:
            raise ValueError("Unknown: there are partition, block, heal, set HOST NAME=VALUE and stats.")


def _change(switch: Switch, which: str, settings: list[str]) -> None:
    hosts = list(switch.accesses) if which == "all" else [int(which)]
    if strangers := set(hosts) - set(switch.accesses):
        raise ValueError(f"There is no host {min(strangers)}.")
    switch.accesses |= {host: switch.accesses[host].changed(parsed(settings)) for host in hosts}


def parsed(settings: list[str]) -> dict[str, str]:
    """["loss=1%", "up=5mbit"] as a mapping. Raises ValueError."""
    for setting in settings:
        if "=" not in setting:
            raise ValueError(f"{setting!r} is no setting: write NAME=VALUE, such as loss=1%.")
    return dict(setting.split("=", 1) for setting in settings)
