"""Who owns which tensor: the same answer for all, balanced, two accounts, little moved when members change."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koinon.optim.ownership import SLACK, Owners, owners

SIZES = st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.integers(1, 10_000), min_size=1, max_size=30)
MEMBERS = st.lists(st.integers(0, 99).map(str), min_size=1, max_size=8, unique=True)


def loads(assigned: Owners, sizes: dict[str, int]) -> dict[str, int]:
    load: dict[str, int] = {}
    for name, pair in assigned.items():
        for member in filter(None, pair):
            load[member] = load.get(member, 0) + sizes[name]
    return load


@given(SIZES, MEMBERS, st.integers(0, 99))
def test_the_answer_does_not_depend_on_anyones_order(sizes: dict[str, int], members: list[str], seed: int) -> None:
    shuffled, names = list(members), list(sizes)
    random.Random(seed).shuffle(shuffled)
    random.Random(seed).shuffle(names)
    assert owners(sizes, members) == owners({n: sizes[n] for n in names}, shuffled)


@given(SIZES, MEMBERS)
def test_every_tensor_has_an_owner_and_another_second(sizes: dict[str, int], members: list[str]) -> None:
    assigned = owners(sizes, members)
    assert assigned.keys() == sizes.keys()
    for owner, second in assigned.values():
        assert owner in members
        assert second != owner
        assert (second in members) if len(members) > 1 else second is None


@given(SIZES, MEMBERS)
def test_loads_differ_by_no_more_than_one_tensor(sizes: dict[str, int], members: list[str]) -> None:
    load = loads(owners(sizes, members), sizes)
    heaviest, lightest = max(load.values()), min(load.get(member, 0) for member in members)
    assert heaviest - lightest <= max(sizes.values()) or len(members) == 2


@given(SIZES, MEMBERS, st.integers(1, 3))
def test_the_second_belongs_to_another_account(sizes: dict[str, int], members: list[str], accounts: int) -> None:
    account = {member: str(number % accounts) for number, member in enumerate(members)}
    for owner, second in owners(sizes, members, accounts=account).values():
        if len(set(account.values())) == 1:
            assert second is None
        else:
            assert second is not None
            assert account[owner] != account[second]


@given(SIZES, MEMBERS)
def test_the_same_members_keep_what_they_hold(sizes: dict[str, int], members: list[str]) -> None:
    before = owners(sizes, members)
    after = owners(sizes, members, previous=before)
    kept = sum(bool({*before[name]} & {*after[name]}) for name in sizes)
    assert kept >= 0.5 * len(sizes)


@given(st.integers(3, 8), st.integers(0, 1000))
def test_when_a_member_leaves_most_state_stays_where_it_is_and_loads_stay_even(count: int, seed: int) -> None:
    rng = random.Random(seed)
    sizes = {f"t{i}": rng.choice([100, 3000, 10_000]) for i in range(60)}
    members = [f"m{i}" for i in range(count)]
    before = owners(sizes, members)
    after = owners(sizes, members[1:], previous=before)
    held = sum(sizes[n] * len({*before[n]} & {*after[n]}) for n in sizes)
    surviving = sum(sizes[n] * len({*before[n]} - {"m0"}) for n in sizes)
    assert held >= 0.8 * surviving
    load = loads(after, sizes)
    assert max(load.values()) <= SLACK * sum(load.values()) / (count - 1) + max(sizes.values())


def test_a_stage_without_members_is_an_error() -> None:
    with pytest.raises(ValueError, match="without members"):
        owners({"a": 1}, [])
