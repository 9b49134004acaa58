"""Setting telemetry up by the standard variables, moving spans, and ending in time."""

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from concurrent import futures

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData

from services import tracing
from services.stage_telemetry import StepTiming
from services.telemetry import BATCHES_WAITING_MAX, Role, Telemetry, TraceStore, start_telemetry
from services.trace_store import to_otlp_json
from stagemesh.errors import InvalidConfiguration, RequestUnknown
from stagemesh.frame import FrameKind, StepFrame, StepRow
from stagemesh.sampling import RowOpening, SamplingSpec
from stagemesh.v1 import worker_service_pb2

REQUEST = uuid.UUID(int=7).bytes
REQUEST_ID = str(uuid.UUID(int=7))


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def names(traces: bytes) -> list[str]:
    return sorted(
        span["name"]
        for of_resource in to_otlp_json(traces).get("resourceSpans", ())
        for of_scope in of_resource["scopeSpans"]
        for span in of_scope["spans"]
    )


def compute(worker: Telemetry, traceparent: str, request: bytes = REQUEST) -> None:
    """One request's prefill and end on a worker."""
    opening = RowOpening(SamplingSpec(), 1, bytes(16), 2)
    first = StepRow(request, 0, (1,), opening=opening, traceparent=traceparent)
    worker.stage.observe(
        StepFrame(FrameKind.PREFILL, bytes(8), 1, 1, 0, 1, (first,)), StepTiming(1.0, 0.5)
    )
    close = StepFrame(FrameKind.CLOSE, bytes(8), 1, 2, 0, 1, (StepRow(request, 1, ()),))
    worker.stage.observe(close, StepTiming(1.0, 0.0))


@pytest.fixture(autouse=True)
def nobody_calls():
    """No call of another test is left in this thread's context."""
    tracing.current_call.set(None)


@pytest.fixture
def coordinator():
    telemetry = start_telemetry(Role("coordinator"), store=TraceStore(), environment={})
    yield telemetry
    telemetry.shutdown()


@pytest.fixture
def worker():
    telemetry = start_telemetry(
        Role("stage-worker", worker="stage-0", facts={"mesh.layer.first": 0}), environment={}
    )
    yield telemetry
    telemetry.shutdown()


def test_without_any_collector_a_trace_crosses_processes_into_the_embedded_store(
    coordinator: Telemetry, worker: Telemetry
):
    def send(traces: bytes, dropped: int) -> bool:
        batch = worker_service_pb2.TelemetryBatch(traces=traces, dropped=dropped)
        arrived = worker_service_pb2.TelemetryBatch.FromString(batch.SerializeToString())
        coordinator.received("stage-0", arrived)
        return True

    worker.forward_to(send)
    traceparent = coordinator.requests.request_received(REQUEST, {}, "tiny")
    coordinator.requests.request_tokenized(REQUEST, 1, 0.001)
    compute(worker, traceparent)
    worker.flush()
    stored = coordinator.traces_of(REQUEST_ID)
    assert names(stored) == ["stage.prefill", "tokenize"]
    resources = [
        {one["key"]: one["value"] for one in of_resource["resource"]["attributes"]}
        for of_resource in to_otlp_json(stored)["resourceSpans"]
    ]
    by_service = {one["service.name"]["stringValue"]: one for one in resources}
    assert by_service.keys() == {"stagemesh-coordinator", "stagemesh-stage-worker"}
    assert by_service["stagemesh-stage-worker"]["mesh.worker"]["stringValue"] == "stage-0"


def test_spans_wait_while_there_is_no_way_and_what_is_dropped_is_counted(worker: Telemetry):
    traceparent = f"00-{1:032x}-{1:016x}-01"
    for number in range(BATCHES_WAITING_MAX + 3):
        compute(worker, traceparent, uuid.UUID(int=number).bytes)
        worker.flush()
    arrived: list[tuple[bytes, int]] = []

    def refuse(traces: bytes, dropped: int) -> bool:
        return False

    def take(traces: bytes, dropped: int) -> bool:
        arrived.append((traces, dropped))
        return True

    worker.forward_to(refuse)
    worker.forward_to(take)
    assert len(arrived) == BATCHES_WAITING_MAX
    assert [dropped for _, dropped in arrived[:2]] == [3, 0]


def test_dropped_spans_and_bytes_that_are_none_do_no_harm(coordinator: Telemetry):
    coordinator.received("stage-0", worker_service_pb2.TelemetryBatch(traces=b"\xff", dropped=5))
    with pytest.raises(RequestUnknown):
        coordinator.traces_of(REQUEST_ID)


def test_an_endpoint_turns_otlp_on_and_spans_arrive_there(monkeypatch: pytest.MonkeyPatch):
    received: list[trace_service_pb2.ExportTraceServiceRequest] = []
    arrived = threading.Event()

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request, context):  # noqa: N802
            received.append(request)
            arrived.set()
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "renamed")
    telemetry = start_telemetry(Role("coordinator"), store=TraceStore())
    call = telemetry.rpc.rpc_started("/a.v1.B/C", {}, "")
    telemetry.rpc.rpc_ended(call, "OK", None)
    telemetry.shutdown(timeout_s=20.0)
    assert arrived.wait(20)
    server.stop(None)
    (of_resource,) = received[0].resource_spans
    facts = {one.key: one.value.string_value for one in of_resource.resource.attributes}
    assert facts["service.name"] == "renamed"
    assert [span.name for span in of_resource.scope_spans[0].spans] == ["a.v1.B/C"]


def test_a_dead_collector_costs_a_request_nothing_and_the_end_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    telemetry = start_telemetry(Role("coordinator"), store=TraceStore())
    for number in range(20_000):  # more than any queue holds
        call = telemetry.rpc.rpc_started("/a.v1.B/C", {}, "")
        telemetry.rpc.rpc_ended(call, "OK", None)
        if number == 0:
            telemetry.requests.request_received(REQUEST, {}, "tiny")
            telemetry.requests.request_tokenized(REQUEST, 1, 0.0)
    assert names(telemetry.traces_of(REQUEST_ID)), "the embedded store works as ever"

    async def end() -> float:
        began = time.monotonic()
        await telemetry.drain(timeout_s=1.0)
        return time.monotonic() - began

    assert asyncio.run(end()) < 30


def test_a_process_with_a_dead_collector_exits(tmp_path):
    program = (
        "import asyncio\n"
        "from services.telemetry import Role, TraceStore, start_telemetry\n"
        "t = start_telemetry(Role('coordinator'), store=TraceStore())\n"
        "c = t.rpc.rpc_started('/a.v1.B/C', {}, ''); t.rpc.rpc_ended(c, 'OK', None)\n"
        "asyncio.run(t.drain(0.5))\nprint('ended')\n"
    )
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{closed_port()}",
        "PYTHONPATH": ":".join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.strip() == "ended", done.stderr


def test_prometheus_serves_the_numbers_when_asked_to():
    environment = {
        "OTEL_METRICS_EXPORTER": "prometheus",
        "OTEL_EXPORTER_PROMETHEUS_HOST": "127.0.0.1",
        "OTEL_EXPORTER_PROMETHEUS_PORT": str(closed_port()),
    }
    telemetry = start_telemetry(Role("coordinator"), store=TraceStore(), environment=environment)
    telemetry.metrics.recovered("CACHE_LOST", "replay")
    address = f"http://127.0.0.1:{environment['OTEL_EXPORTER_PROMETHEUS_PORT']}/metrics"
    with urllib.request.urlopen(address, timeout=20) as answer:
        text = answer.read().decode()
    assert "mesh_recoveries_total{" in text
    assert 'mesh_recovery_cause="CACHE_LOST"' in text
    with pytest.raises(InvalidConfiguration):
        start_telemetry(Role("coordinator"), environment=environment)
    telemetry.shutdown()


@pytest.mark.parametrize("signal", ["TRACES", "METRICS"])
def test_an_exporter_that_does_not_exist_is_a_clear_error(signal: str):
    with pytest.raises(InvalidConfiguration, match="zipkin"):
        start_telemetry(Role("coordinator"), environment={f"OTEL_{signal}_EXPORTER": "zipkin"})


def test_no_prompt_or_answer_reaches_a_span_a_metric_or_the_store(coordinator: Telemetry):
    """Everything the edge hands over but text: the interfaces have no place to put any."""
    coordinator.requests.request_received(
        REQUEST,
        {"user-agent": "x", "prompt": "secret words"},
        "tiny",
        attributes={"gen_ai.request.top_k": 4},
    )
    coordinator.requests.request_tokenized(REQUEST, 3, 0.1)
    plain = json.dumps(to_otlp_json(coordinator.traces_of(REQUEST_ID)))
    assert "secret" not in plain
    assert TracesData.FromString(coordinator.traces_of(REQUEST_ID)).ByteSize() > 0
