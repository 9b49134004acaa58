"""Carries a schedule out on real processes and wires, and proves of each fault that it happened.

Frame faults wait for a frame to come by; others happen at once. Faults that may close a route come
one at a time and only into a mesh that is whole, so that each recovery is seen on its own; those on
frames go on beside them, one at a time on each hop. After each fault the mesh's counters and events
are watched for its answer (``paths``).
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from services.client import ConnectionLost
from services.fault_connection import Direction
from services.local_mesh import COORDINATOR
from services.stress import paths
from services.stress.history import Mark
from services.stress.network import Network
from services.stress.paths import Where
from services.stress.plan import DISRUPTIVE, FRAME_FAULTS, FaultName, Plan
from services.stress.schedule import Injection
from services.stress.watch import Watch, until
from services.stress.wire_faults import Done, WireFaults
from services.stress.wires import Wires
from services.supervisor import Child
from services.up import LocalMesh, is_whole
from stagemesh.errors import MeshError

PATH_S_MAX = 90.0
"""How long the mesh is given to answer a fault in a way that can be seen. On a machine that is busy
with other things a coordinator alone takes half a minute to start."""
WHOLE_S_MAX = 90.0
"""A mesh that is not whole again after this has not recovered."""
END_S_MAX = 20.0
HOLDS_MAX = 5.0
"""A fault that lasts goes on until the mesh notices, for at most so many times ``hold_s``: a busy
machine's detectors allow for slow steps."""
SWIZZLE_GAP_S = 0.3


@dataclass(slots=True)
class Injector:
    """See the module. Belongs to one event loop."""

    mesh: LocalMesh
    network: Network
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
    _hops: defaultdict[int, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))
    """One fault on frames at a time on each hop, so that each is seen to be answered."""

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
            return
        async with self._hops[injection.place]:
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
        stages = set(self.network.pipeline)
        everyone = set(self.network.workers)

        async def look() -> bool:
            try:
                return is_whole(await self.mesh.status(), stages, everyone)
            except (ConnectionLost, MeshError):
                return False

        return await until(look, WHOLE_S_MAX)

    async def _one(self, injection: Injection) -> None:
        before, began = self.watch.reading(), self.clock()
        try:
            fired, evidence, epochs = await self._act(injection, before)
        except (OSError, TimeoutError, psutil.Error) as error:
            fired, evidence, epochs = False, f"{type(error).__name__}: {error}", ()
        ended = self.clock()
        where = dataclasses.replace(self.where(injection), epochs=epochs)
        path = await self._answered(injection.fault, where, before) if fired else ""
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

    async def _act(self, injection: Injection, before: dict[str, int]) -> Done:
        act = _ACTS.get(injection.fault)
        if act is not None:
            return await act(self, injection)
        if isinstance(self.network, Wires):
            fault, where = injection.fault, self.where(injection)

            def noticed() -> bool:
                return bool(paths.taken(fault, where, before, self.watch.reading()))

            faults = WireFaults(self.network, self.plan.hold_s, noticed)
            return await _WIRE_ACTS[fault](faults, injection)
        return Done(False, "not on this network")

    async def _answered(self, fault: FaultName, where: Where, before: dict[str, int]) -> str:
        found: list[str] = []

        async def look() -> bool:
            found[:] = [paths.taken(fault, where, before, self.watch.reading())]
            return bool(found[0])

        await until(look, PATH_S_MAX)
        return found[0]

    def _place(self, injection: Injection) -> str:
        if isinstance(self.network, Wires) and injection.fault in FRAME_FAULTS:
            return self.network.hop(injection.place)[2]
        if injection.fault is FaultName.COORDINATOR_KILL:
            return COORDINATOR
        if injection.fault is FaultName.CLIENT_CUT:
            return "clients"
        if injection.fault is FaultName.SWIZZLE_CLOG:
            return ", ".join(self.network.pipeline[at] for at in injection.order[0])
        return self.victim(injection)

    def where(self, injection: Injection) -> Where:
        """Where its answer has to be seen."""
        pipeline = self.network.pipeline
        if injection.fault is FaultName.SWIZZLE_CLOG:
            return Where(tuple(pipeline[at] for at in injection.order[0]))
        ends = (COORDINATOR, *self.network.workers)
        is_back = injection.fault in FRAME_FAULTS and injection.place >= len(pipeline)
        receiver = COORDINATOR if is_back else ends[injection.place + 1]
        return Where((receiver,), ends[injection.place], times=injection.frames)

    def victim(self, injection: Injection) -> str:
        """The worker that it happens to."""
        return self.network.workers[injection.place]

    async def _last(self, injection: Injection) -> None:
        """While something stands still: ``hold_s``, and on until the mesh has noticed."""
        before, where = self.watch.reading(), self.where(injection)
        await asyncio.sleep(self.plan.hold_s)

        async def look() -> bool:
            return bool(paths.taken(injection.fault, where, before, self.watch.reading()))

        await until(look, self.plan.hold_s * (HOLDS_MAX - 1.0))

    # -- the network -------------------------------------------------------------------------------

    async def black_hole(self, injection: Injection) -> Done:
        """Nothing reaches the worker, or nothing that it says arrives."""
        victim = self.victim(injection)
        inbound = injection.variant % 2 == 0
        before = self.network.held(victim)
        self.network.hold(victim, Direction.FORWARD if inbound else Direction.BACK)
        try:
            await self._last(injection)
        finally:
            self.network.release(victim)
        held = self.network.held(victim) - before
        side = "to" if inbound else "of"
        return Done(held > 0, f"{held} bytes {side} {victim} held back")

    async def swizzle_clog(self, injection: Injection) -> Done:
        """Wires stop one by one, and come back in another order."""
        stop, back = injection.order
        chosen = [self.network.pipeline[at] for at in stop]
        before = [self.network.held(one) for one in chosen]
        try:
            for one in chosen:
                self.network.hold(one, *Direction)
                await asyncio.sleep(SWIZZLE_GAP_S)
            await self._last(injection)
        finally:
            for at in back:
                self.network.release(self.network.pipeline[at])
                await asyncio.sleep(SWIZZLE_GAP_S)
        held = [self.network.held(one) - was for one, was in zip(chosen, before, strict=True)]
        evidence = ", ".join(f"{one} {size}" for one, size in zip(chosen, held, strict=True))
        return Done(all(held), f"bytes held back: {evidence}")

    # -- processes ---------------------------------------------------------------------------------

    async def _kill(self, name: str) -> Done:
        """SIGKILL, and wait until the supervisor has put another process in its place."""
        child = self.mesh.supervisor.children[name]
        pid, restarts = child.pid, child.restarts
        child.deaths = 0  # this death is not the process's fault: no longer pause than the first
        if not pid:
            return Done(False, f"{name} was not running")
        os.kill(pid, signal.SIGKILL)

        async def look() -> bool:
            return child.restarts > restarts and child.pid > 0

        came = await until(look, END_S_MAX)
        status = child.status
        evidence = f"exit status {status}; pid {pid} became {child.pid}"
        return Done(status == -signal.SIGKILL and came, evidence)

    async def sigkill(self, injection: Injection) -> Done:
        """A worker dies."""
        return await self._kill(self.victim(injection))

    async def coordinator_kill(self, _injection: Injection) -> Done:
        """The coordinator dies; its journal stays."""
        done = await self._kill(COORDINATOR)
        self.restarts.append(self.clock())
        return done

    async def sigstop(self, injection: Injection) -> Done:
        """A worker stands still for a while."""
        child = self.mesh.supervisor.children[self.victim(injection)]
        process = psutil.Process(child.pid)
        os.kill(child.pid, signal.SIGSTOP)
        try:

            async def look() -> bool:
                return process.status() == psutil.STATUS_STOPPED

            stopped = await until(look, END_S_MAX)
            began = self.clock()
            await self._last(injection)
            stood_s = self.clock() - began
        finally:
            os.kill(process.pid, signal.SIGCONT)
        return Done(stopped, f"pid {process.pid} stood still for {stood_s:.1f} s")

    async def other_weights(self, injection: Injection) -> Done:
        """The stage comes back as another model's; once that was noticed, as itself."""
        name = self.victim(injection)
        child = self.mesh.supervisor.children[name]
        proper = child.spec
        before = self.watch.reading()
        child.spec = dataclasses.replace(
            proper, arguments=(*proper.arguments, "--model", str(self.other_model))
        )
        try:
            done = await self._kill(name)
            fault, where = injection.fault, self.where(injection)

            async def look() -> bool:
                seen = paths.taken(fault, where, before, self.watch.reading())
                return bool(seen) or self._gone(child)

            noticed = await until(look, WHOLE_S_MAX)
        finally:
            child.spec = proper
        await self._kill(name)
        return Done(done.fired and noticed, done.evidence)

    @staticmethod
    def _gone(child: Child) -> bool:
        """The stranger went by itself; the supervisor will start it again."""
        return child.state == "left"


_Act = Callable[[Injector, Injection], Awaitable[Done]]
_WireAct = Callable[[WireFaults, Injection], Awaitable[Done]]
_ACTS: dict[FaultName, _Act] = {
    FaultName.BLACK_HOLE: Injector.black_hole,
    FaultName.SWIZZLE_CLOG: Injector.swizzle_clog,
    FaultName.SIGKILL: Injector.sigkill,
    FaultName.SIGSTOP: Injector.sigstop,
    FaultName.OTHER_WEIGHTS: Injector.other_weights,
    FaultName.COORDINATOR_KILL: Injector.coordinator_kill,
}
_WIRE_ACTS: dict[FaultName, _WireAct] = {
    FaultName.RESET: WireFaults.reset_connections,
    FaultName.HALF_OPEN: WireFaults.half_open,
    FaultName.SLOW_READER: WireFaults.slow_reader,
    FaultName.CLIENT_CUT: WireFaults.client_cut,
    **dict.fromkeys(FRAME_FAULTS, WireFaults.frames),
}
WITHOUT_PROXIES = frozenset(_ACTS)
"""What can happen on any network."""
