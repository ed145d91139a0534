"""The emulated network for real: what it promises holds between processes, and nothing of it is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import pytest

from bench.wan import Wan, WanError, machine, why_not
from bench.wan.network import ROOT
from bench.wan.service import socket_path

REASON = why_not()
real = pytest.mark.skipif(REASON is not None, reason=REASON or "")


@contextmanager
def echo(wan: Wan, host: int) -> Iterator[None]:
    command = [sys.executable, "-m", "bench.wan.echo", "serve", wan.address(host)]
    with wan.popen(host, command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as serving:
        assert serving.stdout.readline() == "listening\n"
        yield
        serving.kill()


def round_trips(wan: Wan, host: int, to: int, count: int = 10) -> list[float]:
    command = [sys.executable, "-m", "bench.wan.echo", "ask", wan.address(to), str(count)]
    with wan.popen(host, command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as asking:
        return json.loads(asking.communicate()[0])


def namespaces(name: str) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in listed if line.startswith(f"kwan-{name}-")]


def devices(name: str) -> list[str]:
    listed = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if f"kw{name}" in line]


def wait_until(holds, seconds: float = 20.0) -> bool:
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
        time.sleep(0.05)
    return holds()


@real
def test_a_round_trip_takes_the_time_that_was_asked_for() -> None:
    with Wan(hosts=3, rtt="40ms", rate="80mbit") as wan, echo(wan, 2):
        assert 0.040 <= median(round_trips(wan, 1, 2)) < 0.050
        wan.set(2, delay="30ms")
        assert 0.080 <= median(round_trips(wan, 1, 2)) < 0.090
        wan.set(rtt=0, rate="unlimited")
        assert median(round_trips(wan, 1, 2)) < 0.010


@real
def test_what_is_lost_is_counted() -> None:
    with Wan(hosts=2, rtt=0, loss="30%", seed=5) as wan, echo(wan, 2):
        round_trips(wan, 1, 2, count=8)
        stats = wan.stats()
        assert stats.lost > 0
        assert stats.nbytes[1, 2] > 0
        assert stats.blocked == stats.queue_full == 0


@real
def test_a_partition_cuts_and_heals() -> None:
    with Wan(hosts=3, rtt=0) as wan, echo(wan, 2):
        assert round_trips(wan, 1, 2, count=3)
        wan.partition([1], [2])
        assert not round_trips(wan, 1, 2, count=1)
        assert round_trips(wan, 3, 2, count=3)
        assert wan.stats().blocked > 0
        wan.heal()
        assert round_trips(wan, 1, 2, count=3)
        wan.block(2, 1)
        assert not round_trips(wan, 1, 2, count=1)


@real
def test_nothing_is_left_behind_not_even_what_ignores_sigterm() -> None:
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(99)"
    command = [sys.executable, "-c", stubborn]
    with Wan(hosts=2) as wan, wan.popen(1, command, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        assert len(namespaces(wan.name)) == 2
        wan.close()
        assert process.wait(10) == -signal.SIGKILL
    assert not namespaces(wan.name)
    assert not socket_path(wan.name).exists()
    assert not devices(wan.name)


@real
def test_two_networks_with_the_same_addresses_do_not_meet() -> None:
    with Wan(hosts=2, rtt=0) as one, Wan(hosts=2, rtt="60ms") as other, echo(one, 2):
        assert round_trips(one, 1, 2, count=3)
        assert not round_trips(other, 1, 2, count=1)
        assert one.name != other.name


@real
def test_a_network_goes_with_whoever_made_it_even_if_that_was_killed() -> None:
    program = "from bench.wan import Wan; wan = Wan(2).__enter__(); print(wan.name, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as maker:
        name = maker.stdout.readline().strip()
        assert namespaces(name)
        maker.kill()
        assert wait_until(lambda: not namespaces(name))


@real
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_people_can_make_use_and_end_a_network(how: signal.Signals) -> None:
    module = [sys.executable, "-m", "bench.wan"]
    command = [*module, "up", "--hosts", "2", "rtt=10ms", "--host", "2:loss=5%,up=1mbit"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as up:
        name = json.loads(up.stdout.readline())["ready"]
        told = subprocess.run([*module, "tell", name, "set", "1", "loss=1%"], cwd=ROOT, capture_output=True, check=True)
        assert json.loads(told.stdout)["did"] == "set 1 loss=1%"
        hello = [*module, "exec", name, "1", "--", "echo", "hello"]
        assert subprocess.run(hello, cwd=ROOT, capture_output=True, check=True).stdout == b"hello\n"
        up.send_signal(how)
        assert up.wait(10) == 0
    assert not namespaces(name)


@real
def test_a_command_that_makes_no_sense_is_refused_and_the_network_goes_on() -> None:
    with Wan(hosts=2) as wan:
        with pytest.raises(WanError, match="no host 9"):
            wan.set(9, loss="1%")
        with pytest.raises(ValueError, match="no host 3"):
            wan.address(3)
        assert wan.stats().delivered == 0


@pytest.mark.parametrize(
    ("hosts", "settings", "said"),
    [
        (0, {}, "1 to 254"),
        (255, {}, "1 to 254"),
        (2, {"rtt": "soon"}, "no quantity"),
        (2, {"colour": 3}, "colour"),
    ],
)
def test_nonsense_is_refused_before_anything_is_made(hosts: int, settings: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Wan(hosts=hosts, **settings)


@pytest.mark.parametrize(
    ("what", "value", "said"),
    [
        ("sys.platform", "darwin", "Linux"),
        ("os.geteuid", lambda: 1000, "root"),
        ("shutil.which", lambda _name: None, "iproute2"),
        ("TUN", Path("/nowhere/tun"), "tun"),
    ],
)
def test_where_it_cannot_run_it_says_why(monkeypatch: pytest.MonkeyPatch, what: str, value: object, said: str) -> None:
    """Each reason alone, as if all before it were fine."""
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(machine.os, "geteuid", lambda: 0)
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/sbin/{name}")
    monkeypatch.setattr(machine, "TUN", Path(os.devnull))
    target, _, name = what.rpartition(".")
    monkeypatch.setattr(getattr(machine, target) if target else machine, name, value)
    reason = why_not()
    assert reason is not None
    assert said in reason
    with pytest.raises(WanError, match=said):
        Wan(hosts=1).__enter__()
