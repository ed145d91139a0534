"""A small internet on one Linux machine: hosts joined by links with a rate, a delay, jitter, loss and partitions.

    if reason := why_not():
        print(reason)
    with Wan(hosts=5, rate="80mbit", rtt="50ms", loss="1%", seed=7) as wan:
        wan.popen(1, ["ping", "-c", "5", wan.address(2)]).wait()
        wan.partition([1, 2], [3, 4, 5])

Each host is a network namespace behind its own TUN device; a user-space switch carries every packet over the sender's
up link, its delay and jitter, the receiver's down link and its delay. Hosts may differ, and flows compete for the links
that they share. Needs root and iproute2, but neither tc nor netem, which many kernels lack. Knows nothing of leagues.
"""

from bench.wan.machine import why_not
from bench.wan.network import Wan, WanError
from bench.wan.stats import Stats

__all__ = ["Stats", "Wan", "WanError", "why_not"]
