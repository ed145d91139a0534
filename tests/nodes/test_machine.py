"""What is judged of a machine: every limit from both sides, and needs against a worker that was really measured."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koinon import LocalSwarm
from koinon.nodes.calibration import calibrate, dearest_stage
from koinon.nodes.findings import Finding, Verdict
from koinon.nodes.machine import (
    Calibration,
    Facts,
    LinkMeasured,
    check_balance,
    check_clock,
    check_compute,
    check_disk,
    check_link,
    check_memory,
    check_software,
    facts,
    mbit,
)
from koinon.nodes.needs import Need, need, needs
from koinon.run.spec import RunSpec
from koinon.units import BitsPerSecond, Bytes, Seconds

GOOD = Facts((3, 12), "2.13.0+cpu", 4, Bytes.gib(8), Bytes.gib(100), "Linux x86_64", bf16=False)
ASKED = [Need(stage, Bytes.mib(1), Bytes.gib(size), Bytes.gib(size)) for stage, size in enumerate((2, 4))]
TINY = RunSpec.recipe("tiny")


def link(up: float, rtt: float = 0.02) -> LinkMeasured:
    return LinkMeasured(Seconds(rtt), BitsPerSecond.mbit(up), BitsPerSecond.mbit(100.0))


def with_link(**keys: float) -> RunSpec:
    return RunSpec.recipe("tiny", overrides=[f"link.{key}={value}" for key, value in keys.items()])


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"python": (3, 10)}, "3.11 or later"),
        ({"python": (3, 14)}, "below 3.14"),
        ({"torch": ""}, "pip install torch"),
        ({"torch": "2.8.1"}, "2.9 or later"),
    ],
)
def test_old_or_missing_software_is_named_with_what_to_install(changes: dict[str, object], remedy: str) -> None:
    assert check_software(GOOD).verdict is Verdict.GOOD
    finding = check_software(replace(GOOD, **changes))  # type: ignore[arg-type]
    assert finding.verdict is Verdict.BAD
    assert remedy in finding.remedy


def test_memory_must_do_for_the_largest_stage_since_stages_are_drawn() -> None:
    def judged(free: Bytes | None) -> Finding:
        return check_memory(replace(GOOD, memory=free), ASKED)

    assert judged(Bytes.gib(4.5)).verdict is Verdict.GOOD
    assert judged(Bytes.gib(4.2)).verdict is Verdict.BAD, "a tenth is left to others"
    assert "enough for stages 0, but which stage" in judged(Bytes.gib(4.2)).found
    assert "too little for any stage" in judged(Bytes.gib(1)).found
    assert judged(None).verdict is Verdict.DOUBTFUL


def test_disk_must_do_for_the_snapshots() -> None:
    assert check_disk(replace(GOOD, disk=Bytes.gib(4)), ASKED).verdict is Verdict.GOOD
    assert check_disk(replace(GOOD, disk=Bytes.gib(3.9)), ASKED).verdict is Verdict.BAD


@given(st.floats(-1e6, 1e6))
def test_a_clock_may_be_off_by_a_minute_either_way(ahead: float) -> None:
    finding = check_clock(Seconds(ahead))
    assert finding.verdict is (Verdict.BAD if abs(ahead) > 60.0 else Verdict.GOOD)
    assert ("behind" in finding.found) == (ahead < -60.0)


@pytest.mark.parametrize(
    ("keys", "good", "bad"),
    [
        ({"rate_mbit": 10.0}, link(8.1), link(7.9)),
        ({"rtt_ms": 100.0}, link(1.0, 0.12), link(1.0, 0.13)),
        ({"tokens_per_second": 10_000.0}, link(0.8), link(0.7)),  # 2 x 6 bytes per token: 0.96 Mbit/s
        ({}, link(0.001, 5.0), None),
    ],
)
def test_a_link_is_held_against_what_the_spec_declares(
    keys: dict[str, float], good: LinkMeasured, bad: LinkMeasured | None
) -> None:
    spec = with_link(**keys)
    assert check_link(good, spec).verdict is Verdict.GOOD
    assert bad is None or check_link(bad, spec).verdict is Verdict.BAD


def test_a_link_slower_than_the_machine_is_said_and_not_refused() -> None:
    computed = Calibration(1, 8, 0.1, 10**9, 10_000, 0, "CPU")
    assert check_balance(link(100.0), computed, TINY).verdict is Verdict.GOOD
    slow = check_balance(link(2.4), computed, TINY)
    assert slow.verdict is Verdict.DOUBTFUL
    assert "about 25% of the time" in slow.found
    assert "10 GFLOP/s" in check_compute(computed).found
    assert check_compute(Calibration(1, 8, 0.1, 1, 1, 0, "CPU", has_unused_gpu=True)).verdict is Verdict.DOUBTFUL


def test_rates_are_written_for_people() -> None:
    assert [mbit(BitsPerSecond.mbit(rate)) for rate in (0.0123, 4.567, 99.0, 12_345.6)] == [
        "0.0123 Mbit/s",
        "4.57 Mbit/s",
        "99 Mbit/s",
        "12,346 Mbit/s",
    ]


def test_facts_of_this_machine_are_fit_for_a_tiny_run(tmp_path: Path) -> None:
    found = facts(tmp_path / "not" / "yet")
    assert check_software(found).verdict is Verdict.GOOD
    assert check_disk(found, needs(TINY)).verdict is Verdict.GOOD
    assert found.cores >= 1


def test_more_replicas_need_less_and_larger_models_more() -> None:
    few, many = (RunSpec.of(model={"size": 512}, league={"replicas": n, "max_workers": 999}) for n in (1, 8))
    assert need(many, 1).disk < need(few, 1).disk
    assert need(RunSpec.of(model={"size": 768}), 1).memory > need(RunSpec.of(model={"size": 512}), 1).memory


def test_a_real_worker_takes_what_it_is_said_to_need_within_half(tmp_path: Path) -> None:
    """Measured by the workers themselves: the most memory that their processes ever had."""
    spec = RunSpec.of(
        model={"size": 512, "stages": 2, "layers": 2, "context": 32},
        train={"steps": 1, "batch": 2, "microbatch": 1, "eval_every": 0, "eval_sequences": 1},
        league={"replicas": 1},
        data={"max_bytes": 50_000},
    )
    with LocalSwarm(spec, tmp_path / "run") as swarm:
        swarm.train()
        time.sleep(1.5)  # until the next heartbeat
        measured = {swarm.state.seats[m].stage: t.memory_mib for m, t in swarm._league.telemetry.items()}
    for asked in needs(spec):
        assert measured[asked.stage] * 2**20 == pytest.approx(asked.memory.count, rel=0.5)
        assert measured[asked.stage] * 2**20 < 1.2 * asked.memory.count


def test_a_calibration_computes_real_items_of_the_dearest_stage_and_tells_how_far_it_is() -> None:
    shares: list[float] = []
    computed = asyncio.run(calibrate(TINY, shares.append, lasts=Seconds(0.2)))
    assert computed.stage == dearest_stage(TINY) == 1
    assert computed.items >= 1
    assert computed.flops_per_second > 0
    assert computed.tokens_per_item == TINY.train.microbatch * TINY.model.context
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
