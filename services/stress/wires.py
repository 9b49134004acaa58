"""Every wire of a local mesh through a proxy of this process.

    coordinator ──▶ [connection]─[frames] ──▶ stage-0 ──▶ [connection]─[frames] ──▶ stage-1 … ─┐
         ▲                                                                                     │
         └──────────────────────────────[frames]◀──────────────────────────────────────────────┘
    every worker ──▶ [connection] ──▶ coordinator          (its control stream)
    every client ──▶ [connection] ──▶ coordinator

The mesh knows nothing of it but addresses: ``rewired`` adds them to the flags its processes are
started with. The proxies have no remote control.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from services.credentials import TlsFiles
from services.fault_connection import ConnectionProxy, Direction
from services.fault_damage import Fault
from services.fault_proxy import FrameProxy
from services.local_mesh import COORDINATOR, FULL_WORKER, ProcessSpec, free_port
from services.stress.plan import FaultName
from services.stress.verdict import Tally

NOWHERE = "127.0.0.1:1"


@dataclass(slots=True)
class ArmedFaults:
    """A plan for one frame proxy: the next frames meet what is waiting, each fault once.

    A fault waits until a frame comes by that it can happen to; the proxy's record says whether it
    has fired.
    """

    proxy: FrameProxy
    waiting: list[Fault] = field(default_factory=list)
    seen: int = 0

    def pick(self, step: int, copy: int) -> Fault | None:
        """The next fault, until the proxy says that it has happened."""
        del step, copy
        for _ in range(min(len(self.waiting), len(self.proxy.fired) - self.seen)):
            self.waiting.pop(0)
        self.seen = len(self.proxy.fired)
        return self.waiting[0] if self.waiting else None

    @property
    def left(self) -> int:
        """Faults that have not happened yet."""
        return len(self.waiting) - min(len(self.waiting), len(self.proxy.fired) - self.seen)


@dataclass(slots=True)
class WorkerWires:
    """One worker's. ``listen``: where the process itself listens, behind its proxies."""

    name: str
    control: ConnectionProxy
    data: ConnectionProxy
    frames: FrameProxy
    armed: ArmedFaults
    listen: str = ""

    @classmethod
    def of(cls, name: str) -> WorkerWires:
        """Not started yet."""
        frames = FrameProxy(NOWHERE)
        armed = ArmedFaults(frames)
        frames.plan = armed
        return cls(name, ConnectionProxy(NOWHERE), ConnectionProxy(NOWHERE), frames, armed)

    async def start(self, coordinator: str) -> None:
        """Listen everywhere."""
        self.listen = f"127.0.0.1:{free_port()}"
        self.frames.target = self.listen
        self.data.target = await self.frames.start()
        self.control.target = coordinator
        await self.data.start()
        await self.control.start()

    async def stop(self) -> None:
        """Close everything."""
        await asyncio.gather(self.frames.stop(), self.data.stop(), self.control.stop())


class Wires:
    """All of them: a ``Network`` that can do every fault. Belongs to one event loop."""

    faults = frozenset(FaultName)
    is_remote = False

    def __init__(self, stages: int) -> None:
        self.stages = stages
        self.coordinator = f"127.0.0.1:{free_port()}"
        self.pipeline = tuple(f"stage-{index}" for index in range(stages))
        self.workers = (*self.pipeline, FULL_WORKER)
        self.of = {name: WorkerWires.of(name) for name in self.workers}
        self.returned = FrameProxy(self.coordinator)
        self.returned_armed = ArmedFaults(self.returned)
        self.returned.plan = self.returned_armed
        self.from_clients = ConnectionProxy(self.coordinator)

    @property
    def clients(self) -> str:
        """What clients dial."""
        return self.from_clients.address

    async def start(self) -> None:
        """Listen everywhere."""
        await asyncio.gather(*(one.start(self.coordinator) for one in self.of.values()))
        await self.returned.start()
        await self.from_clients.start()

    async def stop(self) -> None:
        """Close everything."""
        stops = (one.stop() for one in self.of.values())
        await asyncio.gather(*stops, self.returned.stop(), self.from_clients.stop())

    def tls(self, role: str) -> TlsFiles | None:
        """Loopback speaks plain text."""
        del role
        return None

    def hold(self, worker: str, *ways: Direction) -> None:
        """Carry nothing more to (forward) or of (back) this worker. It dials its control stream
        itself, so that there the directions are the other way round."""
        wires = self.of[worker]
        for way in ways:
            wires.data.black_hole(way)
            wires.control.black_hole(way.opposite)

    def release(self, worker: str) -> None:
        """Carry everything again, what was held first."""
        self.of[worker].data.heal()
        self.of[worker].control.heal()

    def held(self, worker: str) -> int:
        """Bytes that met a black hole so far."""
        both = (self.of[worker].data, self.of[worker].control)
        return sum(wire.held(way) for wire in both for way in Direction)

    def counts(self) -> dict[str, int]:
        """Proxies on loopback have nothing of their own to tell."""
        return {}

    def judge(self, tally: Tally) -> None:
        """Nor anything that has to happen by itself."""

    def rewired(self, specs: Sequence[ProcessSpec]) -> tuple[ProcessSpec, ...]:
        """The same processes, told the proxies' addresses. The last flag of a name counts."""
        return tuple(self._rewired(spec) for spec in specs)

    def _rewired(self, spec: ProcessSpec) -> ProcessSpec:
        if spec.name == COORDINATOR:
            more: tuple[str, ...] = ("--advertise", self.returned.address)
        else:
            wires = self.of[spec.name]
            more = ("--listen", wires.listen, "--advertise", wires.data.address)
            more += ("--coordinator", wires.control.address)
        return replace(spec, arguments=(*spec.arguments, *more))

    def hop(self, number: int) -> tuple[FrameProxy, ArmedFaults, str]:
        """The proxy of a hop: 0 is into the first stage, ``stages`` is back to the coordinator."""
        if number >= self.stages:
            return self.returned, self.returned_armed, f"{self.pipeline[-1]} → coordinator"
        before = self.pipeline[number - 1] if number else "coordinator"
        wires = self.of[self.pipeline[number]]
        return wires.frames, wires.armed, f"{before} → {wires.name}"

    def connections(self) -> Iterator[ConnectionProxy]:
        """Every connection proxy."""
        for one in self.of.values():
            yield one.data
            yield one.control
        yield self.from_clients

    def heal(self) -> None:
        """Carry everything again, and forget what has not happened yet."""
        for proxy in self.connections():
            proxy.heal()
        for one in self.of.values():
            one.armed.waiting.clear()
        self.returned_armed.waiting.clear()
