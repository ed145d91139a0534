"""Round trips between two hosts, for machines without `ping`: an echo, and whoever asks it.

python -m bench.wan.echo serve 10.77.0.2
python -m bench.wan.echo ask 10.77.0.2 [COUNT [BYTES]]     prints one JSON line: seconds of each round trip
"""

from __future__ import annotations

import json
import socket
import sys
import time
from typing import Final

PORT: Final = 7007
_PAUSE: Final = 0.01
_PATIENCE: Final = 1.0
"""Seconds after which an answer is given up."""


def serve(address: str) -> None:
    """Send back whatever comes. Prints a line when it listens."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as echo:
        echo.bind((address, PORT))
        print("listening", flush=True)
        while True:
            data, asker = echo.recvfrom(65535)
            echo.sendto(data, asker)


def ask(address: str, count: int, nbytes: int) -> list[float]:
    """Seconds of each round trip that came back, one after the other."""
    took = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.settimeout(_PATIENCE)
        for number in range(count):
            began = time.monotonic()
            asking.sendto(number.to_bytes(4, "big") + bytes(max(0, nbytes - 4)), (address, PORT))
            try:
                while int.from_bytes(asking.recv(65535)[:4], "big") != number:
                    pass
            except TimeoutError:
                continue
            took.append(time.monotonic() - began)
            time.sleep(_PAUSE)
    return took


if __name__ == "__main__":
    verb, where, *sizes = sys.argv[1:]
    if verb == "serve":
        serve(where)
    asked, size = (*map(int, sizes), *(20, 64)[len(sizes) :])
    print(json.dumps(ask(where, asked, size)), flush=True)
