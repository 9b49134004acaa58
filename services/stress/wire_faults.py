"""What can be done to single frames and connections where proxies carry them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from services.fault_connection import ConnectionProxy, Direction
from services.fault_damage import Fault, FaultKind
from services.stress.plan import FaultName
from services.stress.schedule import Injection
from services.stress.watch import until
from services.stress.wires import Wires, WorkerWires

FIRE_S_MAX = 120.0
"""How long a frame fault waits for a frame: the pipeline may be away for a while."""
SLOW_BYTES_PER_S = 4000.0

_KINDS: dict[FaultName, tuple[FaultKind, ...]] = {
    FaultName.DROP: (FaultKind.DROP,),
    FaultName.DELAY: (FaultKind.DELAY,),
    FaultName.DUPLICATE: (FaultKind.DUPLICATE,),
    FaultName.REORDER: (FaultKind.REORDER,),
    FaultName.TRUNCATE: (FaultKind.TRUNCATE,),
    FaultName.GARBAGE: (FaultKind.GARBAGE,),
    FaultName.STALE: (FaultKind.OLD_EPOCH,),
    FaultName.LOST_ANSWER: (FaultKind.DROP_ANSWER,),
}
_CORRUPT_ANYWHERE = (FaultKind.HEADER_BIT,)
_CORRUPT_BETWEEN = (FaultKind.HEADER_BIT, FaultKind.PAYLOAD_BIT, FaultKind.SWAP_BLOCKS)
"""Between stages there is an activation to damage."""


@dataclass(slots=True)
class WireFaults:
    """Belongs to one event loop. Each act says whether it happened, and how that is known."""

    wires: Wires
    hold_s: float

    async def frames(self, injection: Injection) -> tuple[bool, str]:
        """Single frames of one hop."""
        proxy, armed, _name = self.wires.hop(injection.place)
        fault = Fault(self._kind(injection))
        before = len(proxy.fired)
        armed.waiting += [fault] * injection.frames

        async def look() -> bool:
            return sum(one.fault == fault for one in proxy.fired[before:]) >= injection.frames

        await until(look, FIRE_S_MAX)
        steps = [one.step for one in proxy.fired[before:] if one.fault == fault]
        missing = injection.frames - len(steps)
        for _ in range(min(missing, armed.waiting.count(fault))):
            armed.waiting.remove(fault)
        return bool(steps), f"{fault} at steps {steps[:8]}"

    def _kind(self, injection: Injection) -> FaultKind:
        kinds = _KINDS.get(injection.fault)
        if kinds is None:
            between = 0 < injection.place < self.wires.stages
            kinds = _CORRUPT_BETWEEN if between else _CORRUPT_ANYWHERE
        return kinds[injection.variant % len(kinds)]

    async def reset_connections(self, injection: Injection) -> tuple[bool, str]:
        """RST to both ends of a worker's connections."""
        wire, name = self._wire(injection)
        before = wire.resets
        wire.reset()
        return wire.resets > before, f"{wire.resets - before} {name} connections reset"

    async def half_open(self, injection: Injection) -> tuple[bool, str]:
        """The worker's end is closed and the dialler is not told."""
        wire, name = self._wire(injection)
        before, swallowed = wire.half_opened, wire.swallowed
        wire.half_open()

        async def look() -> bool:
            return wire.swallowed > swallowed

        await until(look, self.hold_s)
        count, size = wire.half_opened - before, wire.swallowed - swallowed
        return count > 0, f"{count} {name} connections half-open, {size} bytes"

    async def slow_reader(self, injection: Injection) -> tuple[bool, str]:
        """The worker takes only so many bytes a second."""
        wire = self._victim(injection).data
        before = wire.slowed(Direction.FORWARD)
        wire.slow_down(Direction.FORWARD, SLOW_BYTES_PER_S)

        async def look() -> bool:
            return wire.slowed(Direction.FORWARD) > before

        try:
            await asyncio.sleep(self.hold_s)
            await until(look, FIRE_S_MAX)  # nothing may have come by yet
        finally:
            wire.heal()
        slowed = wire.slowed(Direction.FORWARD) - before
        return slowed > 0, f"{slowed} bytes at {SLOW_BYTES_PER_S:.0f} a second"

    async def client_cut(self, _injection: Injection) -> tuple[bool, str]:
        """Every client's connection breaks."""
        wire = self.wires.from_clients
        before = wire.resets
        wire.reset()
        count = wire.resets - before
        return count > 0, f"{count} client connections reset"

    def _victim(self, injection: Injection) -> WorkerWires:
        return self.wires.of[self.wires.workers[injection.place]]

    def _wire(self, injection: Injection) -> tuple[ConnectionProxy, str]:
        victim = self._victim(injection)
        if injection.variant % 3 == 0:
            return victim.control, f"{victim.name} control"
        return victim.data, f"{victim.name} data"
