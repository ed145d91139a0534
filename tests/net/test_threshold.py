"""Half-open connections are bounded, per network and in all, and members' addresses always find a place."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from koinon.net.deadlines import CONNECT, FLOOR
from koinon.net.threshold import BEGUN, HALF_OPEN, KEPT_BACK, PER_NETWORK, Caller, Ruling, Threshold, network_of

FRIEND = "198.51.100.7"


def threshold() -> Threshold:
    return Threshold(lambda host: host == FRIEND)


def fill(door: Threshold, count: int) -> list[Caller]:
    """So many callers from as many networks."""
    callers = [Caller(f"10.{n // 256}.{n % 256}.1", is_proven=True) for n in range(count)]
    assert [door.judge(caller, 0.0) for caller in callers].count(Ruling.ENTER) == min(count, HALF_OPEN - KEPT_BACK)
    return callers


def test_networks_are_a_24_and_a_48_and_this_machine_is_none() -> None:
    assert network_of("192.0.2.77") == network_of("192.0.2.1") == "192.0.2.0/24"
    assert network_of("::ffff:192.0.2.77") == "192.0.2.0/24"
    assert network_of("2001:db8:1:2::3") == network_of("2001:db8:1:ffff::") == "2001:db8:1::/48"
    assert network_of("2001:db8:2::") != network_of("2001:db8:1::")
    assert network_of("127.0.0.1") == network_of("::1") == network_of("") == network_of("a relay") == ""


def test_one_network_has_few_places() -> None:
    door = threshold()
    callers = [Caller(f"192.0.2.{n}") for n in range(PER_NETWORK + 1)]
    assert [door.judge(caller, 0.0) for caller in callers] == [Ruling.ENTER] * PER_NETWORK + [Ruling.REFUSE]
    assert door.judge(Caller("192.0.3.1"), 0.0) is Ruling.ENTER
    door.leave(callers[0], None)
    assert door.judge(callers[0], 0.0) is Ruling.ENTER


def test_one_network_begins_few_handshakes_in_a_second() -> None:
    door, caller, entered = threshold(), Caller("192.0.2.1"), 0
    for tick in range(10_000):
        if door.judge(caller, tick / 1000) is Ruling.ENTER:
            door.leave(caller, 0.01)
            entered += 1
    assert entered <= BEGUN[0].burst + 10 * BEGUN[0].per_second + 1


def test_members_addresses_find_a_place_when_strangers_have_all_theirs() -> None:
    door = threshold()
    fill(door, HALF_OPEN)
    assert door.judge(Caller("203.0.113.1", is_proven=True), 0.0) is Ruling.REFUSE
    for _ in range(KEPT_BACK):
        assert door.judge(Caller(FRIEND), 0.0) is Ruling.ENTER
    assert door.judge(Caller(FRIEND), 0.0) is Ruling.REFUSE


def test_a_busy_threshold_wants_addresses_proven() -> None:
    door = threshold()
    assert door.judge(Caller("203.0.113.1"), 0.0) is Ruling.ENTER
    fill(door, HALF_OPEN // 2)
    assert door.judge(Caller("203.0.114.1"), 0.0) is Ruling.PROVE
    assert door.judge(Caller("203.0.114.1", is_proven=True), 0.0) is Ruling.ENTER


def test_patience_shrinks_to_what_others_need_when_places_are_few() -> None:
    door = threshold()
    assert door.patience() == CONNECT
    for _ in range(20):
        door.judge(Caller(FRIEND), 0.0)
        door.leave(Caller(FRIEND), 0.05)
    fill(door, HALF_OPEN // 2)
    assert door.patience() == FLOOR


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 300), st.booleans()), max_size=400))
def test_no_crowd_holds_more_than_there_is(script: list[tuple[int, int, bool]]) -> None:
    door, inside = threshold(), list[Caller]()
    for network, host, leaves in script:
        caller = Caller(f"10.0.{network}.{host % 256}", is_proven=True)
        if leaves and inside:
            door.leave(inside.pop(), None)
        elif door.judge(caller, 0.0) is Ruling.ENTER:
            inside.append(caller)
        assert len(door) == len(inside) <= HALF_OPEN
        for number in range(6):
            assert sum(c.host.startswith(f"10.0.{number}.") for c in inside) <= PER_NETWORK
    while inside:
        door.leave(inside.pop(), None)
    assert len(door._open) == 0
