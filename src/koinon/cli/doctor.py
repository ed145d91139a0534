"""`koinon doctor`: the way into a run, hop by hop, or this machine alone. Knows nothing of how a hop is tried."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from koinon.cli.checklist import Checklist
from koinon.errors import UserError
from koinon.net.identity import NodeKey
from koinon.net.transport import Transport
from koinon.nodes.doctor import Examination, Way
from koinon.nodes.findings import Finding, Verdict


def way_of(key: NodeKey, directory: Path, bind: str, advertise: tuple[str, ...], threads: int) -> Way:
    """How this machine goes, over the real network. Raises UserError for an address that is none."""
    for address in (bind, *advertise):
        check_address(address)
    return Way(directory, key, _transport, bind, advertise, threads)


def check_address(address: str) -> None:
    """Raises UserError if it is not HOST:PORT."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise UserError(f"{address} is no address: write HOST:PORT, say 0.0.0.0:4774.")


def text_of(given: str) -> str:
    """An invitation as it was passed on, or out of the file that `koinon coordinate` wrote."""
    path = Path(given)
    try:
        return path.read_text(encoding="utf-8") if len(given) < 200 and path.is_file() else given
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{given} cannot be read as an invitation: {error}.") from error


async def examine(text: str | None, way: Way, console: Console, *, as_json: bool) -> bool:
    """Show what is found; whether everything is well."""
    if as_json:
        return await _as_json(text, way)
    with Checklist(console) as shown:
        examination = Examination(text, way, shown.progress)
        verdict = Verdict.GOOD
        async for finding in examination.walk():
            shown.show(finding)
            verdict = finding.verdict
    if verdict is Verdict.BAD:
        return False
    if text is None:
        console.print(
            "This machine is fit. With an invitation the way into its run is tried, too: koinon doctor INVITATION"
        )
    else:
        console.print("Everything is well. Join with: koinon join INVITATION")
    return True


async def _as_json(text: str | None, way: Way) -> bool:
    examination = Examination(text, way)
    findings = [finding async for finding in examination.walk()]
    learned, is_fit = examination.learned, findings[-1].verdict is not Verdict.BAD
    values: dict[str, Any] = {"fit": is_fit, "findings": [_values(finding) for finding in findings]}
    if (link := learned.link) is not None:
        values["link"] = {"rtt_s": link.rtt.value, "up_bit_s": link.up.value, "down_bit_s": link.down.value}
    if (computed := learned.computed) is not None:
        values["compute"] = {**msgspec.to_builtins(computed), "flops_per_second": computed.flops_per_second}
    print(json.dumps(values, indent=2))
    return is_fit


def _values(finding: Finding) -> dict[str, str]:
    return {key: str(value) for key, value in asdict(finding).items()}


def _transport(key: NodeKey, bind: str) -> Transport:
    from koinon.net.iroh_transport import IrohTransport

    return IrohTransport(key, bind=bind)
