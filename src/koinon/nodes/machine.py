"""This machine against what a run asks of it: facts are gathered once, and judged by pure functions.

Every judgement is a `Finding` with the number that was found, the number that is needed, and what to do. Thresholds:
what a spec declares of links may be missed by a fifth, for a short measurement is no better than that; clocks may be
off by a minute, for that is what passes allow. Imports no torch.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import msgspec

from koinon.net.passes import GRACE
from koinon.nodes.findings import Finding, bad, doubtful, good
from koinon.nodes.needs import Need
from koinon.run.links import traffic
from koinon.run.spec import RunSpec
from koinon.units import BitsPerSecond, Bytes, Flops, Seconds

PYTHON: Final = ((3, 11), (3, 14))
TORCH: Final = (2, 9)
MEASURED_SHORT: Final = 0.8
"""A measured rate counts as the declared one from this share on."""
CLOCK: Final = GRACE
MEMORY_SPARE: Final = 0.9
"""Share of the free memory that a worker may plan with; the rest of the machine lives, too."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Of one machine. `memory`: free now; None where it is not known. `torch`: "" where it is missing."""

    python: tuple[int, int]
    torch: str
    cores: int
    memory: Bytes | None
    disk: Bytes
    system: str
    bf16: bool


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Items of one stage as this machine computes them, forward and backward."""

    stage: int
    items: int
    seconds_per_item: float
    flops_per_item: int
    tokens_per_item: int
    peak_bytes: int
    device: str
    has_unused_gpu: bool = False

    @property
    def flops_per_second(self) -> float:
        return self.flops_per_item / self.seconds_per_item

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_item / self.seconds_per_item


@dataclass(frozen=True, slots=True)
class LinkMeasured:
    """Between this machine and the control process."""

    rtt: Seconds
    up: BitsPerSecond
    down: BitsPerSecond


def facts(directory: Path) -> Facts:
    """Of this machine; `directory`: where a worker would keep its snapshots."""
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = ""
    place = next(p for p in (directory.absolute(), *directory.absolute().parents) if p.exists())
    return Facts(
        python=tuple(map(int, platform.python_version_tuple()[:2])),  # type: ignore[arg-type]
        torch=torch,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=_free_memory(),
        disk=Bytes(shutil.disk_usage(place).free),
        system=f"{platform.system()} {platform.machine()}",
        bf16=bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", _text("/proc/cpuinfo"))),
    )


def check_software(found: Facts) -> Finding:
    """Versions of Python and torch."""
    hop, (low, high) = "software", PYTHON
    python = ".".join(map(str, found.python))
    if not low <= found.python < high:
        return bad(hop, f"Python {python}.", f"koinon needs Python {_dotted(low)} or later, below {_dotted(high)}.")
    if not found.torch:
        return bad(hop, "torch is not installed.", "Run: pip install torch")
    numbers = re.findall(r"\d+", found.torch)
    if tuple(map(int, numbers[:2])) < TORCH:
        return bad(hop, f"torch {found.torch}.", f"koinon needs torch {_dotted(TORCH)} or later: pip install -U torch")
    bf16 = "with" if found.bf16 else "without"
    return good(hop, f"Python {python}, torch {found.torch}, {found.system}, {found.cores} cores {bf16} bf16.")


def check_memory(found: Facts, asked: Sequence[Need]) -> Finding:
    """Free memory against the largest stage, for a seat is drawn and not chosen."""
    hop = "memory"
    if found.memory is None:
        return doubtful(hop, "It cannot be told how much memory is free.", f"A worker needs {_most(asked)}.")
    have = Bytes(int(found.memory.count * MEMORY_SPARE))
    fits = [need.stage for need in asked if need.memory <= have]
    if len(fits) == len(asked):
        return good(hop, f"{found.memory} are free, the largest stage needs {_most(asked)}.")
    least = min(need.memory for need in asked)
    remedy = "Close other programs, or join with a machine that has more."
    if not fits:
        return bad(hop, f"{found.memory} are free, too little for any stage: the smallest needs {least}.", remedy)
    return bad(
        hop,
        f"{found.memory} are free. That is enough for stages {', '.join(map(str, fits))}, but which stage a newcomer "
        f"serves is drawn, and the largest needs {_most(asked)}.",
        remedy,
    )


def check_disk(found: Facts, asked: Sequence[Need]) -> Finding:
    hop, most = "disk", max(need.disk for need in asked)
    if found.disk < most:
        return bad(
            hop,
            f"{found.disk} are free, the snapshots of the largest stage take {most}.",
            "Free some, or name a directory on another disk with --dir.",
        )
    return good(hop, f"{found.disk} are free, snapshots take up to {most}.")


def check_clock(ahead: Seconds) -> Finding:
    """ahead: how much this machine's clock is ahead of the coordinator's, half the round trip taken into account."""
    hop, off = "clock against the coordinator", abs(ahead.value)
    if off > CLOCK.value:
        way = "ahead" if ahead.value > 0 else "behind"
        return bad(
            hop,
            f"This machine's clock is {Seconds(off)} {way}; passes allow {CLOCK}.",
            "Set it by network time (timedatectl set-ntp true), or ask whoever runs the league to set theirs.",
        )
    return good(hop, f"They differ by {Seconds(off)}.")


def check_link(link: LinkMeasured, spec: RunSpec) -> Finding:
    """The measured link against what the spec declares, and against the speed that the run should reach."""
    hop, declared = "link against the spec", spec.link
    wanted, why = _wanted_rate(spec)
    if wanted is not None and link.up.value < MEASURED_SHORT * wanted.value:
        return bad(
            hop,
            f"This machine sends {mbit(link.up)}, too slow for this run: {why} {mbit(wanted)}.",
            "Use a wire instead of radio, stop what else is sending, or join a run with smaller boundaries.",
        )
    if declared.rtt_ms is not None and link.rtt.value * 1e3 * MEASURED_SHORT > declared.rtt_ms:
        return bad(
            hop,
            f"A round trip takes {link.rtt}, and the spec expects {declared.rtt_ms:g} ms.",
            "Use a wire instead of radio, or join from nearer to the others.",
        )
    if wanted is None and declared.rtt_ms is None:
        return good(hop, "The spec asks for nothing.")
    return good(hop, "As declared." if wanted is None else f"{mbit(wanted)} up are asked for.")


def check_balance(link: LinkMeasured, computed: Calibration, spec: RunSpec) -> Finding:
    """Whether boundaries can be sent as fast as they are computed. A slow link is no reason to refuse, only to know."""
    hop, sent = "link against compute", traffic(spec.model, 1)
    needed = sent.rate(computed.tokens_per_second)
    if not sent.directions:
        return good(hop, "A model of one stage has no boundary.")
    if link.up < needed:
        share = link.up.value / needed.value
        return doubtful(
            hop,
            f"Boundaries of {sent.bytes_per_token} bytes per token at full speed are {mbit(needed)}, the link carries "
            f"{mbit(link.up)}: this machine will wait, and compute for about {share:.0%} of the time.",
            "It is welcome all the same; a faster uplink would make more of it.",
        )
    return good(hop, f"At full speed boundaries take {mbit(needed)} of {mbit(link.up)}.")


def check_compute(computed: Calibration) -> Finding:
    found = (
        f"{rate(computed.flops_per_second)} on one item of stage {computed.stage} ({computed.device}): "
        f"{Seconds(computed.seconds_per_item)} forward and backward, {computed.tokens_per_second:,.0f} tokens/s."
    )
    if computed.has_unused_gpu:
        return doubtful("compute", found, "There is a GPU here; this version computes on the CPU.")
    return good("compute", found)


def rate(flops_per_second: float) -> str:
    """For people."""
    return f"{Flops(int(flops_per_second))}/s"


def _wanted_rate(spec: RunSpec) -> tuple[BitsPerSecond | None, str]:
    """The uplink that the spec asks of one worker, and in whose name."""
    declared, asks = spec.link, list[tuple[BitsPerSecond, str]]()
    if declared.rate_mbit is not None:
        asks.append((BitsPerSecond.mbit(declared.rate_mbit), "`rate_mbit` of its spec is"))
    if declared.tokens_per_second is not None and spec.model.stages > 1:
        needed = traffic(spec.model, spec.league.replicas).rate(declared.tokens_per_second)
        asks.append((needed, f"its boundaries at {declared.tokens_per_second:g} tokens per second need"))
    return max(asks, default=(None, ""), key=lambda ask: ask[0].value)


def _most(asked: Sequence[Need]) -> Bytes:
    return max(need.memory for need in asked)


def mbit(value: BitsPerSecond) -> str:
    """For people."""
    megabits = value.value / 1e6
    return f"{megabits:,.0f} Mbit/s" if megabits >= 100 else f"{megabits:.3g} Mbit/s"


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))


def _free_memory() -> Bytes | None:
    """What could be allocated now: free and reclaimable, and no more than a control group still allows (Linux)."""
    known = re.search(r"^MemAvailable:\s+(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
    if known is None:
        return None
    limit, used = _text("/sys/fs/cgroup/memory.max").strip(), _text("/sys/fs/cgroup/memory.current").strip()
    free = int(known[1]) * 1024
    return Bytes(min(free, max(0, int(limit) - int(used))) if limit.isdigit() and used.isdigit() else free)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
