"""OpenTelemetry for one process: the only module that imports its SDK. How to plug in:

    telemetry = start_telemetry(Role(service="coordinator", instance=…), store=TraceStore())
    MeshServer(options, observer=telemetry.rpc)                 # a span per call
    GenerationService(…, observer=telemetry.requests)           # request_received, _tokenized
    driver.submit(event, telemetry.requests.watch(key, sink))   # tokens, and the one end
    MeshDriver(…, observer=telemetry.requests)                  # StepObserver
    WorkerService(…, on_telemetry=telemetry.received)           # workers' spans into the store
    telemetry.traces_of(request_id)                             # AdminService.GetTrace
    telemetry.metrics.observe_guards(read)                      # counters that others keep

    telemetry = start_telemetry(Role(service="stage-worker", worker=name, …))
    telemetry.stage.observe(frame, StepTiming(…))   # each computed step as it leaves; any thread
    telemetry.stage.fenced(epoch)
    telemetry.forward_to(send)      # the control stream is up: send(traces: bytes, dropped: int)
    telemetry.forward_to(None)      # and down; batches wait, bounded

    await telemetry.drain(timeout_s)                            # both, last of all

Where it all goes is decided by the standard variables alone: OTEL_EXPORTER_OTLP_ENDPOINT (or the
per-signal ones) turns OTLP over gRPC on, OTEL_TRACES_EXPORTER and OTEL_METRICS_EXPORTER choose
(otlp, console, prometheus, none), OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER
and OTEL_SDK_DISABLED do what they say. With none of them set, spans go to the coordinator's
embedded store and nowhere else. Prometheus listens on OTEL_EXPORTER_PROMETHEUS_HOST and _PORT.

A token never waits for telemetry: spans go to bounded queues that threads of their own empty, and
what does not fit is counted and dropped.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.metrics import MeterProvider as ApiMeterProvider
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    ConsoleSpanExporter,
    SpanExporter,
    SpanExportResult,
)

from services import logs
from services.metrics import MeshMetrics
from services.request_telemetry import RequestTelemetry
from services.stage_telemetry import StageTelemetry, StepTiming
from services.trace_store import TraceStore
from services.tracing import RpcTelemetry
from stagemesh import __version__
from stagemesh.errors import InvalidConfiguration

__all__ = ["Role", "StepTiming", "Telemetry", "TraceStore", "start_telemetry"]

SCOPE = "stagemesh"
EMBEDDED_DELAY_MS = 100.0
"""Finished spans wait this long on their way to the store, so that they travel together."""
SPANS_QUEUED_MAX = 8192
BATCHES_WAITING_MAX = 256
"""Encoded batches kept while a worker has no control stream."""
PROMETHEUS_PORT = 9464

Send = Callable[[bytes, int], bool]
"""Takes serialized TracesData and the number of spans dropped before it; False if it cannot now.
Called
on an exporter's thread; must not block."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Role:
    """What this process is. ``service`` is coordinator, stage-worker or full-worker."""

    service: str
    instance: str = ""
    worker: str = ""
    facts: Mapping[str, str | int] = field(default_factory=dict)
    """More resource attributes, such as ``mesh.layer.first``."""

    def resource(self) -> Resource:
        """Resource attributes; what the standard variables say wins."""
        attributes: dict[str, str | int] = {
            "service.name": f"stagemesh-{self.service}",
            "service.namespace": "stagemesh",
            "service.version": __version__,
            "service.instance.id": self.instance or f"{self.service}-{os.getpid()}",
            "process.pid": os.getpid(),
            **self.facts,
        }
        if self.worker:
            attributes["mesh.worker"] = self.worker
        base = Resource.get_empty().merge(Resource(attributes))
        return base.merge(OTELResourceDetector().detect())


class _StoreExporter(SpanExporter):
    """Finished spans into the embedded store."""

    def __init__(self, store: TraceStore) -> None:
        self._store = store

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._store.add(encode_spans(spans).SerializeToString())
        return SpanExportResult.SUCCESS


class _Forwarder(SpanExporter):
    """Finished spans to the coordinator, or into a bounded buffer until there is a way."""

    def __init__(self) -> None:
        self._send: Send | None = None
        self._waiting: deque[tuple[bytes, int]] = deque()
        self._dropped = 0
        self._lock = threading.Lock()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        # TracesData and ExportTraceServiceRequest have the same one field.
        encoded = encode_spans(spans).SerializeToString()
        with self._lock:
            if len(self._waiting) >= BATCHES_WAITING_MAX:
                self._dropped += self._waiting.popleft()[1]
            self._waiting.append((encoded, len(spans)))
            self._empty()
        return SpanExportResult.SUCCESS

    def attach(self, send: Send | None) -> None:
        """From now on batches go through ``send``; the waiting ones at once."""
        with self._lock:
            self._send = send
            self._empty()

    def _empty(self) -> None:
        while self._send is not None and self._waiting:
            if not self._send(self._waiting[0][0], self._dropped):
                return
            self._dropped = 0
            self._waiting.popleft()


class Telemetry:
    """A process's telemetry. Made by `start_telemetry`; the module's docstring says how to use
    it.
    """

    def __init__(
        self,
        role: Role,
        *,
        processors: Sequence[SpanProcessor] = (),
        readers: Sequence[MetricReader] = (),
        store: TraceStore | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        resource = role.resource()
        self.store = store
        self._forwarder = _Forwarder()
        exporter = self._forwarder if store is None else _StoreExporter(store)
        self._embedded = BatchSpanProcessor(
            exporter, schedule_delay_millis=EMBEDDED_DELAY_MS, max_queue_size=SPANS_QUEUED_MAX
        )
        self._processors = [self._embedded, *processors]
        self._tracers = TracerProvider(resource=resource, shutdown_on_exit=False)
        for processor in self._processors:
            self._tracers.add_span_processor(processor)
        self._meters = MeterProvider(
            metric_readers=list(readers),
            resource=resource,
            # An exemplar is the current span's, and nothing here ever makes a span current.
            exemplar_filter=AlwaysOffExemplarFilter(),
            shutdown_on_exit=False,
        )
        tracer = self._tracers.get_tracer(SCOPE, __version__)
        # What no reader ever collects need not be measured, some of it with every token.
        meters: ApiMeterProvider = self._meters if readers else NoOpMeterProvider()
        self.metrics = MeshMetrics(meters.get_meter(SCOPE, __version__))
        self.rpc = RpcTelemetry(tracer, on_ended=self.metrics.rpc_ended, clock=clock)
        self.requests = RequestTelemetry(tracer, self.metrics, clock=clock)
        logs.find_traces(self.requests.trace_id_of)
        facts = {"mesh.worker": role.worker, **role.facts} if role.worker else dict(role.facts)
        self.stage = StageTelemetry(tracer, self.metrics, facts=facts, clock=clock)

    def received(self, worker: str, batch: object) -> None:
        """A worker's TelemetryBatch came in on its control stream."""
        traces, dropped = getattr(batch, "traces", b""), getattr(batch, "dropped", 0)
        if dropped:
            self.metrics.dropped.add(dropped)
        if self.store is not None and traces:
            self.store.add(traces)

    def forward_to(self, send: Send | None) -> None:
        """Where finished spans go from now on; None while there is no control stream."""
        self._forwarder.attach(send)

    def flush(self) -> None:
        """Finished spans leave the queue of the embedded way now. In memory; takes milliseconds."""
        self._embedded.force_flush()

    def traces_of(self, request_id: str) -> bytes:
        """One request's TracesData, serialized. Raises RequestUnknown if no span of it is left."""
        self.flush()
        store = self.store or TraceStore()
        return store.get(request_id)

    def shutdown(self, timeout_s: float = 3.0) -> None:
        """Export what there is, then end, within ``timeout_s``. Later spans are dropped. Blocks."""
        ended = threading.Event()
        self._end(timeout_s, ended.set)
        ended.wait(timeout_s)

    async def drain(self, timeout_s: float = 3.0) -> None:
        """`shutdown` without blocking the loop; gives up, and goes on, after ``timeout_s``."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(ended.set)

        self._end(timeout_s, tell)
        try:
            async with asyncio.timeout(timeout_s):
                await ended.wait()
        except TimeoutError:
            _log.warning("telemetry was not exported within %g s", timeout_s)

    def _end(self, timeout_s: float, tell: Callable[[], None]) -> None:
        # A daemon thread: neither the loop nor the interpreter's exit waits for a dead collector.
        # The embedded way is emptied first, because it is the one that always works.
        def end() -> None:
            for processor in self._processors:
                processor.shutdown()
            self._meters.shutdown(timeout_millis=timeout_s * 1000)
            tell()

        threading.Thread(target=end, name="telemetry-end", daemon=True).start()


def start_telemetry(
    role: Role,
    *,
    store: TraceStore | None = None,
    environment: Mapping[str, str] | None = None,
) -> Telemetry:
    """Telemetry as the environment wants it. A coordinator gives a ``store``, a worker none.

    Raises InvalidConfiguration for an exporter that does not exist or a port that is taken.
    """
    variables = os.environ if environment is None else environment
    return Telemetry(
        role,
        processors=_span_processors(variables),
        readers=_metric_readers(variables),
        store=store,
    )


def _wanted(variables: Mapping[str, str], signal: str, known: set[str]) -> set[str]:
    """Exporters for a signal: as named, else OTLP if there is an endpoint, else none."""
    if variables.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return set()
    variable = f"OTEL_{signal}_EXPORTER"
    named = {word.strip() for word in variables.get(variable, "").split(",")} - {""}
    if unknown := named - known - {"none"}:
        raise InvalidConfiguration(
            f"{variable}: unknown exporter {min(unknown)!r}", setting=variable
        )
    if named:
        return named - {"none"}
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
    return {"otlp"} if any(variables.get(name) for name in endpoints) else set()


def _span_processors(variables: Mapping[str, str]) -> list[SpanProcessor]:
    found: list[SpanProcessor] = []
    wanted = _wanted(variables, "TRACES", {"otlp", "console"})
    if "otlp" in wanted:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        found.append(BatchSpanProcessor(OTLPSpanExporter(), max_queue_size=SPANS_QUEUED_MAX))
    if "console" in wanted:
        found.append(BatchSpanProcessor(ConsoleSpanExporter()))
    return found


def _metric_readers(variables: Mapping[str, str]) -> list[MetricReader]:
    found: list[MetricReader] = []
    wanted = _wanted(variables, "METRICS", {"otlp", "prometheus"})
    if "otlp" in wanted:
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter

        found.append(PeriodicExportingMetricReader(OTLPMetricExporter()))
    if "prometheus" in wanted:
        found.append(_prometheus(variables))
    return found


def _prometheus(variables: Mapping[str, str]) -> MetricReader:
    import prometheus_client
    from opentelemetry.exporter.prometheus import PrometheusMetricReader

    host = variables.get("OTEL_EXPORTER_PROMETHEUS_HOST") or "localhost"
    text = variables.get("OTEL_EXPORTER_PROMETHEUS_PORT") or str(PROMETHEUS_PORT)
    registry = prometheus_client.CollectorRegistry()
    try:
        server, _ = prometheus_client.start_http_server(int(text), addr=host, registry=registry)
    except (OSError, ValueError, OverflowError) as error:
        raise InvalidConfiguration(
            f"cannot serve metrics on {host}:{text}: {error}",
            setting="OTEL_EXPORTER_PROMETHEUS_PORT",
        ) from error
    _log.info("metrics on http://%s:%d/metrics", host, server.server_port)
    return PrometheusMetricReader(registry=registry, scope_info_enabled=False)
