"""Half-open connections: how many there may be, from which networks, and how long each is waited for.

Nothing is known of a caller yet but an address, which it may have forged: so a busy threshold asks for it to be proven
(QUIC's Retry) before a handshake is computed. A network is a /24, or a /48 of IPv6: node keys are free, networks are
not. Places are kept back for addresses where members are, and loopback is no network: whoever is there is this machine.
Pure: time is passed in. Knows nothing of connections.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address, ip_address, ip_network
from typing import Final

from koinon.net.allowance import Allowance, Rate
from koinon.net.deadlines import CONNECT, Deadlines
from koinon.units import Seconds

HALF_OPEN: Final = 256
"""Connections that may be shaking hands at once. The rest is refused unseen."""
KEPT_BACK: Final = 64
"""Of these, for members' addresses."""
PER_NETWORK: Final = 32
BEGUN: Final = Rate(128, 32.0), Rate(4096, 2048.0)
"""Handshakes of one network, and of all."""


class Ruling(Enum):
    ENTER = "enter"
    PROVE = "prove"
    """The address is to be proven first."""
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class Caller:
    """`host`: an address, "" where it is not known (over a relay)."""

    host: str
    is_proven: bool = False


class Threshold:
    """`is_friend`: whether a member is known to be at that address."""

    def __init__(self, is_friend: Callable[[str], bool]) -> None:
        self._is_friend = is_friend
        self._open: Counter[str] = Counter()
        self._begun = Allowance(*BEGUN)
        self._took = Deadlines()

    def __len__(self) -> int:
        return self._open.total()

    def judge(self, caller: Caller, now: float) -> Ruling:
        """ENTER counts the caller in: `leave` must follow."""
        network = network_of(caller.host)
        if network and not self._is_friend(caller.host):
            if len(self) >= HALF_OPEN // 2 and not caller.is_proven:
                return Ruling.PROVE
            full = len(self) >= HALF_OPEN - KEPT_BACK or self._open[network] >= PER_NETWORK
            if full or self._begun.take(network, 1, now).value:
                return Ruling.REFUSE
        elif len(self) >= HALF_OPEN:
            return Ruling.REFUSE
        self._open[network] += 1
        return Ruling.ENTER

    def leave(self, caller: Caller, took: float | None) -> None:
        """The connection stands after so many seconds, or (None) was given up."""
        network = network_of(caller.host)
        self._open[network] -= 1
        if self._open[network] <= 0:
            del self._open[network]
        if took is not None:
            self._took.observe("handshake", 0, took)

    def patience(self) -> Seconds:
        """How long a handshake and its hello may take: while there is room, generously; else as others have shown."""
        if len(self) < HALF_OPEN // 2:
            return CONNECT
        return Seconds(min(CONNECT.value, self._took.of("handshake", 0).value))


def network_of(host: str) -> str:
    """The /24 or /48 of an address; "" for this machine, and where nothing is known."""
    try:
        address = ip_address(host)
    except ValueError:
        return ""
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    if address.is_loopback:
        return ""
    return str(ip_network(f"{address}/{24 if isinstance(address, IPv4Address) else 48}", strict=False))
