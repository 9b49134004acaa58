"""The coordinator's side of the control stream that every worker keeps open.

One registered worker is one ``_Seat``: who sits there (name, instance), a bounded queue of commands
on their way out, and what the worker last said. A worker that registers under a taken name with
another instance takes the seat over: the old stream is ended with EpochFenced, and that instance is
never let in again, so that a process that was stopped, replaced and then continued cannot push its
successor out. The same instance may take its own seat again (its connection broke and it dialled
anew).

Everything a worker says becomes an event for the core; everything the core wants of a worker
becomes a command in its queue. A worker that does not take its commands loses its stream.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from coordinator.events import CommandFinished, Event, WorkerLost, WorkerRegistered
from coordinator.instructions import AnnounceBarrier, DrainWorker, MeetWorker, OpenRoute
from coordinator.membership import DRAIN_BARRIER
from services.credentials import Role, identity_of
from services.grpc_types import ServicerContext
from services.worker_codec import (
    bounded_facts,
    event_from_proto,
    open_route_to_proto,
    worker_from_proto,
    worker_to_proto,
)
from stagemesh.errors import (
    AccessDenied,
    EpochFenced,
    FrameMalformed,
    MeshError,
    Overloaded,
    RouteRefused,
)
from stagemesh.topology import Route, WorkerInfo, WorkerName
from stagemesh.v1 import topology_pb2, worker_service_pb2, worker_service_pb2_grpc

COMMANDS_QUEUED_MAX = 256
"""Commands on their way to one worker; a worker this far behind is not listening."""
REPORT_INTERVAL_MS = 250
"""How often a worker reports when nothing moves: the failure detector's ``report_interval_s``. A
stage that waits for a slow one owes work and says so only this often; its silence must stay far
below the limit of one second."""
REGISTER_TIMEOUT_S = 10.0
"""A stream whose first message takes longer is ended."""
FENCED_INSTANCES_MAX = 1024
"""Replaced instances that are remembered."""
WORKERS_MAX = 1024
"""Seats at a time."""

_Response = worker_service_pb2.ConnectResponse
TelemetrySink = Callable[[WorkerName, worker_service_pb2.TelemetryBatch], None]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Seat:
    worker: WorkerInfo
    environment: dict[str, str]
    commands: asyncio.Queue[_Response | MeshError | None] = field(
        default_factory=lambda: asyncio.Queue(COMMANDS_QUEUED_MAX)
    )
    report: worker_service_pb2.ProgressReport | None = None
    ended: bool = False

    def put(self, command: _Response) -> None:
        """Queue a command; a full queue ends the stream."""
        if self.ended:
            return
        try:
            self.commands.put_nowait(command)
        except asyncio.QueueFull:
            self.end(Overloaded("worker does not take its commands", worker=self.worker.name))

    def end(self, error: MeshError | None) -> None:
        """End this seat's stream (with ``error``), ahead of whatever is queued."""
        if not self.ended:
            self.ended = True
            while not self.commands.empty():
                self.commands.get_nowait()
            self.commands.put_nowait(error)


@dataclass(frozen=True, slots=True)
class WorkerDescription:
    """A registered worker as it describes itself, for the admin surface."""

    worker: WorkerInfo
    environment: dict[str, str]
    report: worker_service_pb2.ProgressReport | None


class WorkerService(worker_service_pb2_grpc.WorkerServiceServicer):
    """Servicer of WorkerService, and ``coordinator.ports.WorkerControl``. Belongs to one event
    loop.

    ``feed`` takes the core's events. ``address`` is where last stages send token frames. ``epoch``
    gives the newest epoch of the mesh.
    """

    def __init__(
        self,
        feed: Callable[[Event], None],
        *,
        address: Callable[[], str],
        epoch: Callable[[], int] | None = None,
        on_route: Callable[[Route], None] | None = None,
        on_telemetry: TelemetrySink | None = None,
        report_interval_ms: int = REPORT_INTERVAL_MS,
    ) -> None:
        self._feed = feed
        self._address = address
        self._newest_epoch = 0
        self._epoch = epoch or (lambda: self._newest_epoch)
        self._on_route = on_route
        self._on_telemetry = on_telemetry
        self._report_interval_ms = report_interval_ms
        self._seats: dict[WorkerName, _Seat] = {}
        self._fenced: deque[str] = deque(maxlen=FENCED_INSTANCES_MAX)

    # -- the stream ---------------------------------------------------------------------------

    async def Connect(  # noqa: N802 - the generated name
        self,
        request_iterator: AsyncIterator[worker_service_pb2.ConnectRequest],
        context: ServicerContext,
    ) -> AsyncIterator[_Response]:
        """Seats a worker, then passes its messages to the core and the core's commands to it."""
        seat = await self._seat(request_iterator, context)
        listening = asyncio.ensure_future(self._listen(seat, request_iterator))
        reason = "control stream ended"
        try:
            self._feed(WorkerRegistered(seat.worker))
            while True:
                command = await seat.commands.get()
                if command is None:
                    return
                if isinstance(command, MeshError):
                    reason = command.message
                    raise command
                yield command
        finally:
            # Before anything is awaited: gRPC may cancel a call in the middle of its end.
            self._leave(seat, reason)
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    async def _seat(
        self,
        requests: AsyncIterator[worker_service_pb2.ConnectRequest],
        context: ServicerContext,
    ) -> _Seat:
        try:
            async with asyncio.timeout(REGISTER_TIMEOUT_S):
                first = await anext(aiter(requests), None)
        except TimeoutError as error:
            raise FrameMalformed("no registration in time") from error
        if first is None or first.WhichOneof("message") != "register":
            raise FrameMalformed("the first message must be `register`")
        worker = worker_from_proto(first.register)
        identity = identity_of(context.auth_context())
        if identity.role is not Role.PLAINTEXT and identity.subject not in ("", worker.name):
            raise AccessDenied("certificate is another worker's", worker=worker.name)
        if worker.instance in self._fenced:
            raise EpochFenced("this worker process has been replaced", worker=worker.name)
        sitting = self._seats.get(worker.name)
        if sitting is None and len(self._seats) >= WORKERS_MAX:
            raise Overloaded("too many workers", limit=WORKERS_MAX)
        if sitting is not None:
            self._unseat(sitting, worker)
        seat = _Seat(worker, bounded_facts(first.register.environment))
        self._seats[worker.name] = seat
        _log.info("worker %s registered: layers %s at %s", worker.name, worker.span, worker.address)
        return seat

    def _unseat(self, sitting: _Seat, successor: WorkerInfo) -> None:
        if sitting.worker.instance == successor.instance:
            sitting.end(EpochFenced("replaced by a newer connection", worker=successor.name))
            return
        self._fenced.append(sitting.worker.instance)
        sitting.end(EpochFenced("replaced by another process", worker=successor.name))

    def _leave(self, seat: _Seat, reason: str) -> None:
        name, seat.ended = seat.worker.name, True
        if self._seats.get(name) is not seat:
            return  # Somebody else sits here now; the core heard of them when they registered.
        del self._seats[name]
        _log.warning("worker %s left: %s", name, reason)
        self._feed(WorkerLost(name, seat.worker.instance, reason))

    async def _listen(
        self, seat: _Seat, requests: AsyncIterator[worker_service_pb2.ConnectRequest]
    ) -> None:
        try:
            async for request in requests:
                self._take(seat, request)
        except MeshError as error:
            seat.end(error)
        except Exception:  # noqa: BLE001 - a worker must not be left without a reader
            _log.exception("a message of worker %s could not be taken", seat.worker.name)
            seat.end(MeshError("internal error", worker=seat.worker.name))
        seat.end(None)

    def _take(self, seat: _Seat, request: worker_service_pb2.ConnectRequest) -> None:
        if seat.ended:
            return
        kind = request.WhichOneof("message")
        if kind == "progress":
            seat.report = request.progress
        elif kind == "telemetry":
            if self._on_telemetry is not None:
                self._on_telemetry(seat.worker.name, request.telemetry)
            return
        elif kind not in ("arrival", "result", "fault", "leave"):
            raise FrameMalformed("unexpected message on the control stream", kind=kind)
        event = event_from_proto(seat.worker, request)
        if isinstance(event, CommandFinished) and event.info is not None:
            self._check_same_worker(seat, event.info)
            seat.worker = event.info
        if event is not None:
            self._feed(event)

    @staticmethod
    def _check_same_worker(seat: _Seat, info: WorkerInfo) -> None:
        if (info.name, info.instance) != (seat.worker.name, seat.worker.instance):
            raise FrameMalformed("a worker may only describe itself", worker=seat.worker.name)

    # -- coordinator.ports.WorkerControl ------------------------------------------------------

    def open_route(self, instruction: OpenRoute) -> None:
        """Tell each worker of the route its place."""
        self._newest_epoch = max(self._newest_epoch, instruction.route.epoch)
        if self._on_route is not None:
            self._on_route(instruction.route)
        for stage_index, worker in enumerate(instruction.route.workers):
            command = open_route_to_proto(instruction, stage_index, self._address())
            self._command(worker.name, command)

    def fence(self, workers: Sequence[WorkerName], epoch: int) -> None:
        """Tell workers to forget ``epoch`` and everything older."""
        self._newest_epoch = max(self._newest_epoch, epoch)
        for name in workers:
            self._command(name, _Response(fence=worker_service_pb2.FenceEpoch(epoch=epoch)))

    def drain(self, order: DrainWorker) -> None:
        """Tell a worker to finish and leave."""
        drain = worker_service_pb2.Drain(
            timeout_ms=int(order.timeout_s * 1000),
            barrier=DRAIN_BARRIER if order.generation else "",
            epoch=order.epoch,
            generation=order.generation,
        )
        self._command(order.worker, _Response(drain=drain))

    def reinitialise(self, worker: WorkerName, reason: str, command_id: str) -> None:
        """Tell a worker to reload, verify and probe itself."""
        command = worker_service_pb2.Reinitialise(reason=reason[:200], command_id=command_id)
        self._command(worker, _Response(reinitialise=command))

    def announce_barrier(self, outcome: AnnounceBarrier) -> None:
        """Tell participants how a barrier ended."""
        barrier = worker_service_pb2.BarrierOutcome(
            name=outcome.name,
            epoch=outcome.epoch,
            generation=outcome.generation,
            complete=outcome.complete,
            absent=list(outcome.absent),
        )
        for name in outcome.participants:
            self._command(name, _Response(barrier=barrier))

    def meet(self, verdict: MeetWorker) -> None:
        """Welcome a worker, or end its stream with the reason why it may not join."""
        seat = self._seats.get(verdict.worker.name)
        if seat is None or seat.worker.instance != verdict.worker.instance:
            return
        if not verdict.admitted:
            seat.end(RouteRefused(verdict.reason, worker=verdict.worker.name))
            return
        welcome = worker_service_pb2.Registered(
            epoch=self._epoch(), report_interval_ms=self._report_interval_ms
        )
        seat.put(_Response(registered=welcome))

    def _command(self, name: WorkerName, command: _Response) -> None:
        seat = self._seats.get(name)
        if seat is not None:
            seat.put(command)

    # -- for the admin surface ----------------------------------------------------------------

    def descriptions(self) -> dict[WorkerName, WorkerDescription]:
        """Registered workers by name."""
        return {
            name: WorkerDescription(seat.worker, seat.environment, seat.report)
            for name, seat in self._seats.items()
        }

    def proto_of(self, worker: WorkerInfo) -> topology_pb2.Worker:
        """A worker as operators see it, with its environment if it is still registered."""
        seat = self._seats.get(worker.name)
        return worker_to_proto(worker, seat.environment if seat else None)
