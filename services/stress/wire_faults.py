"""What can be done to single frames and connections where proxies carry them.

An act has *fired* if all of what was wanted has happened: every frame met its fault, bytes went
into the connection that is half open, bytes were slowed down. Where there is nothing yet that it
could happen to (no frame, no connection), it waits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from services.fault_connection import ConnectionProxy, Direction
from services.fault_damage import Fault, FaultKind, Fired
from services.stress.plan import FaultName
from services.stress.schedule import Injection
from services.stress.watch import until
from services.stress.wires import Wires, WorkerWires

FIRE_S_MAX = 120.0
"""How long a frame fault waits for a frame: the pipeline may be away for a while."""
SLOW_BYTES_PER_S = 4000.0
SLOW_BYTES_PER_S_MIN = 250.0
"""A worker that takes so little is noticed: a frame takes longer than any timer of a hop."""
SLOWER = 4.0

_KINDS: dict[FaultName, tuple[FaultKind, ...]] = {
    FaultName.DROP: (FaultKind.DROP,),
    FaultName.DELAY: (FaultKind.DELAY,),
    FaultName.DUPLICATE: (FaultKind.DUPLICATE,),
    FaultName.REORDER: (FaultKind.REORDER,),
    FaultName.TRUNCATE: (FaultKind.TRUNCATE,),
    FaultName.GARBAGE: (FaultKind.GARBAGE,),
    FaultName.STALE: (FaultKind.OLD_EPOCH,),
    FaultName.LOST_ANSWER: (FaultKind.LOSE_ANSWERS,),
}
_CORRUPT_ANYWHERE = (FaultKind.HEADER_BIT,)
_CORRUPT_BETWEEN = (FaultKind.HEADER_BIT, FaultKind.PAYLOAD_BIT, FaultKind.SWAP_BLOCKS)
"""Between stages there is an activation to damage."""


class Done(NamedTuple):
    """How an act went. ``epochs``: of the frames that it met."""

    fired: bool
    evidence: str
    epochs: tuple[int, ...] = ()


@dataclass(slots=True)
class WireFaults:
    """Belongs to one event loop. ``noticed``: the mesh has been seen to answer the fault."""

    wires: Wires
    hold_s: float
    noticed: Callable[[], bool]

    async def frames(self, injection: Injection) -> Done:
        """Single frames of one hop."""
        proxy, armed, _name = self.wires.hop(injection.place)
        fault = Fault(self._kind(injection))
        before = len(proxy.fired)
        armed.waiting += [fault] * injection.frames

        def met() -> list[Fired]:
            return [one for one in proxy.fired[before:] if one.fault == fault]

        async def look() -> bool:
            return len(met()) >= injection.frames

        await until(look, FIRE_S_MAX)
        steps, wanted = [one.step for one in met()], injection.frames
        for _ in range(min(wanted - len(steps), armed.waiting.count(fault))):
            armed.waiting.remove(fault)
        evidence = f"{fault} at steps {steps}"
        if len(steps) < wanted:
            evidence = f"{len(steps)} of {wanted} frames: {evidence}"
        return Done(len(steps) >= wanted, evidence, tuple({one.epoch for one in met()}))

    def _kind(self, injection: Injection) -> FaultKind:
        kinds = _KINDS.get(injection.fault)
        if kinds is None:
            between = 0 < injection.place < self.wires.stages
            kinds = _CORRUPT_BETWEEN if between else _CORRUPT_ANYWHERE
        return kinds[injection.variant % len(kinds)]

    async def reset_connections(self, injection: Injection) -> Done:
        """RST to both ends of a worker's connections."""
        wire, name = self._wire(injection)
        count = await self._reset(wire)
        return Done(count > 0, f"{count} {name} connections reset")

    async def half_open(self, injection: Injection) -> Done:
        """The worker's end is closed and the dialler is not told. Happens once the dialler has sent
        something there."""
        wire, name = self._wire(injection)
        await self._connected(wire)
        before = wire.half_opened
        swallowed = wire.half_open()

        async def look() -> bool:
            return swallowed() > 0

        await until(look, FIRE_S_MAX)
        count, size = wire.half_opened - before, swallowed()
        return Done(count > 0 and size > 0, f"{count} {name} connections half-open, {size} bytes")

    async def slow_reader(self, injection: Injection) -> Done:
        """The worker takes only so many bytes a second, and less and less until it is noticed."""
        wire, rate = self._victim(injection).data, SLOW_BYTES_PER_S
        before = wire.slowed(Direction.FORWARD)

        async def slowed() -> bool:
            return wire.slowed(Direction.FORWARD) > before

        async def noticed() -> bool:
            return self.noticed()

        try:
            wire.slow_down(Direction.FORWARD, rate)
            await until(slowed, FIRE_S_MAX)  # nothing may have come by yet
            while not await until(noticed, self.hold_s) and rate > SLOW_BYTES_PER_S_MIN:
                rate = max(SLOW_BYTES_PER_S_MIN, rate / SLOWER)
                wire.slow_down(Direction.FORWARD, rate)
        finally:
            wire.heal()
        size = wire.slowed(Direction.FORWARD) - before
        return Done(size > 0, f"{size} bytes slowed down, to {rate:.0f} a second in the end")

    async def client_cut(self, _injection: Injection) -> Done:
        """Every client's connection breaks."""
        count = await self._reset(self.wires.from_clients)
        return Done(count > 0, f"{count} client connections reset")

    async def _reset(self, wire: ConnectionProxy) -> int:
        await self._connected(wire)
        before = wire.resets
        wire.reset()
        return wire.resets - before

    @staticmethod
    async def _connected(wire: ConnectionProxy) -> None:
        async def look() -> bool:
            return wire.connections > 0

        await until(look, FIRE_S_MAX)

    def _victim(self, injection: Injection) -> WorkerWires:
        return self.wires.of[self.wires.workers[injection.place]]

    def _wire(self, injection: Injection) -> tuple[ConnectionProxy, str]:
        victim = self._victim(injection)
        if injection.variant % 3 == 0:
            return victim.control, f"{victim.name} control"
        return victim.data, f"{victim.name} data"
