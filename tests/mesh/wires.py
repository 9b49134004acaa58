"""A mesh of real processes in which every wire passes through a proxy of the test.

    coordinator ──▶ [connection]─[frames] ──▶ stage-0 ──▶ [connection]─[frames] ──▶ stage-1 … ─┐
         ▲                                                                                     │
         └──────────────────────────────[frames]◀──────────────────────────────────────────────┘
    every worker ──▶ [connection] ──▶ coordinator          (its control stream)

The proxies run in this process; the mesh knows nothing of them but addresses it was started with.
One worker process has its own three proxies, so that a fault meets it alone and its replacement can
be started, loaded and *frozen* beforehand: it comes in at the moment it is admitted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import psutil

from services.channel import open_channel
from services.fault_connection import ConnectionProxy, Direction
from services.fault_proxy import FrameProxy
from services.rpc_errors import to_mesh_error
from stagemesh.v1 import admin_service_pb2 as admin
from stagemesh.v1 import admin_service_pb2_grpc as admin_rpc
from stagemesh.v1 import generation_service_pb2_grpc as rpc
from stagemesh.v1 import topology_pb2
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
START_S_MAX = 180.0
END_S_MAX = 30.0
READY_S_MAX = 90.0
POLL_S = 0.02
OPEN = topology_pb2.ROUTE_STATE_OPEN
READY = topology_pb2.WORKER_STATE_READY
PIPELINE = ("stage-0", "stage-1", "stage-2")
FULL = "full"
NOWHERE = "127.0.0.1:1"
LOG_TAIL_CHARACTERS = 3000


async def spawn(log: Path, *arguments: str) -> asyncio.subprocess.Process:
    """``stagemesh …`` as a process of its own, logging to ``log``."""
    with log.open("ab") as output:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services", *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
        )


class Worker:
    """One stage-worker process and its wires."""

    def __init__(self, name: str, span: str, directory: Path, number: int) -> None:
        self.name = name
        self.span = span
        self.log = directory / f"{name}.{number}.log"
        self.control = ConnectionProxy(NOWHERE)
        self.data = ConnectionProxy(NOWHERE)
        self.frames = FrameProxy(NOWHERE)
        self.process: asyncio.subprocess.Process | None = None
        self._ready = directory / f"{name}.{number}.ready"

    @property
    def pid(self) -> int:
        return self.process.pid if self.process is not None else 0

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.returncode is None

    async def start(self, *flags: str) -> None:
        """Start the process and its proxies; returns at once. It cannot reach a coordinator yet."""
        control = await self.control.start()
        advertised = await self.data.start()
        self.data.target = await self.frames.start()
        self.frames.target = f"127.0.0.1:{free_port()}"
        own = ("--name", self.name, "--span", self.span, "--ready-file", str(self._ready))
        wires = ("--listen", self.frames.target, "--coordinator", control)
        wires += ("--advertise", advertised)
        self.process = await spawn(self.log, "stage-worker", *flags, *own, *wires)

    async def loaded(self) -> None:
        """Until it could serve."""
        async with asyncio.timeout(START_S_MAX):
            while not self._ready.exists():
                if not self.is_alive:
                    raise AssertionError(f"{self.name} did not start:\n{self.log.read_text()}")
                await asyncio.sleep(POLL_S)

    async def freeze(self) -> None:
        """Loaded, and stopped before it has ever reached a coordinator."""
        await self.loaded()
        self.signal(signal.SIGSTOP)

    def admit(self, coordinator: str) -> None:
        """Let it find the coordinator."""
        self.control.target = coordinator
        self.signal(signal.SIGCONT)

    def signal(self, number: signal.Signals) -> None:
        if self.is_alive and self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    def counts(self) -> Counter[str]:
        """What has happened on its wires so far; how much since is a difference."""
        found = Counter[str]()
        for wire, proxy in (("data", self.data), ("control", self.control)):
            found[f"{wire} accepted"] = proxy.accepted
            found[f"{wire} reset"] = proxy.resets
            found[f"{wire} half-opened"] = proxy.half_opened
            for direction in Direction:
                found[f"{wire} held {direction.value}"] = proxy.held(direction)
                found[f"{wire} slowed {direction.value}"] = proxy.slowed(direction)
        return found

    def status(self) -> str:
        """What the system says of the process, such as "stopped"."""
        try:
            return str(psutil.Process(self.pid).status())
        except psutil.NoSuchProcess:
            return "gone"

    async def ended(self) -> int:
        """Exit status, once it has ended."""
        if self.process is None:
            return 0
        async with asyncio.timeout(END_S_MAX):
            return await self.process.wait()

    async def discard(self) -> None:
        """End the process, if it lives, and its proxies."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGKILL)
        await self.ended()
        await asyncio.gather(self.frames.stop(), self.data.stop(), self.control.stop())


class WiredMesh:
    """Coordinator, three stages and a full worker, with replacements that wait. Belongs to one
    event loop."""

    def __init__(
        self, directory: Path, model: str, spans: tuple[str, str, str], *flags: str
    ) -> None:
        self.directory = directory
        self.model = model
        self.flags = flags
        self.spans = {**dict(zip(PIPELINE, spans, strict=True)), FULL: "all"}
        self.address = f"127.0.0.1:{free_port()}"
        self.workers: dict[str, Worker] = {}
        self.returned = FrameProxy(self.address)
        """The last hop: token frames of every route on their way to the coordinator."""
        self._coordinator: asyncio.subprocess.Process | None = None
        self._waiting: dict[str, asyncio.Task[Worker]] = {}
        self._discarding: set[asyncio.Task[None]] = set()
        self._number = 0

    @property
    def log(self) -> Path:
        return self.directory / "coordinator.log"

    async def start(self) -> None:
        """Until both routes are open."""
        self.directory.mkdir(parents=True, exist_ok=True)
        advertised = await self.returned.start()
        common = ("--model", self.model, "--deterministic", *self.flags)
        own = ("--listen", self.address, "--advertise", advertised)
        journal = ("--journal", str(self.directory / "journal.db"))
        self._coordinator = await spawn(self.log, "coordinator", *common, *own, *journal)
        self.channel = open_channel(self.address)
        self.admin = admin_rpc.AdminServiceStub(self.channel)
        self.generation = rpc.GenerationServiceStub(self.channel)
        for name in self.spans:
            self.expect(name)
        for name in self.spans:
            await self.replace(name)
        await self.ready()

    async def stop(self) -> None:
        """End every process and proxy."""
        for task in self._waiting.values():
            task.cancel()
        spares = await asyncio.gather(*self._waiting.values(), return_exceptions=True)
        frozen = [one for one in spares if isinstance(one, Worker)]
        for worker in (*self.workers.values(), *frozen):
            self._discard(worker)
        await asyncio.gather(*self._discarding, return_exceptions=True)
        await self.returned.stop()
        if self._coordinator is not None:
            if self._coordinator.returncode is None:
                self._coordinator.kill()
            await self._coordinator.wait()
            await self.channel.close()

    # -- workers ----------------------------------------------------------------------------

    def expect(self, name: str, *, model: str = "") -> None:
        """Have a replacement ready soon: loaded, and waiting to be admitted."""
        key = name + model
        if key not in self._waiting:
            self._waiting[key] = asyncio.create_task(self._prepare(name, model or self.model))

    async def _prepare(self, name: str, model: str) -> Worker:
        self._number += 1
        worker = Worker(name, self.spans[name], self.directory, self._number)
        try:
            await worker.start("--model", model, "--deterministic", "--drain-s", "10")
            await worker.freeze()
        except BaseException:
            await worker.discard()
            raise
        return worker

    async def spare(self, name: str, *, model: str = "") -> Worker:
        """The replacement, once it is loaded; it is still frozen."""
        self.expect(name, model=model)
        return await self._waiting.pop(name + model)

    async def spare_is_loaded(self, name: str, *, model: str = "") -> None:
        """Until the replacement could be admitted at once."""
        self.expect(name, model=model)
        await asyncio.wait({self._waiting[name + model]})

    async def replace(self, name: str) -> Worker:
        """Admit the replacement as the worker of this name."""
        worker = await self.spare(name)
        self.admit(worker)
        return worker

    def admit(self, worker: Worker) -> None:
        """It is the worker of its name from now on; the one before is gone, wires and all."""
        before = self.workers.pop(worker.name, None)
        if before is not None:
            self._discard(before)
        self.workers[worker.name] = worker
        worker.admit(self.address)

    def _discard(self, worker: Worker) -> None:
        task = asyncio.create_task(worker.discard())
        self._discarding.add(task)
        task.add_done_callback(self._discarding.discard)

    # -- looking ----------------------------------------------------------------------------

    async def status(self) -> admin.GetMeshResponse:
        return await self.admin.GetMesh(admin.GetMeshRequest(), timeout=5.0)

    async def generation_of(self, request_id: str) -> admin.Generation:
        asked = admin.GetGenerationRequest(request_id=request_id)
        return (await self.admin.GetGeneration(asked, timeout=5.0)).generation

    async def diagnostics(self) -> admin.GetDiagnosticsResponse:
        return await self.admin.GetDiagnostics(admin.GetDiagnosticsRequest(), timeout=5.0)

    async def fenced(self) -> int:
        """How often anybody refused something of an ended epoch so far."""
        seen = await self.diagnostics()
        counted = [seen.counters, *(one.counters for one in seen.workers)]
        return sum(count for one in counted for name, count in one.items() if "fenced" in name)

    async def ready(self, *routes: tuple[str, ...]) -> admin.GetMeshResponse:
        """Until exactly these routes (all by default) are open, and nothing runs."""
        wanted = sorted(routes or (PIPELINE, (FULL,)))

        def there(mesh: admin.GetMeshResponse) -> bool:
            found = sorted(tuple(one.workers) for one in mesh.routes)
            is_open = all(one.state == OPEN for one in mesh.routes)
            members = {one.worker.name: one for one in mesh.workers}
            healthy = all(members[name].state == READY for route in wanted for name in route)
            return found == wanted and is_open and healthy and not mesh.running

        return await self.until(there)

    async def until(
        self, holds: Callable[[admin.GetMeshResponse], bool], limit_s: float = READY_S_MAX
    ) -> admin.GetMeshResponse:
        """Poll the mesh until ``holds``."""
        deadline = time.monotonic() + limit_s
        seen: Any = "no answer"
        while time.monotonic() < deadline:
            try:
                seen = await self.status()
                if holds(seen):
                    return seen
            except grpc.RpcError as error:
                seen = to_mesh_error(error)
            except KeyError:
                pass
            await asyncio.sleep(POLL_S)
        raise AssertionError(f"the mesh did not get there: {seen}\n{self.logs()}")

    def logs(self) -> str:
        """The ends of all logs."""
        tails = [self.log, *(worker.log for worker in self.workers.values())]
        return "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-LOG_TAIL_CHARACTERS:]}"
            for path in tails
            if path.exists()
        )


async def within(limit_s: float, waiting: Awaitable[Any]) -> bool:
    """Whether it came in time."""
    try:
        await asyncio.wait_for(waiting, limit_s)
    except TimeoutError:
        return False
    return True


@contextlib.asynccontextmanager
async def wired_mesh(
    directory: Path, model: str, spans: tuple[str, str, str], *flags: str
) -> AsyncIterator[WiredMesh]:
    """One that runs, and is stopped with the block."""
    mesh = WiredMesh(directory, model, spans, *flags)
    try:
        await mesh.start()
        yield mesh
    finally:
        await mesh.stop()
