"""Carries a schedule out on real processes and wires, and proves of each fault that it happened.

Frame faults wait for a frame to come by; others happen at once. Faults that may close a route come
one at a time and only into a mesh that is whole, so that each recovery is seen on its own; those on
frames go on beside them. After each fault the mesh's counters and events are watched for its answer
(``paths``).
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from services.client import ConnectionLost
from services.fault_connection import ConnectionProxy, Direction
from services.fault_damage import Fault, FaultKind
from services.local_mesh import COORDINATOR, FULL_WORKER
from services.stress import paths
from services.stress.history import Mark
from services.stress.plan import DISRUPTIVE, FRAME_FAULTS, FaultName, Plan
from services.stress.schedule import Injection
from services.stress.watch import Watch
from services.stress.wires import Wires, WorkerWires
from services.supervisor import Child
from services.up import LocalMesh, is_whole
from stagemesh.errors import MeshError

POLL_S = 0.05
FIRE_S_MAX = 120.0
"""How long a frame fault waits for a frame: the pipeline may be away for a while."""
PATH_S_MAX = 20.0
"""How long the mesh is given to answer a fault in a way that can be seen."""
WHOLE_S_MAX = 90.0
"""A mesh that is not whole again after this has not recovered."""
END_S_MAX = 20.0
HOLDS_MAX = 5.0
"""A fault that lasts goes on until the mesh notices, for at most so many times ``hold_s``: a busy
machine's detectors allow for slow steps."""
SLOW_BYTES_PER_S = 4000.0
SWIZZLE_GAP_S = 0.3

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
class Injector:
    """See the module. Belongs to one event loop."""

    mesh: LocalMesh
    wires: Wires
    watch: Watch
    plan: Plan
    clock: Callable[[], float]
    other_model: Path
    """The same model with other weights."""
    marks: list[Mark] = field(default_factory=list)
    restarts: list[float] = field(default_factory=list)
    """When the coordinator was killed."""
    unrecovered: list[str] = field(default_factory=list)
    """Faults after which the mesh did not become whole again."""
    _calm: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def run(self, injections: Sequence[Injection]) -> None:
        """All of them, each no earlier than it is due; ends once the last one has ended."""
        async with asyncio.TaskGroup() as group:
            for injection in injections:
                await asyncio.sleep(max(0.0, injection.at_s - self.clock()))
                group.create_task(self._in_turn(injection))

    async def _in_turn(self, injection: Injection) -> None:
        if injection.fault in DISRUPTIVE:
            await self._alone(injection)
            return
        if injection.fault not in FRAME_FAULTS:
            await self.whole()  # else there might be no connection that it could happen to
        await self._one(injection)

    async def _alone(self, injection: Injection) -> None:
        async with self._calm:
            if not await self.whole():
                self.unrecovered.append(f"not whole before {injection}")
            await self._one(injection)
            if not await self.whole():
                self.unrecovered.append(f"not whole {WHOLE_S_MAX:.0f} s after {injection}")

    async def whole(self) -> bool:
        """Wait until every worker is there and the pipeline serves; False if not in time."""
        stages = set(self.wires.pipeline)
        everyone = set(self.wires.workers)

        async def look() -> bool:
            try:
                return is_whole(await self.mesh.status(), stages, everyone)
            except (ConnectionLost, MeshError):
                return False

        return await self._until(look, WHOLE_S_MAX)

    async def _one(self, injection: Injection) -> None:
        before, began = self.watch.reading(), self.clock()
        fired, evidence = False, ""
        try:
            fired, evidence = await _ACTS[injection.fault](self, injection)
        except (OSError, TimeoutError, psutil.Error) as error:
            evidence = f"{type(error).__name__}: {error}"
        ended = self.clock()
        path = await self._answered(injection.fault, before) if fired else ""
        self.marks.append(
            Mark(
                number=injection.number,
                fault=injection.fault.value,
                place=self._place(injection),
                due_at=injection.at_s,
                at=began,
                ended_at=ended,
                fired=fired,
                evidence=evidence,
                path=path,
            )
        )

    async def _answered(self, fault: FaultName, before: dict[str, int]) -> str:
        found: list[str] = []

        async def look() -> bool:
            found[:] = [paths.taken(fault, before, self.watch.reading())]
            return bool(found[0])

        await self._until(look, PATH_S_MAX)
        return found[0]

    def _place(self, injection: Injection) -> str:
        if injection.fault in FRAME_FAULTS:
            return self.wires.hop(injection.place)[2]
        if injection.fault is FaultName.COORDINATOR_KILL:
            return COORDINATOR
        if injection.fault is FaultName.CLIENT_CUT:
            return "clients"
        if injection.fault is FaultName.SWIZZLE_CLOG:
            return ", ".join(self.wires.pipeline[at] for at in injection.order[0])
        return self._victim(injection).name

    def _victim(self, injection: Injection) -> WorkerWires:
        if injection.place >= self.wires.stages:
            return self.wires.workers[FULL_WORKER]
        return self.wires.workers[self.wires.pipeline[injection.place]]

    @staticmethod
    async def _until(holds: Callable[[], Awaitable[bool]], limit_s: float) -> bool:
        try:
            async with asyncio.timeout(limit_s):
                while not await holds():
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            return False
        return True

    async def _last(self, fault: FaultName) -> None:
        """While something stands still: ``hold_s``, and on until the mesh has noticed."""
        before = self.watch.reading()
        await asyncio.sleep(self.plan.hold_s)

        async def look() -> bool:
            return bool(paths.taken(fault, before, self.watch.reading()))

        await self._until(look, self.plan.hold_s * (HOLDS_MAX - 1.0))

    async def _exceeds(self, number: Callable[[], int], before: int, limit_s: float) -> bool:
        async def look() -> bool:
            return number() > before

        return await self._until(look, limit_s)

    # -- frames ------------------------------------------------------------------------------------

    async def frames(self, injection: Injection) -> tuple[bool, str]:
        """Single frames of one hop."""
        proxy, armed, _name = self.wires.hop(injection.place)
        fault = Fault(self._kind(injection))
        before = len(proxy.fired)
        armed.waiting += [fault] * injection.frames

        async def look() -> bool:
            return sum(one.fault == fault for one in proxy.fired[before:]) >= injection.frames

        await self._until(look, FIRE_S_MAX)
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

    # -- connections -------------------------------------------------------------------------------

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
        await self._exceeds(lambda: wire.swallowed, swallowed, self.plan.hold_s)
        count = wire.half_opened - before
        return (
            count > 0,
            f"{count} {name} connections half-open, {wire.swallowed - swallowed} bytes",
        )

    def _wire(self, injection: Injection) -> tuple[ConnectionProxy, str]:
        victim = self._victim(injection)
        if injection.variant % 3 == 0:
            return victim.control, f"{victim.name} control"
        return victim.data, f"{victim.name} data"

    async def black_hole(self, injection: Injection) -> tuple[bool, str]:
        """Nothing reaches the worker, or nothing that it says arrives."""
        victim = self._victim(injection)
        inbound = injection.variant % 2 == 0
        data, control = (
            (Direction.FORWARD, Direction.BACK) if inbound else (Direction.BACK, Direction.FORWARD)
        )
        before = victim.data.held(data) + victim.control.held(control)
        victim.data.black_hole(data)
        victim.control.black_hole(control)
        try:
            await self._last(injection.fault)
        finally:
            victim.data.heal()
            victim.control.heal()
        held = victim.data.held(data) + victim.control.held(control) - before
        side = "to" if inbound else "of"
        return held > 0, f"{held} bytes {side} {victim.name} held back"

    async def slow_reader(self, injection: Injection) -> tuple[bool, str]:
        """The worker takes only so many bytes a second."""
        victim = self._victim(injection)
        before = victim.data.slowed(Direction.FORWARD)
        victim.data.slow_down(Direction.FORWARD, SLOW_BYTES_PER_S)
        try:
            await asyncio.sleep(self.plan.hold_s)
        finally:
            victim.data.heal()
        slowed = victim.data.slowed(Direction.FORWARD) - before
        return slowed > 0, f"{slowed} bytes at {SLOW_BYTES_PER_S:.0f} a second"

    async def swizzle_clog(self, injection: Injection) -> tuple[bool, str]:
        """Wires stop one by one, and come back in another order."""
        stop, back = injection.order
        chosen = [self.wires.workers[self.wires.pipeline[at]] for at in stop]
        ways = [
            (wire, way) for one in chosen for wire in (one.data, one.control) for way in Direction
        ]
        before = sum(wire.held(way) for wire, way in ways)
        try:
            for one in chosen:
                for wire in (one.data, one.control):
                    for way in Direction:
                        wire.black_hole(way)
                await asyncio.sleep(SWIZZLE_GAP_S)
            await self._last(injection.fault)
        finally:
            for at in back:
                one = self.wires.workers[self.wires.pipeline[at]]
                one.data.heal()
                one.control.heal()
                await asyncio.sleep(SWIZZLE_GAP_S)
        held = sum(wire.held(way) for wire, way in ways) - before
        return held > 0, f"{held} bytes of {len(chosen)} workers held back"

    async def client_cut(self, _injection: Injection) -> tuple[bool, str]:
        """Every client's connection breaks."""
        before = self.wires.clients.resets
        self.wires.clients.reset()
        count = self.wires.clients.resets - before
        return count > 0, f"{count} client connections reset"

    # -- processes ---------------------------------------------------------------------------------

    async def _kill(self, name: str) -> tuple[bool, str]:
        """SIGKILL, and wait until the supervisor has put another process in its place."""
        child = self.mesh.supervisor.children[name]
        pid, restarts = child.pid, child.restarts
        child.deaths = 0  # this death is not the process's fault: no longer pause than the first
        if not pid:
            return False, f"{name} was not running"
        os.kill(pid, signal.SIGKILL)

        async def look() -> bool:
            return child.restarts > restarts and child.pid > 0

        came = await self._until(look, END_S_MAX)
        status = child.status
        evidence = f"exit status {status}; pid {pid} became {child.pid}"
        return status == -signal.SIGKILL and came, evidence

    async def sigkill(self, injection: Injection) -> tuple[bool, str]:
        """A worker dies."""
        return await self._kill(self._victim(injection).name)

    async def coordinator_kill(self, _injection: Injection) -> tuple[bool, str]:
        """The coordinator dies; its journal stays."""
        fired, evidence = await self._kill(COORDINATOR)
        self.restarts.append(self.clock())
        return fired, evidence

    async def sigstop(self, injection: Injection) -> tuple[bool, str]:
        """A worker stands still for a while."""
        child = self.mesh.supervisor.children[self._victim(injection).name]
        process = psutil.Process(child.pid)
        os.kill(child.pid, signal.SIGSTOP)
        try:

            async def look() -> bool:
                return process.status() == psutil.STATUS_STOPPED

            stopped = await self._until(look, END_S_MAX)
            began = self.clock()
            await self._last(injection.fault)
            stood_s = self.clock() - began
        finally:
            os.kill(process.pid, signal.SIGCONT)
        return stopped, f"pid {process.pid} stood still for {stood_s:.1f} s"

    async def other_weights(self, injection: Injection) -> tuple[bool, str]:
        """The stage comes back as another model's; once that was noticed, as itself."""
        name = self._victim(injection).name
        child = self.mesh.supervisor.children[name]
        proper = child.spec
        before = self.watch.reading()
        child.spec = dataclasses.replace(
            proper, arguments=(*proper.arguments, "--model", str(self.other_model))
        )
        try:
            fired, evidence = await self._kill(name)
            path = paths.PATHS[FaultName.OTHER_WEIGHTS][0]

            async def look() -> bool:
                return paths.growth(path, before, self.watch.reading()) > 0 or self._gone(child)

            noticed = await self._until(look, WHOLE_S_MAX)
        finally:
            child.spec = proper
        await self._kill(name)
        return fired and noticed, evidence

    @staticmethod
    def _gone(child: Child) -> bool:
        """The stranger went by itself; the supervisor will start it again."""
        return child.state == "left"


_Act = Callable[[Injector, Injection], Awaitable[tuple[bool, str]]]
_ACTS: dict[FaultName, _Act] = {
    FaultName.RESET: Injector.reset_connections,
    FaultName.HALF_OPEN: Injector.half_open,
    FaultName.BLACK_HOLE: Injector.black_hole,
    FaultName.SLOW_READER: Injector.slow_reader,
    FaultName.SWIZZLE_CLOG: Injector.swizzle_clog,
    FaultName.CLIENT_CUT: Injector.client_cut,
    FaultName.SIGKILL: Injector.sigkill,
    FaultName.SIGSTOP: Injector.sigstop,
    FaultName.OTHER_WEIGHTS: Injector.other_weights,
    FaultName.COORDINATOR_KILL: Injector.coordinator_kill,
    **dict.fromkeys(FRAME_FAULTS, Injector.frames),
}
