"""The emulated network for people.

    python -m bench.wan up --hosts 4 rate=80mbit rtt=50ms loss=1% --host 3:up=20mbit,delay=40ms
    python -m bench.wan exec NAME 1 -- ping -c 5 10.77.0.2
    python -m bench.wan tell NAME partition 1,2 3,4

`up` stays in the foreground, prints its name once the hosts are there, and takes everything down when it ends.
`tell` takes the lines of `bench.wan.commands`: partition, block, heal, set, stats.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys

from bench.wan.access import Access
from bench.wan.commands import parsed
from bench.wan.machine import HostError, inside, namespace, why_not
from bench.wan.service import Service, tell


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.wan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    up = verbs.add_parser("up", help="make a network and keep it until this command is ended")
    up.add_argument("--hosts", type=int, default=2)
    up.add_argument("--seed", type=int, default=0, help="of the dice that lose packets")
    up.add_argument("--name", default=secrets.token_hex(3), help="by default one drawn at random")
    up.add_argument("--host", action="append", default=[], metavar="N:NAME=VALUE,...", help="a host that differs")
    up.add_argument("--attached", action="store_true", help="also end when the standard input ends")
    up.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="rate, rtt, loss, jitter, queue, up, down, delay")
    inside_ = verbs.add_parser("exec", help="run a command on a host")
    inside_.add_argument("name")
    inside_.add_argument("host", type=int)
    inside_.add_argument("command", nargs="+")
    told = verbs.add_parser("tell", help="change a network, or ask what it has done")
    told.add_argument("name")
    told.add_argument("line", nargs="+")
    given = parser.parse_args()
    try:
        return _do(given)
    except (ValueError, HostError) as error:
        print(f"bench.wan: {error}", file=sys.stderr)
    except OSError as error:
        print(f"bench.wan: no such network, or no right to it ({error})", file=sys.stderr)
    return 1


def _do(given: argparse.Namespace) -> int:
    if given.verb == "up":
        return _up(given)
    if given.verb == "exec":
        command = inside(namespace(given.name, given.host), given.command)
        os.execvp(command[0], command)
    answer = tell(given.name, " ".join(given.line))
    print(json.dumps(answer))
    return 1 if "refused" in answer else 0


def _up(given: argparse.Namespace) -> int:
    if reason := why_not():
        raise ValueError(reason)
    alike = Access().changed(parsed(given.settings))
    accesses = dict.fromkeys(range(1, given.hosts + 1), alike)
    for text in given.host:
        number, _, settings = text.partition(":")
        if int(number) not in accesses:
            raise ValueError(f"There is no host {number}: there are 1 to {given.hosts}.")
        accesses[int(number)] = alike.changed(parsed(settings.split(",")))
    Service(given.name, accesses, given.seed, attached=given.attached).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
