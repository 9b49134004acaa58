"""Ports that a process may leave and come back to."""

from __future__ import annotations

import random
import socket

LENT = range(20_000, 32_000)
"""Below what kernels lend to outgoing connections (Linux: 32,768 and up): a port from up there may
be somebody's by the time a killed process comes back for it."""
_given: set[int] = set()


def free_port() -> int:
    """A port of the loopback address on which nobody listens, another one with each call."""
    while len(_given) < len(LENT):
        port = random.choice(LENT)
        if port in _given:
            continue
        _given.add(port)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise RuntimeError("every port has been given out")
