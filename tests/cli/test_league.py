"""A league of processes that join by invitation: it trains as one process would, whoever dies, leaves and returns."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from koinon.cli.single import losses
from koinon.cli.sources import spec_in
from koinon.net.identity import NodeKey
from koinon.net.invitation import invite, read
from koinon.net.iroh_transport import IrohTransport
from koinon.net.transport import Hello
from koinon.nodes.rundir import RunDir
from koinon.nodes.switchboard import Switchboard
from koinon.nodes.tenancy import Tenancy
from koinon.run import events as ev
from koinon.run.reader import LogReader
from koinon.run.spec import RunSpec
from koinon.units import Bytes
from tests.cli.test_processes import finish, koinon, read_until, start

STEPS = 12
HERE = ("--bind", "127.0.0.1:0")
LEAD = ("coordinate", "tiny", "--set", f"train.steps={STEPS}", "--set", "train.eval_every=0", "--dir", "here", *HERE)


def join(folder: Path, stage: int) -> subprocess.Popen[str]:
    return start(folder, "join", "here/invitation", "--dir", f"seat-{stage}", *HERE, "--rehearse", str(stage))


def kill(process: subprocess.Popen[str]) -> None:
    """kill -9 a joiner and its worker, both before either notices."""
    family = [process, *psutil.Process(process.pid).children(recursive=True)]
    for one in family:
        one.send_signal(signal.SIGSTOP)
    for one in family:
        one.kill()
    process.communicate()


def invited(lead: subprocess.Popen[str]) -> str:
    return read_until(lead.stdout, "koinon join koinon1").split()[-1]


def logged(folder: Path) -> list[dict[str, Any]]:
    with LogReader[ev.Event](folder / "here" / "run.log", run=spec_in(folder / "here").run_id, decode=ev.decode) as log:
        return [msgspec.to_builtins(event) for event in log.poll()]


@pytest.fixture(scope="module")
def lead(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.Popen[str], str]]:
    """A coordinator that waits for joiners: its folder, its process, its invitation."""
    folder = tmp_path_factory.mktemp("league")
    process = start(folder, *LEAD)
    yield folder, process, invited(process)
    process.kill()
    process.communicate()


def test_the_doctor_finds_a_live_league_well(lead: tuple[Path, subprocess.Popen[str], str]) -> None:
    folder, _, invitation = lead
    out = koinon(folder, "doctor", invitation, *HERE)
    hops = [line.split(":")[0].removeprefix("ok").strip() for line in out.splitlines()]
    assert hops[:9] == [
        "invitation", "clock", "software", "UDP socket", "dial", "protocol", "clock against the coordinator", "run",
        "round trip",
    ]  # fmt: skip
    assert "seen from outside: 127.0.0.1" in out
    assert out.rstrip().endswith("Join with: koinon join INVITATION")
    told = json.loads(koinon(folder, "doctor", "here/invitation", *HERE, "--json"))
    assert told["fit"] is True
    assert told["compute"]["flops_per_second"] > 0
    assert told["link"]["up_bit_s"] > 0


@pytest.mark.slow
def test_three_joiners_train_as_one_process_though_one_dies_and_one_leaves(
    lead: tuple[Path, subprocess.Popen[str], str],
) -> None:
    folder, process, _ = lead
    joiners = [join(folder, stage) for stage in range(3)]
    for joiner in joiners:
        read_until(joiner.stdout, "seat 0: ")
    read_until(process.stdout, "step 1 of")
    kill(joiners[1])
    joiners[2].send_signal(signal.SIGINT)
    status, out, _ = finish(joiners[2])
    assert status == 130
    assert "Leaving:" in out
    assert "Come back to the same seat with: koinon join seat-2/invitation --dir seat-2" in out
    assert not Tenancy(folder / "seat-1").leave(), "its lock went with it"
    assert not Tenancy(folder / "seat-2").leave()
    for stage in 1, 2:
        joiners[stage] = join(folder, stage)
    for joiner in joiners:
        status, out, error = finish(joiner)
        assert (status, error) == (0, "")
        assert out.endswith("The run is complete.\n")
    status, out, _ = finish(process)
    assert status == 0
    assert "Complete." in out
    events = logged(folder)
    together = {event["step"]: event["loss"] for event in events if event["type"] == "StepMeasured"}
    assert together == pytest.approx(dict(enumerate(losses(RunDir(folder / "here")))), abs=1e-3)
    taken = [(event["stage"], event["worker"]) for event in events if event["type"] == "Seated"]
    assert len(taken) == 5
    assert len(set(taken)) == 3, "the same key takes the same stage again"


def test_a_stopped_league_goes_on_with_the_same_joiners(tmp_path: Path) -> None:
    """They wait for it at its address, and their snapshots are all that is left of its weights."""
    lead = (
        "coordinate",
        "tiny",
        "--set",
        "train.steps=100",
        "--set",
        "model.stages=2",
        "--set",
        "train.eval_every=0",
        "--dir",
        "here",
    )
    process = start(tmp_path, *lead, *HERE)
    invited(process)
    (address,) = read((tmp_path / "here" / "invitation").read_text()).addresses
    joiners = [join(tmp_path, stage) for stage in range(2)]
    read_until(process.stdout, "step 1 of")
    process.send_signal(signal.SIGINT)
    status, out, _ = finish(process)
    assert status == 130
    assert out.rstrip().endswith("Go on with: koinon coordinate --resume here")
    for joiner in joiners:
        read_until(joiner.stdout, "The run was stopped (the user stopped it)")
    process = start(tmp_path, "coordinate", "--resume", "here", "--bind", address)
    read_until(process.stdout, "step ")
    process.send_signal(signal.SIGTERM)
    status, out, _ = finish(process)
    assert status == 128 + signal.SIGTERM
    for joiner in joiners:
        joiner.send_signal(signal.SIGTERM)
        assert finish(joiner)[0] == 128 + signal.SIGTERM
    events = logged(tmp_path)
    assert [event["step"] > 0 for event in events if event["type"] == "RunResumed"] == [True]
    assert not any(event["type"] == "RunFailed" for event in events)


def test_leave_ends_a_joiner_that_waits(tmp_path: Path) -> None:
    process = start(tmp_path, *LEAD)
    invited(process)
    joiner = join(tmp_path, 0)
    read_until(joiner.stdout, "stage 0, seat 0: idle")
    second = start(tmp_path, "join", "here/invitation", "--dir", "seat-0", *HERE)
    status, _, error = finish(second)
    assert status == 1
    assert f"seat-0 is the seat of process {joiner.pid}" in error
    assert "The worker in seat-0 has left." in koinon(tmp_path, "leave", "seat-0")
    assert finish(joiner)[0] == 128 + signal.SIGTERM
    events = logged(tmp_path)
    assert [event["drained"] for event in events if event["type"] == "SeatLeft"] == [True]
    process.kill()
    process.communicate()


def test_the_doctor_names_a_dead_coordinator_and_every_address_that_was_tried(tmp_path: Path) -> None:
    invitation = invite(
        NodeKey.generate(),
        run=RunSpec.recipe("tiny").run_id,
        addresses=("127.0.0.1:9", "127.0.0.1:10"),
        not_after=int(time.time()) + 60,
    )
    status, out, _ = finish(start(tmp_path, "doctor", invitation.text, *HERE))
    assert status == 1
    last, remedy = out.splitlines()[-2:]
    assert last.startswith("FAILED dial: Nobody answers as")
    assert "127.0.0.1:9: " in last
    assert "127.0.0.1:10: " in last
    assert "ask for a new invitation" in remedy
    assert "UDP" in remedy
    status, out, error = finish(start(tmp_path, "join", invitation.text, *HERE, "--dir", "seat"))
    assert status == 1
    assert error.startswith("dial: Nobody answers")
    assert not list((tmp_path / "seat").glob("*.safetensors"))


def test_the_doctor_tells_a_wrong_protocol_from_a_dead_coordinator(tmp_path: Path) -> None:
    async def go() -> tuple[int, str, str]:
        transport = IrohTransport(NodeKey.generate(), bind="127.0.0.1:0", hello=Hello(protocol=(7, 9)))
        address = await transport.start(Switchboard(Bytes.mib(1)).services())
        invitation = invite(
            transport.key,
            run=RunSpec.recipe("tiny").run_id,
            addresses=address.addresses,
            not_after=int(time.time()) + 60,
        )
        try:
            return await asyncio.to_thread(finish, start(tmp_path, "doctor", invitation.text, *HERE))
        finally:
            await transport.close()

    status, out, _ = asyncio.run(go())
    assert status == 1
    assert "ok     dial: 127.0.0.1:" in out
    assert "FAILED protocol:" in out
    assert "you speak protocol 1, this run needs 7-9; upgrade koinon" in out
