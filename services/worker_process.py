"""One stage worker: loads a span, serves its hop, stays registered, carries out commands, reports
progress.

The event loop does I/O, the compute thread (``StageRunner``) does everything that touches the
model: loading, probing, opening epochs, steps. Health is SERVING only once the weights are loaded
and the probe has run. Progress reports are read from the compute thread's numbers, so that a hung
forward shows as a step that has been computing for ever, and not as a green light.

The end comes in order: a worker that is asked to stop asks the coordinator to be drained, serves
what it has until it is told to leave (or its patience is over), and goes. If there is no
coordinator (any more), or the parent is gone, nobody needs it to wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from services import telemetry
from services.control_stream import ControlStream, Request
from services.lifecycle import StopSignal
from services.server import MeshServer
from services.span_host import Hosted, SpanHost
from services.stage_service import StageServicer, add_stage_servicer
from services.worker_codec import check_name, worker_to_proto
from services.worker_options import WorkerOptions
from services.worker_reports import WorkerReports
from services.worker_routes import HostedModel, WorkerRoutes
from stage_worker.runner import StageRunner
from stagemesh.errors import BarrierBroken, MeshError, ModelDamaged, StageError
from stagemesh.topology import WorkerInfo
from stagemesh.v1 import topology_pb2, worker_service_pb2

DRAINED_CHECK_S = 0.05
"""How often a leaving worker looks whether its last frames are acknowledged."""
LEAVE_S = 2.0
"""How long a worker that has drained waits for the coordinator to say so."""

_log = logging.getLogger(__name__)


class WorkerProcess:
    """See the module. Belongs to one event loop; ``run`` is its whole life."""

    def __init__(
        self,
        options: WorkerOptions,
        stop: StopSignal,
        *,
        environment: Mapping[str, str] | None = None,
        telemetry_of: telemetry.Telemetry | None = None,
        on_ready: Callable[[WorkerInfo], None] = lambda info: None,
    ) -> None:
        check_name(options.name)
        self._options = options
        self._host = SpanHost(options)
        self._stop = stop
        self._telemetry = telemetry_of
        self._environment = dict(environment or {})
        self._loop = asyncio.get_running_loop()
        self._on_ready = on_ready
        self._instance = uuid.uuid4().hex
        self._info: WorkerInfo | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._opening: asyncio.Task[None] | None = None
        self._reloading: asyncio.Task[None] | None = None
        self._usable = True
        """The model that was loaded last may serve."""
        self._leaving = asyncio.Event()
        self._last_barrier = ""
        """Of the rendezvous behind which this process ends."""
        observer = None if telemetry_of is None else telemetry_of.rpc
        self.server = MeshServer(options.server, observer=observer)
        self.servicer = StageServicer(on_fault=lambda fault: self.reports.fault_seen(fault))
        self.server.add(add_stage_servicer, self.servicer)
        self.runner = StageRunner(
            None,
            lambda frame, timing: self.routes.output(frame, timing),
            self._crashed,
        )
        self.reports = WorkerReports(self.runner, self.servicer.counters, telemetry_of=telemetry_of)
        self.routes = WorkerRoutes(
            self.runner,
            self.servicer,
            name=options.name,
            instance=self._instance,
            tls=options.tls,
            on_fault=self.reports.fault_seen,
            on_step=self.reports.step_done,
        )
        self.control = ControlStream(
            options.coordinator,
            describe=self._describe,
            on_command=self._command,
            on_welcome=self.reports.welcomed,
            on_lost=self._coordinator_lost,
            tls=options.tls,
        )
        self.reports.attach(self.routes, self.control)

    # -- life -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Load, register, serve, until ``stop`` is set. Raises ModelError kinds,
        InvalidConfiguration (cannot listen), EpochFenced (replaced by another process with this
        name)."""
        await self.server.start()
        self.runner.start()
        try:
            if not await self._load_unless_stopped():
                return
            self.server.set_serving(serving=True)
            if self._info is not None:
                self._on_ready(self._info)
            await self._serve()
        finally:
            await self._end()

    async def _load_unless_stopped(self) -> bool:
        """Load the model; False if the stop came first."""
        loading = asyncio.ensure_future(self._load())
        stopping = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not loading.done():
            loading.cancel()
            return False
        await loading
        return True

    async def _load(self) -> None:
        began = time.monotonic()
        stage = await asyncio.wrap_future(self.runner.install(self._host.load))
        self._info = self._info_of(stage)
        self.runner.cores = self._host.core_use(stage)
        if self._telemetry is not None:
            span = self._info.span
            self._telemetry.stage.describe(layer_first=span.first, layer_last=span.last)
        _log.info(
            "loaded layers %s of %d as %s in %.1f s: %.1f MiB, fingerprint %s",
            self._info.span,
            self._info.layer_count,
            self._info.dtype,
            time.monotonic() - began,
            self._info.memory_bytes / 2**20,
            self._info.fingerprint[:16],
        )

    def _info_of(self, stage: Hosted) -> WorkerInfo:
        address = self._options.advertise or self.server.address
        return self._host.info_of(stage, address=address, instance=self._instance)

    async def _serve(self) -> None:
        control = asyncio.ensure_future(self.control.run())
        reporting = asyncio.ensure_future(self.reports.run())
        stopping = asyncio.ensure_future(self._stop.wait())
        leaving = asyncio.ensure_future(self._leaving.wait())
        everything = {control, reporting, stopping, leaving}
        try:
            await asyncio.wait(everything, return_when=asyncio.FIRST_COMPLETED)
            for failed in (control, reporting):
                if failed.done():
                    failed.result()
            if not leaving.done():
                await self._ask_to_leave(leaving)
        finally:
            for task in everything:
                task.cancel()
            await asyncio.gather(*everything, return_exceptions=True)

    async def _ask_to_leave(self, leaving: asyncio.Future[Any]) -> None:
        """Have the coordinator move what runs here, unless there is none or nobody is left to
        care."""
        patience_s = self._options.drain_s
        leave = worker_service_pb2.Leave(timeout_ms=int(patience_s * 1000))
        if self._stop.orphaned or not self.control.send(Request(leave=leave)):
            return
        _log.info("stopping (%s): asking to be drained", self._stop.reason)
        await asyncio.wait({leaving}, timeout=patience_s)

    async def _end(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await self.routes.close()
        await self.server.drain(0)
        await asyncio.to_thread(self.runner.stop)

    # -- commands -------------------------------------------------------------------------------

    def _describe(self) -> topology_pb2.Worker:
        if self._info is None:
            raise StageError("no model is loaded")
        return worker_to_proto(self._info, self._environment)

    def _command(self, command: worker_service_pb2.ConnectResponse) -> None:
        kind = command.WhichOneof("message")
        if kind == "open_route":
            if self._opening is not None:
                self._opening.cancel()
            self._opening = self._spawn(self._open_route(command.open_route))
        elif kind == "fence":
            if self._opening is not None and self.routes.epoch <= command.fence.epoch:
                self._opening.cancel()
            self._fence(command.fence.epoch)
        elif kind == "drain":
            self._spawn(self._leave(command.drain))
        elif kind == "reinitialise":
            self._reload(command.reinitialise)
        elif kind == "barrier" and command.barrier.name == self._last_barrier:
            self._leaving.set()
        elif kind == "barrier" and not command.barrier.complete:
            _log.info(
                "barrier %s of epoch %d broke; absent: %s",
                command.barrier.name,
                command.barrier.epoch,
                ", ".join(command.barrier.absent) or "nobody",
            )

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("a command failed", exc_info=task.exception())

    async def _open_route(self, order: worker_service_pb2.OpenRoute) -> None:
        """Join, then arrive at the barrier; or say why not."""
        arrival = worker_service_pb2.BarrierArrival(
            name=order.barrier, epoch=order.epoch, generation=order.generation
        )
        try:
            async with asyncio.timeout(order.timeout_ms / 1000.0):
                if self._reloading is not None:
                    await asyncio.wait({self._reloading})
                facts = await self.routes.join(order, self._hosted_model())
        except TimeoutError:
            arrival.refusal = f"successor {order.successor_name} could not be reached in time"
        except MeshError as error:
            arrival.refusal = f"{error.reason}: {error}"
        else:
            arrival.facts.update(facts)
        if arrival.refusal:
            _log.warning("cannot join route epoch=%d: %s", order.epoch, arrival.refusal)
        self.control.send(Request(arrival=arrival))

    def _hosted_model(self) -> HostedModel:
        info = self._info
        if info is None or not self._usable or self.runner.crashed:
            raise StageError("no usable model is loaded", worker=self._options.name)
        return HostedModel(
            info.fingerprint, info.span_fingerprint, info.span, info.layer_count, info.dtype
        )

    async def _leave(self, order: worker_service_pb2.Drain) -> None:
        """Finish what is in flight, arrive at the drain barrier, then end this process."""
        runner, routes = self.runner, self.routes
        try:
            async with asyncio.timeout(max(order.timeout_ms / 1000.0, DRAINED_CHECK_S)):
                while runner.queued or runner.computing_step or routes.unacknowledged:
                    await asyncio.sleep(DRAINED_CHECK_S)
        except TimeoutError:
            _log.warning("leaving with work in flight: the time to drain is over")
        if order.barrier:
            self._last_barrier = order.barrier
            # On the compute thread, behind the freeing of every cache.
            held = await asyncio.wrap_future(runner.call(lambda: _positions_held(runner)))
            arrival = worker_service_pb2.BarrierArrival(
                name=order.barrier, epoch=order.epoch, generation=order.generation
            )
            in_flight = runner.queued + bool(runner.computing_step) + routes.unacknowledged
            arrival.facts.update({"in_flight": str(in_flight), "kv_tokens": str(held)})
            if self.control.send(Request(arrival=arrival)):
                await asyncio.wait({asyncio.ensure_future(self._leaving.wait())}, timeout=LEAVE_S)
        _log.info("drained")
        self._leaving.set()

    def _crashed(self, error: Exception) -> None:
        """On the compute thread: a step raised, and the stage takes no more. Report it, and
        reload."""
        with contextlib.suppress(RuntimeError):  # The loop is closed: the process is ending.
            self._loop.call_soon_threadsafe(self._recover, error)

    def _recover(self, error: Exception) -> None:
        if isinstance(error, BarrierBroken):
            self.servicer.counters.count("device_groups_broken")
        self.routes.report_crash(error)
        self._reload(
            worker_service_pb2.Reinitialise(reason=f"a step raised {type(error).__name__}")
        )

    def _reload(self, order: worker_service_pb2.Reinitialise) -> None:
        before = self._reloading
        self._reloading = self._spawn(self._reinitialise(order, before))

    async def _reinitialise(
        self, order: worker_service_pb2.Reinitialise, before: asyncio.Task[None] | None
    ) -> None:
        """Reload the weights, verify every byte of the span, probe, and say how it went."""
        if before is not None and not before.done():
            await asyncio.wait({before})
        _log.warning("reinitialising: %s", order.reason)
        self.server.set_serving(serving=False)
        result = worker_service_pb2.CommandResult(command_id=order.command_id)
        self._fence(max(self.routes.epoch, self.routes.fenced))
        try:
            await self._load_again(self.routes.fenced)
        except MeshError as error:
            result.detail = f"{error.reason}: {error}"
        except (OSError, RuntimeError, ValueError, MemoryError) as error:
            result.detail = f"{type(error).__name__}: {error}"
        else:
            result.ok = True
            result.worker.CopyFrom(self._describe())
            self.server.set_serving(serving=True)
        self._usable = result.ok
        if not result.ok:
            _log.error("could not be reinitialised: %s", result.detail)
        if order.command_id:
            self.control.send(Request(result=result))

    async def _load_again(self, fenced: int) -> None:
        """Install a fresh stage. Raises ModelDamaged if the files are not those of the start."""
        install = self.runner.install(self._host.load)
        stage = await asyncio.wrap_future(install)
        await asyncio.wrap_future(self.runner.fence(fenced))
        info = self._info_of(stage)
        if self._info is not None and info.fingerprint != self._info.fingerprint:
            raise ModelDamaged(
                "the model's files have changed since this worker started",
                expected=self._info.fingerprint[:16],
                actual=info.fingerprint[:16],
            )

    def _coordinator_lost(self) -> None:
        """Routes end with the control stream: a coordinator that comes back opens new ones."""
        self.reports.lost()
        if self._opening is not None:
            self._opening.cancel()
        if self.routes.epoch:
            self._fence(self.routes.epoch)
        if self._stop.reason:
            self._leaving.set()  # nobody is left who could let this worker go

    def _fence(self, epoch: int) -> None:
        self.routes.fence(epoch)
        self.reports.fenced(epoch)


def _positions_held(runner: StageRunner) -> int:
    """Positions cached on the stage now. For the compute thread."""
    return 0 if runner.stage is None else runner.stage.kv_tokens
