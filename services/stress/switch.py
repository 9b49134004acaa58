"""Carries IP packets between namespaces, as badly as it is told to.

Reads what each machine sends from its TUN device, decides its fate (``packets``), and writes it to
the device of whom it is for, once its delay is over. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from dataclasses import dataclass, field

from services.fault_connection import Direction
from services.stress import packets
from services.stress.namespaces import Namespace
from services.stress.packets import Fate, LinkQuality

PACKET_BYTES_MAX = 65_536
BURST = 64
"""Packets of one machine before another one's turn."""
OVERTAKING, REFUSED, CARRIED_BYTES = "overtaking", "refused", "bytes"


@dataclass(slots=True)
class _Port:
    name: str
    namespace: Namespace
    sent: int = 0
    held: int = 0
    closed: set[Direction] = field(default_factory=set)


class Switch:
    """See the module. ``counts``: packets by fate, and by what else became of them. ``spared``:
    machines to and from whom nothing is forged."""

    def __init__(self, quality: LinkQuality, seed: int, spared: frozenset[str]) -> None:
        self.quality = quality
        self._spared = spared
        self.counts: Counter[str] = Counter()
        self._seed = seed
        self._ports: dict[str, _Port] = {}
        self._by_address: dict[bytes, _Port] = {}

    def attach(self, name: str, namespace: Namespace) -> None:
        """From now on what this machine sends is carried."""
        port = _Port(name, namespace)
        self._ports[name] = self._by_address[namespace.packed] = port
        asyncio.get_running_loop().add_reader(namespace.tun, self._readable, port)

    def close(self) -> None:
        """Carry nothing any more; what is on its way is lost."""
        loop = asyncio.get_running_loop()
        for port in self._ports.values():
            loop.remove_reader(port.namespace.tun)
        self._ports.clear()
        self._by_address.clear()

    def hold(self, name: str, *ways: Direction) -> None:
        """Lose everything to (forward) or of (back) this machine."""
        self._ports[name].closed |= set(ways)

    def release(self, name: str) -> None:
        """No more of that."""
        self._ports[name].closed.clear()

    def held(self, name: str) -> int:
        """Bytes lost that way so far."""
        return self._ports[name].held

    def _readable(self, port: _Port) -> None:
        for _ in range(BURST):
            try:
                packet = os.read(port.namespace.tun, PACKET_BYTES_MAX)
            except BlockingIOError:
                return
            except OSError:
                self.counts[REFUSED] += 1
                return
            self._take(port, packet)

    def _take(self, port: _Port, packet: bytes) -> None:
        address = packets.destination(packet)
        to = self._by_address.get(address) if address is not None else None
        if to is None:
            return  # neighbours that IPv6 looks for, and nobody's address
        for held, way in ((port, Direction.BACK), (to, Direction.FORWARD)):
            if way in held.closed:
                held.held += len(packet)
                return
        passage = packets.passage(self.quality, self._seed, port.name, port.sent)
        port.sent += 1
        damaged: bytes | None = None
        if passage.fate is Fate.CORRUPTED:
            damaged = packets.corrupted(packet, passage.bit)
        elif passage.fate is Fate.FORGED and self._spared.isdisjoint((port.name, to.name)):
            damaged = packets.forged(packet, passage.bit)
        fate = passage.fate if damaged or passage.fate is Fate.LOST else Fate.WHOLE
        self.counts[fate.value] += 1
        if fate is Fate.LOST:
            return
        self.counts[OVERTAKING] += passage.overtakes
        loop = asyncio.get_running_loop()
        loop.call_later(passage.delay_s, self._deliver, to, damaged or packet)

    def _deliver(self, to: _Port, packet: bytes) -> None:
        if to.namespace.tun < 0:
            return
        try:
            os.write(to.namespace.tun, packet)
        except OSError:
            self.counts[REFUSED] += 1  # a full queue is one more lost packet
        else:
            self.counts[CARRIED_BYTES] += len(packet)
