"""AdminService: what operators see and steer. Never shows a prompt or an answer's text."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from coordinator.barrier import BarrierOutcome
from coordinator.events import DrainRequested, Event
from coordinator.snapshot import GenerationView, MeshSnapshot, RouteView, WorkerView
from services.answer_book import AnswerBook
from services.answer_codec import finish_to_proto, recovery_to_proto
from services.grpc_types import ServicerContext
from services.request_ids import request_key, show_id
from stagemesh import __version__
from stagemesh.errors import InvalidRequest, RequestUnknown, WorkerUnknown
from stagemesh.topology import WorkerInfo, WorkerName
from stagemesh.v1 import admin_service_pb2 as pb
from stagemesh.v1 import admin_service_pb2_grpc, topology_pb2

PAGE_SIZE_DEFAULT = 50
PAGE_SIZE_MAX = 1000
DRAIN_S_DEFAULT = 30
DRAIN_S_MAX = 3600

_STATES = {
    "queued": pb.GENERATION_STATE_QUEUED,
    "prefilling": pb.GENERATION_STATE_PREFILLING,
    "decoding": pb.GENERATION_STATE_DECODING,
    "recovering": pb.GENERATION_STATE_RECOVERING,
    "finished": pb.GENERATION_STATE_FINISHED,
    "failed": pb.GENERATION_STATE_FAILED,
    "cancelled": pb.GENERATION_STATE_CANCELLED,
}

_ROUTE_STATES = {
    "opening": topology_pb2.ROUTE_STATE_OPENING,
    "linking": topology_pb2.ROUTE_STATE_OPENING,
    "probing": topology_pb2.ROUTE_STATE_PROBING,
    "open": topology_pb2.ROUTE_STATE_OPEN,
    "draining": topology_pb2.ROUTE_STATE_DRAINING,
    "closed": topology_pb2.ROUTE_STATE_CLOSED,
}


class AdminDriver(Protocol):
    """What this service needs of the mesh; `coordinator.driver.MeshDriver` is one."""

    def snapshot(self) -> MeshSnapshot:
        """The mesh at this moment."""

    def feed(self, event: Event) -> None:
        """Tell the mesh that something happened."""


class AdminService(admin_service_pb2_grpc.AdminServiceServicer):
    """The servicer. ``describe``: a worker's message; ``traces``: TracesData by request id;
    ``facts``: what belongs to the environment and changes."""

    def __init__(
        self,
        *,
        driver: AdminDriver,
        book: AnswerBook,
        describe: Callable[[WorkerInfo], topology_pb2.Worker],
        traces: Callable[[str], bytes],
        environment: Mapping[str, str] | None = None,
        facts: Callable[[], Mapping[str, str]] = dict,
        clock: Callable[[], float] = time.monotonic,
        wall_clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._driver = driver
        self._book = book
        self._describe = describe
        self._traces = traces
        self._environment = dict(environment or {})
        self._facts = facts
        self._clock = clock
        self._wall_clock_ns = wall_clock_ns
        self._started = clock()

    async def GetMesh(  # noqa: N802 (the name is the protocol's)
        self, request: pb.GetMeshRequest, context: ServicerContext
    ) -> pb.GetMeshResponse:
        """Workers, routes and counts."""
        seen = self._driver.snapshot()
        return pb.GetMeshResponse(
            workers=[self._worker(view) for view in seen.workers],
            routes=[_route(view) for view in seen.routes],
            running=seen.running,
            queued=seen.queued + seen.displaced,
            finished=seen.finished,
            failed=seen.failed,
            version=__version__,
            uptime_s=self._clock() - self._started,
            ready=seen.ready,
            not_ready_reason="" if seen.ready else seen.not_ready_reason,
            environment=self._environment | dict(self._facts()),
            pid=os.getpid(),
        )

    async def ListGenerations(  # noqa: N802
        self, request: pb.ListGenerationsRequest, context: ServicerContext
    ) -> pb.ListGenerationsResponse:
        """A page, newest first; the token names the last request of the page before."""
        if request.page_size > PAGE_SIZE_MAX:
            raise InvalidRequest(
                f"at most {PAGE_SIZE_MAX} a page", field="page_size", value=request.page_size
            )
        size = request.page_size or PAGE_SIZE_DEFAULT
        views = self._driver.snapshot().generations
        first = _behind(views, request.page_token) if request.page_token else 0
        page = views[first : first + size]
        more = first + size < len(views)
        return pb.ListGenerationsResponse(
            generations=[self._generation(view) for view in page],
            next_page_token=_page_token(page[-1].request) if page and more else "",
        )

    async def GetGeneration(  # noqa: N802
        self, request: pb.GetGenerationRequest, context: ServicerContext
    ) -> pb.GetGenerationResponse:
        """One generation."""
        key = request_key(request.request_id)
        for view in self._driver.snapshot().generations:
            if view.request == key:
                return pb.GetGenerationResponse(generation=self._generation(view))
        raise RequestUnknown("no such generation, or it was retired", request_id=show_id(key))

    async def DrainWorker(  # noqa: N802
        self, request: pb.DrainWorkerRequest, context: ServicerContext
    ) -> pb.DrainWorkerResponse:
        """Take a worker out of service."""
        self._find(request.worker)
        if request.timeout_s > DRAIN_S_MAX:
            raise InvalidRequest(
                f"at most {DRAIN_S_MAX} seconds", field="timeout_s", value=request.timeout_s
            )
        timeout_s = float(request.timeout_s or DRAIN_S_DEFAULT)
        self._driver.feed(DrainRequested(WorkerName(request.worker), timeout_s))
        return pb.DrainWorkerResponse(worker=self._worker(self._find(request.worker)))

    async def GetDiagnostics(  # noqa: N802
        self, request: pb.GetDiagnosticsRequest, context: ServicerContext
    ) -> pb.GetDiagnosticsResponse:
        """Every guard's counter, and every barrier."""
        seen = self._driver.snapshot()
        return pb.GetDiagnosticsResponse(
            counters=seen.counters,
            workers=[
                pb.WorkerCounters(worker=view.info.name, counters=view.counters)
                for view in seen.workers
            ],
            barriers=[_barrier(outcome, self._clock()) for outcome in seen.barriers],
        )

    async def GetTrace(  # noqa: N802
        self, request: pb.GetTraceRequest, context: ServicerContext
    ) -> pb.GetTraceResponse:
        """The spans of one generation."""
        request_id = show_id(request_key(request.request_id))
        return pb.GetTraceResponse(traces=self._traces(request_id))

    # -- messages ----------------------------------------------------------------------------------

    def _find(self, name: str) -> WorkerView:
        for view in self._driver.snapshot().workers:
            if view.info.name == name:
                return view
        raise WorkerUnknown("no worker of this name", worker=name[:64])

    def _worker(self, view: WorkerView) -> topology_pb2.WorkerStatus:
        return topology_pb2.WorkerStatus(
            worker=self._describe(view.info),
            state=f"WORKER_STATE_{view.state.upper()}",
            stage_index_plus_one=view.stage_index + 1,
            epoch=view.epoch,
            in_flight=view.in_flight,
            kv_tokens=view.kv_tokens,
            idle_ms=max(0, int(view.idle_s * 1000)),
            evidence=view.evidence,
        )

    def _generation(self, view: GenerationView) -> pb.Generation:
        generation = pb.Generation(
            request_id=show_id(view.request),
            state=_STATES.get(view.phase, pb.GENERATION_STATE_UNSPECIFIED),
            prompt_tokens=view.prompt_tokens,
            completion_tokens=view.completion_tokens,
            verified_through=view.verified_through,
            epoch=view.epoch,
            route=view.route,
            recoveries=[recovery_to_proto(record) for record in view.recoveries],
            error_reason=view.error_reason,
        )
        created_ns = self._wall_clock_ns() - int(view.age_s * 1e9)
        record = self._book.find(view.request)
        if record is not None:
            created_ns = record.created_at_unix_ns
            generation.trace_id = record.trace_id
            if record.answer.end is not None:
                finish = finish_to_proto(record.answer.end, tokenize_s=record.tokenize_s)
                generation.finish.CopyFrom(finish)
        generation.created_at.FromNanoseconds(created_ns)
        return generation


def _route(view: RouteView) -> topology_pb2.RouteStatus:
    return topology_pb2.RouteStatus(
        epoch=view.epoch,
        workers=view.workers,
        state=_ROUTE_STATES.get(view.phase, topology_pb2.ROUTE_STATE_UNSPECIFIED),
        step=view.step,
        in_flight=view.in_flight,
        requests=view.requests,
        full_worker=view.full_worker,
    )


def _barrier(outcome: BarrierOutcome, now: float) -> pb.BarrierStatus:
    until = now if outcome.ended_at is None else outcome.ended_at
    return pb.BarrierStatus(
        name=outcome.name,
        epoch=outcome.epoch,
        generation=outcome.generation,
        state=outcome.state.value,
        participants=outcome.participants,
        absent=outcome.absent,
        age_ms=_milliseconds(until - outcome.formed_at),
        detail=outcome.detail,
        arrived=outcome.arrived,
        culprits=outcome.culprits,
        cause="" if outcome.cause is None or outcome.complete else outcome.cause.value,
        last_progress={worker: known.text for worker, known in outcome.last_progress.items()},
        remaining_ms=0 if outcome.ended_at is not None else _milliseconds(outcome.deadline - now),
    )


def _milliseconds(seconds: float) -> int:
    return max(0, int(seconds * 1000))


def _page_token(request: bytes) -> str:
    return base64.urlsafe_b64encode(request).decode()


def _behind(views: Sequence[GenerationView], token: str) -> int:
    """Index behind the request that a page token names. Raises InvalidRequest."""
    try:
        key = base64.urlsafe_b64decode(token.encode())
    except ValueError:
        key = b""
    for index, view in enumerate(views):
        if view.request == key:
            return index + 1
    raise InvalidRequest("the page token is not, or no longer, valid", field="page_token")
