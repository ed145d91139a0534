"""Passes and address records: who may say what, until when."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from koinon.errors import Refused
from koinon.net.passes import GRACE, AddressRecord, Pass, announce, check, issue, verify_record
from tests.net.support import key

COORDINATOR, NODE, OTHER = key("coordinator"), key("node"), key("other")
NOW = 1_800_000_000
PASS = issue(
    COORDINATOR, run="r", node=NODE.peer_id, account="acc", role="worker", stage=2, term=3, not_after=NOW + 600
)
ASKED: dict[str, Any] = {"issuer": COORDINATOR.peer_id, "node": NODE.peer_id, "run": "r", "now": NOW}


def test_a_pass_is_good_for_its_node_in_its_run_until_it_expires() -> None:
    assert check(PASS, **ASKED) == PASS
    assert check(PASS, **{**ASKED, "now": NOW + 600 + GRACE.value}) == PASS


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"node": OTHER.peer_id}, "belongs to"),
        ({"run": "other"}, "is for run"),
        ({"now": NOW + 601 + GRACE.value}, "expired"),
        ({"revoked": {NODE.peer_id}}, "was revoked"),
        ({"issuer": OTHER.peer_id}, "not signed by the coordinator"),
    ],
)
def test_a_pass_is_refused_with_the_reason(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        check(PASS, **{**ASKED, **changed})


def test_nothing_shown_is_refused() -> None:
    with pytest.raises(Refused, match="no pass was shown"):
        check(None, **ASKED)


@given(st.sampled_from(["account", "role", "stage", "term", "not_after", "signature"]), st.integers(4, 99))
def test_no_field_of_a_pass_can_be_changed(field: str, number: int) -> None:
    value: Any = {"account": f"a{number}", "role": f"r{number}", "signature": bytes(number)}.get(field, number)
    forged = msgspec.structs.replace(PASS, **{field: value if field != "not_after" else NOW + number})
    with pytest.raises(Refused, match="not signed"):
        check(forged, **ASKED)


def test_a_pass_survives_the_wire() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(PASS), type=Pass) == PASS


def record(sequence: int = 5, *, signer: Any = NODE, address: str = "10.0.0.1:7000") -> AddressRecord:
    return announce(signer, run="r", addresses=(address,), sequence=sequence, expiry=NOW + 600)


def test_a_record_signed_by_its_node_is_news() -> None:
    assert verify_record(record(), run="r", now=NOW) == record()
    assert verify_record(record(6), run="r", now=NOW, known=record(5)) == record(6)
    assert verify_record(record(5), run="r", now=NOW, known=record(5)) == record(5)


def test_an_older_record_is_refused_and_so_is_another_of_the_same_number() -> None:
    for replayed in (record(4), record(5, address="10.6.6.6:1")):
        with pytest.raises(Refused, match="older"):
            verify_record(replayed, run="r", now=NOW, known=record(5))


def test_a_record_of_another_node_is_not_compared_with_this_one() -> None:
    assert verify_record(record(1, signer=OTHER), run="r", now=NOW, known=record(5)).node == OTHER.peer_id


@pytest.mark.parametrize("node", [OTHER.peer_id, "not a key"])
def test_nobody_speaks_for_another_node(node: str) -> None:
    with pytest.raises(Refused, match="not signed by that node"):
        verify_record(msgspec.structs.replace(record(), node=node), run="r", now=NOW)


def test_an_expired_or_foreign_record_is_refused() -> None:
    with pytest.raises(Refused, match="expired"):
        verify_record(record(), run="r", now=NOW + 601 + GRACE.value)
    with pytest.raises(Refused, match="another run"):
        verify_record(record(), run="s", now=NOW)


def test_a_pass_signature_is_no_record_signature() -> None:
    shown = msgspec.structs.replace(record(), signature=PASS.signature)
    with pytest.raises(Refused):
        verify_record(shown, run="r", now=NOW)
