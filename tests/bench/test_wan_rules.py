"""The emulated network without a network: quantities, lines, cuts, dice, and what becomes of a packet, and when."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.wan import Stats
from bench.wan.access import Access, Line
from bench.wan.commands import obey
from bench.wan.cuts import Cuts
from bench.wan.quantities import quantity
from bench.wan.switch import Switch, address

QUICK = Access(up=math.inf, down=math.inf, delay=0.0)
MTU = 1500


def packet(sender: int, receiver: int, nbytes: int = 100) -> bytes:
    """An IPv4 header as far as the switch reads it, and nothing in it."""
    head = bytes([0x45]) + bytes(11) + bytes([10, 77, 0, sender, 10, 77, 0, receiver])
    return head + bytes(nbytes - len(head))


def arrivals(switch: Switch, until: float = 1e9) -> list[tuple[float, int]]:
    """(when, receiver) of everything that is under way."""
    found = []
    while (due := switch.next_due) is not None and due <= until:
        found += [(due, delivery.receiver) for delivery in switch.advance(due)]
    return found


# --- quantities


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("80mbit", 80e6),
        ("1.5gbit", 1.5e9),
        ("64kbit", 64e3),
        ("50ms", 0.05),
        ("200us", 2e-4),
        ("2s", 2.0),
        ("1%", 0.01),
        ("0", 0.0),
        (".5", 0.5),
        (0.25, 0.25),
        ("unlimited", math.inf),
    ],
)
def test_quantities_are_read_as_people_write_them(text: str | float, value: float) -> None:
    assert quantity(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "fast", "80 parsecs", "-1ms", "1e", "5mbits", "nan", -1.0, math.nan])
def test_what_is_no_quantity_is_refused_with_a_sentence(text: str | float) -> None:
    with pytest.raises(ValueError, match="is no quantity"):
        quantity(text)


# --- access links


def test_rate_and_rtt_set_both_directions_and_a_quarter_of_the_delay() -> None:
    access = Access().changed({"rate": "10mbit", "rtt": "40ms"})
    assert (access.up, access.down, access.delay) == (10e6, 10e6, pytest.approx(0.01))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("speed", "1mbit", "no 'speed'"),
        ("rate", 0, "above 0"),
        ("loss", "101%", "no share"),
        ("queue", "unlimited", "at least 0"),
    ],
)
def test_a_link_that_makes_no_sense_cannot_be_made(name: str, value: str | float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Access().changed({name: value})


def test_a_line_sends_one_packet_after_the_other() -> None:
    line = Line()
    assert [line.carry(0.0, 1000, 8e6, 1.0) for _ in range(3)] == pytest.approx([0.001, 0.002, 0.003])
    assert line.carry(1.0, 1000, 8e6, 1.0) == pytest.approx(1.001)


@given(st.lists(st.tuples(st.floats(0, 0.01), st.integers(20, MTU)), min_size=1, max_size=60), st.floats(0, 0.05))
def test_a_line_never_carries_more_than_its_rate_nor_lets_wait_longer_than_its_queue(
    sent: list[tuple[float, int]], queue: float
) -> None:
    line, rate, now, total, last = Line(), 1e6, 0.0, 0, 0.0
    for pause, nbytes in sent:
        now += pause
        left = line.carry(now, nbytes, rate, queue)
        if left is not None:
            total += 8 * nbytes
            assert last <= left <= now + queue + 8 * nbytes / rate + 1e-9
            assert total <= rate * left + 1e-6
            last = left


# --- cuts


def test_a_partition_cuts_between_its_groups_and_nowhere_else() -> None:
    cuts = Cuts(range(1, 6))
    cuts.partition([1, 2], [3, 4])
    assert cuts.is_cut(1, 3)
    assert cuts.is_cut(4, 2)
    assert not cuts.is_cut(1, 2)
    assert not cuts.is_cut(5, 3)


def test_a_block_is_one_way_and_healing_undoes_everything() -> None:
    cuts = Cuts(range(1, 4))
    cuts.block(1, 2)
    assert cuts.is_cut(1, 2)
    assert not cuts.is_cut(2, 1)
    cuts.partition([1], [2, 3])
    cuts.heal()
    assert not any(cuts.is_cut(a, b) for a in range(1, 4) for b in range(1, 4))


@pytest.mark.parametrize(
    ("groups", "said"),
    [(([1],), "two groups"), (([1, 2], [2, 3]), "Host 2 is in two"), (([1], [9]), "no host 9")],
)
def test_a_partition_that_makes_no_sense_cuts_nothing(groups: tuple[list[int], ...], said: str) -> None:
    cuts = Cuts(range(1, 4))
    with pytest.raises(ValueError, match=said):
        cuts.partition(*groups)
    assert not any(cuts.is_cut(a, b) for a in range(1, 4) for b in range(1, 4))


# --- the switch


def test_a_packet_takes_both_lines_and_both_delays() -> None:
    accesses = {1: Access(up=8e6, delay=0.01), 2: Access(down=4e6, delay=0.02)}
    switch = Switch(accesses)
    switch.take(5.0, 1, packet(1, 2, 1000))
    assert arrivals(switch) == [(pytest.approx(5.0 + 0.001 + 0.01 + 0.002 + 0.02), 2)]


def test_senders_share_the_receivers_line() -> None:
    switch = Switch({1: QUICK, 2: QUICK, 3: Access(down=8e6, delay=0.0)})
    for sender in 1, 2, 1, 2:
        switch.take(0.0, sender, packet(sender, 3, 1000))
    assert [when for when, _ in arrivals(switch)] == pytest.approx([0.001, 0.002, 0.003, 0.004])


def test_a_full_queue_refuses() -> None:
    switch = Switch({1: Access(up=8e6, queue=0.0025), 2: QUICK})
    for _ in range(10):
        switch.take(0.0, 1, packet(1, 2, 1000))
    assert len(arrivals(switch)) == 3
    assert switch.stats().queue_full == 7


def test_jitter_spreads_and_never_reorders() -> None:
    switch = Switch({1: Access(up=math.inf, delay=0.0, jitter=0.01), 2: QUICK}, seed=3)
    for number in range(200):
        switch.take(number * 1e-3, 1, packet(1, 2, 100 + number))
    seen = []
    while (due := switch.next_due) is not None:
        seen += [len(delivery.packet) for delivery in switch.advance(due)]
    assert seen == sorted(seen)
    assert len(seen) == 200


def test_loss_is_the_larger_of_both_hosts_and_is_counted() -> None:
    switch = Switch({1: QUICK, 2: Access(up=math.inf, down=math.inf, delay=0.0, loss=0.2)}, seed=1)
    for number in range(5000):
        switch.take(float(number), 1, packet(1, 2))
    assert len(arrivals(switch)) + switch.stats().lost == 5000
    assert switch.stats().lost == pytest.approx(1000, rel=0.15)


def test_traffic_elsewhere_does_not_change_what_is_lost() -> None:
    def arrived(*, noise: bool) -> list[int]:
        switch = Switch(dict.fromkeys((1, 2, 3), Access(up=math.inf, down=math.inf, delay=0.0, loss=0.3)), seed=7)
        sizes = []
        for number in range(200):
            switch.take(float(number), 1, packet(1, 2, 100 + number))
            for sender, receiver in ((3, 2), (1, 3)) if noise else ():
                switch.take(float(number), sender, packet(sender, receiver, 50))
            while switch.next_due is not None:
                sizes += [len(delivery.packet) for delivery in switch.advance(switch.next_due)]
        return [size for size in sizes if size >= 100]

    alone = arrived(noise=False)
    assert 100 < len(alone) < 180
    assert arrived(noise=True) == alone


def test_a_cut_also_stops_what_is_under_way() -> None:
    switch = Switch({1: Access(), 2: Access()})
    switch.take(0.0, 1, packet(1, 2))
    switch.cuts.partition([1], [2])
    assert arrivals(switch) == []
    assert switch.stats().blocked == 1


@pytest.mark.parametrize("strange", [b"", b"\x60" + bytes(39), packet(1, 9), packet(1, 1), bytes([0x45, 0])])
def test_what_is_for_nobody_here_is_counted_and_dropped(strange: bytes) -> None:
    switch = Switch({1: QUICK, 2: QUICK})
    switch.take(0.0, 1, strange)
    assert arrivals(switch) == []
    assert switch.stats().unroutable == 1


def test_a_delivery_after_its_time_counts_as_late() -> None:
    switch = Switch({1: QUICK, 2: QUICK})
    for moment in 0.0, 0.001, 0.002:
        switch.take(moment, 1, packet(1, 2))
    list(switch.advance(0.0))  # crosses
    list(switch.advance(0.0035))
    assert (switch.stats().delivered, switch.stats().late) == (3, 1)


def test_order_holds_when_a_link_becomes_faster_under_way() -> None:
    switch = Switch({1: Access(), 2: Access()})
    switch.take(0.0, 1, packet(1, 2, 200))
    switch.accesses |= {1: QUICK, 2: QUICK}
    switch.take(0.0, 1, packet(1, 2, 300))
    seen = []
    while (due := switch.next_due) is not None:
        seen += [len(delivery.packet) for delivery in switch.advance(due)]
    assert seen == [200, 300]


# --- stats, commands, addresses


def test_stats_subtract_and_travel() -> None:
    switch = Switch({1: QUICK, 2: QUICK})
    switch.take(0.0, 1, packet(1, 2, 100))
    arrivals(switch)
    before = switch.stats()
    switch.take(1.0, 2, packet(2, 1, 300))
    arrivals(switch)
    spent = Stats.of_json(switch.stats().as_json()) - before
    assert spent == Stats(delivered=1, nbytes={(1, 2): 0, (2, 1): 300})


def test_a_line_changes_the_network_and_is_answered() -> None:
    switch = Switch(dict.fromkeys((1, 2, 3), Access()))
    assert obey(switch, "set 3 loss=5% up=5mbit")["did"]
    assert (switch.accesses[3].loss, switch.accesses[3].up, switch.accesses[1].loss) == (0.05, 5e6, 0.0)
    obey(switch, "set all rtt=80ms")
    assert {access.delay for access in switch.accesses.values()} == {0.02}
    obey(switch, "partition 1,2 3")
    assert switch.cuts.is_cut(3, 1)
    obey(switch, "heal")
    assert not switch.cuts.is_cut(3, 1)
    assert obey(switch, "stats")["stats"]["delivered"] == 0


@pytest.mark.parametrize(
    "line", ["", "dance", "set", "set 1", "set 9 loss=1%", "set 1 loss", "set 1 loss=2", "block 1", "partition 1,x 2"]
)
def test_a_line_that_makes_no_sense_changes_nothing_and_says_why(line: str) -> None:
    switch = Switch(dict.fromkeys((1, 2), Access()))
    answer = obey(switch, line)
    assert answer["refused"] == line
    assert answer["why"]
    assert switch.accesses == dict.fromkeys((1, 2), Access())


def test_hosts_have_addresses_of_their_own() -> None:
    assert [address(host) for host in (1, 254)] == ["10.77.0.1", "10.77.0.254"]
    assert all(a < b for a, b in pairwise(map(address, range(1, 10))))
