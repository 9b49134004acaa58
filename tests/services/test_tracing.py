"""One trace per request: which spans exist, how they hang together, and how few they stay."""

import asyncio
import uuid
from dataclasses import dataclass, field, replace

import grpc
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from coordinator.instructions import (
    AcceptTokens,
    AdvanceVerified,
    CorrectTokens,
    FailRequest,
    FinishRequest,
    PublishEvent,
    RecoveryRecord,
    RequestSummary,
)
from services import tracing
from services.access import ACCESS
from services.channel import open_channel
from services.interceptors import ServerInterceptor
from services.request_telemetry import RequestTelemetry
from services.span_events import STEPS_REMEMBERED_MAX, SpanEvents
from services.stage_telemetry import StageTelemetry, StepTiming
from services.telemetry import Role, Telemetry
from stagemesh.errors import InvalidRequest, RouteUnavailable
from stagemesh.frame import FrameKind, StepFrame, StepRow
from stagemesh.sampling import RowOpening, SamplingSpec
from stagemesh.token import TokenChunk

CLIENT_TRACE = "0af7651916cd43dd8448eb211c80319c"
CLIENT_SPAN = "b7ad6b7169203331"
TRACEPARENT = f"00-{CLIENT_TRACE}-{CLIENT_SPAN}-01"
REQUEST = uuid.UUID(int=7).bytes
OTHER = uuid.UUID(int=8).bytes
LIMIT_S = 20.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> float:
        self.now += seconds
        return self.now


@dataclass
class Sink:
    seen: list[object] = field(default_factory=list)
    advice: tuple[str, ...] = ()

    def _note(self, instruction: object) -> None:
        self.seen.append(instruction)

    accept = advance = correct = finish = fail = _note


class Bench:
    """A coordinator's and a worker's telemetry, whose finished spans lie in ``spans``."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.started = self.clock.now
        self.exporter = InMemorySpanExporter()
        processor = SimpleSpanProcessor(self.exporter)
        role = Role("coordinator", instance="one")
        self.telemetry = Telemetry(role, processors=[processor], clock=self.clock)
        self.requests: RequestTelemetry = self.telemetry.requests
        self.stage: StageTelemetry = self.telemetry.stage
        self.sink = Sink()

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return self.exporter.get_finished_spans()

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    def begin(self, request: bytes = REQUEST) -> str:
        return self.requests.request_received(request, {"traceparent": TRACEPARENT}, "tiny")

    def submit(self, request: bytes = REQUEST) -> object:
        self.requests.request_tokenized(request, 5, 0.001)
        return self.requests.watch(request, self.sink)

    def publish(self, kind: str, request: bytes = REQUEST) -> None:
        self.requests.event_published(PublishEvent("recovery", kind, request))

    def step(self, kind: FrameKind, step: int, *requests: bytes, tokens: int = 1, epoch: int = 1):
        sent = frame(kind, step, *requests, tokens=tokens, epoch=epoch)
        self.requests.step_sent(sent, self.clock.now)
        self.requests.step_returned(sent, self.clock.advance(0.01), 0.01)


@pytest.fixture
def bench():
    tracing.current_call.set(None)  # what other tests left in this thread's context
    bench = Bench()
    yield bench
    bench.telemetry.shutdown()


def frame(
    kind: FrameKind,
    step: int,
    *requests: bytes,
    tokens: int = 1,
    epoch: int = 1,
    traceparent: str = "",
    stage: int = -1,
) -> StepFrame:
    opening = RowOpening(SamplingSpec(), 5, bytes(16), 10) if traceparent else None
    rows = tuple(
        StepRow(one, step, (1,) * tokens, opening=opening, traceparent=traceparent)
        for one in requests or (REQUEST,)
    )
    return StepFrame(kind, bytes(8), epoch, step, stage, stage + 1, rows)


def chunk(index: int, epoch: int = 1) -> TokenChunk:
    return TokenChunk(REQUEST, 5 + index, 42, epoch, index + 1, 0.0, 1.0, 0, "stage-1", bytes(16))


def accept(index: int, epoch: int = 1) -> AcceptTokens:
    return AcceptTokens(REQUEST, index, (chunk(index, epoch),))


def summary(tokens: int, *recoveries: RecoveryRecord) -> RequestSummary:
    return RequestSummary(5, tokens, ("stage-0", "stage-1"), recoveries)


def run_to_the_end(bench: Bench, tokens: int) -> None:
    sink = bench.submit()
    bench.step(FrameKind.PREFILL, 1, tokens=5)
    sink.accept(accept(0))
    for index in range(1, tokens):
        bench.step(FrameKind.DECODE, index + 1)
        sink.accept(accept(index))
    sink.finish(FinishRequest(REQUEST, "length", summary(tokens)))


# ---------------------------------------------------------------- the request


def test_a_request_is_one_trace_below_the_clients_own_span(bench: Bench):
    traceparent = bench.begin()
    run_to_the_end(bench, 3)
    (generation,) = bench.named("chat tiny")
    assert f"{generation.parent.span_id:016x}" == CLIENT_SPAN
    assert traceparent == f"00-{CLIENT_TRACE}-{generation.context.span_id:016x}-01"
    children = [span for span in bench.spans if span is not generation]
    assert {span.name for span in children} == {
        "tokenize", "queue", "prefill", "decode", "detokenize"
    }  # fmt: skip
    assert {span.parent.span_id for span in children} == {generation.context.span_id}
    assert {f"{span.context.trace_id:032x}" for span in bench.spans} == {CLIENT_TRACE}
    assert {span.attributes["mesh.request.id"] for span in bench.spans} == {
        str(uuid.UUID(bytes=REQUEST))
    }


def test_the_generation_span_speaks_the_genai_conventions_and_vllms_names(bench: Bench):
    bench.begin()
    run_to_the_end(bench, 3)
    facts = bench.named("chat tiny")[0].attributes
    assert facts["gen_ai.operation.name"] == "chat"
    assert facts["gen_ai.provider.name"] == "stagemesh"
    assert facts["gen_ai.request.model"] == "tiny"
    assert facts["gen_ai.usage.input_tokens"] == 5
    assert facts["gen_ai.usage.output_tokens"] == 3
    assert facts["gen_ai.response.finish_reasons"] == ("length",)
    assert facts["gen_ai.latency.e2e"] == pytest.approx(0.03)
    assert facts["gen_ai.latency.time_to_first_token"] == pytest.approx(0.01)
    assert facts["gen_ai.latency.time_in_model_decode"] == pytest.approx(0.02)
    assert facts["mesh.route"] == ("stage-0", "stage-1")


def test_durations_come_from_the_monotonic_clock(bench: Bench):
    bench.begin()
    run_to_the_end(bench, 3)
    (prefill,) = bench.named("prefill")
    (decode,) = bench.named("decode")
    assert prefill.end_time - prefill.start_time == 10_000_000
    assert decode.end_time - decode.start_time == 20_000_000
    assert decode.attributes["mesh.step.count"] == 2
    assert decode.attributes["mesh.round_trip_s"] == pytest.approx(0.02)


def test_an_answer_of_a_thousand_tokens_over_five_stages_stays_readable(bench: Bench):
    traceparent = bench.begin()
    workers = [
        StageTelemetry(
            bench.stage._tracer, bench.telemetry.metrics, facts={"mesh.worker": f"stage-{index}"}
        )
        for index in range(5)
    ]
    run_to_the_end(bench, 1000)
    timing = StepTiming(finished=1.0, compute_s=0.001)
    for index, worker in enumerate(workers):
        worker.observe(
            frame(FrameKind.PREFILL, 1, tokens=5, traceparent=traceparent, stage=index), timing
        )
        for step in range(2, 1001):
            worker.observe(frame(FrameKind.DECODE, step, stage=index), timing)
        worker.observe(frame(FrameKind.CLOSE, 1001, stage=index), timing)
    assert len(bench.spans) < 60
    steps = sum(span.attributes["mesh.step.count"] for span in bench.named("decode"))
    assert steps == 999
    for index in range(5):
        mine = [
            one
            for one in bench.named("stage.decode")
            if one.attributes["mesh.stage.index"] == index
        ]
        assert sum(one.attributes["mesh.step.count"] for one in mine) == 999


def test_a_long_prompt_has_at_most_nine_prefill_spans_and_loses_no_chunk(bench: Bench):
    bench.begin()
    sink = bench.submit()
    for step in range(1, 41):
        bench.step(FrameKind.PREFILL, step, tokens=64)
    sink.accept(accept(0))
    sink.finish(FinishRequest(REQUEST, "length", summary(1)))
    spans = bench.named("prefill")
    assert len(spans) == 9
    assert sum(span.attributes["mesh.tokens"] for span in spans) == 40 * 64


def test_what_verifies_an_answer_is_one_span_and_never_taken_for_its_prefill(bench: Bench):
    traceparent = bench.begin()
    sink = bench.submit()

    def opening(step: int, epoch: int, traceparent: str = "") -> None:
        sent = frame(FrameKind.PREFILL, step, tokens=5, epoch=epoch, traceparent="x")
        row = replace(sent.rows[0], traceparent=traceparent)
        bench.requests.step_sent(replace(sent, rows=(row,)), bench.clock.now)

    opening(1, 2, traceparent)
    bench.step(FrameKind.PREFILL, 1, tokens=5, epoch=2)
    sink.accept(accept(0, 2))
    opening(1, 1)
    for step in range(1, 4):
        bench.step(FrameKind.PREFILL, step, tokens=64, epoch=1)
    bench.step(FrameKind.SCORE, 4, tokens=16, epoch=1)
    opening(5, 1, traceparent)  # the answer itself goes on there
    bench.step(FrameKind.PREFILL, 5, tokens=6, epoch=1)
    sink.finish(FinishRequest(REQUEST, "length", summary(1)))
    (shadow,) = bench.named("shadow")
    assert shadow.attributes["mesh.step.count"] == 4
    assert shadow.attributes["mesh.tokens"] == 3 * 64 + 16
    assert [span.attributes["mesh.tokens"] for span in bench.named("prefill")] == [5, 6]


def test_requests_that_share_steps_have_their_own_spans_and_links_to_each_other(bench: Bench):
    bench.begin()
    bench.begin(OTHER)
    sink = bench.submit()
    bench.submit(OTHER)
    for step in range(1, 4):
        bench.step(FrameKind.DECODE, step, REQUEST, OTHER)
    sink.finish(FinishRequest(REQUEST, "stop", summary(3)))
    (decode,) = bench.named("decode")
    (link,) = decode.links
    assert link.attributes["mesh.link"] == "shared_steps"
    assert link.context.span_id != decode.parent.span_id
    assert decode.attributes["mesh.batch.mean"] == 2


@pytest.mark.parametrize(
    ("before", "action", "after"), [(1, "reroute", 2), (5, "reroute", 1), (1, "replay", 1)]
)
def test_a_recovery_is_a_span_that_links_to_what_it_interrupted(
    bench: Bench, before: int, action: str, after: int
):
    """From the first sign of trouble to the next token, on a route of whatever age."""
    bench.begin()
    sink = bench.submit()
    bench.step(FrameKind.PREFILL, 1, tokens=5, epoch=before)
    sink.accept(accept(0, epoch=before))
    bench.step(FrameKind.DECODE, 2, epoch=before)
    sink.accept(accept(1, epoch=before))
    bench.clock.advance(0.5)
    began = bench.clock.now
    bench.publish("RecoveryStarted")
    bench.clock.advance(0.1)
    bench.step(FrameKind.PREFILL, 3, tokens=7, epoch=after)
    bench.publish("RecoveryFinished")
    sink.accept(accept(2, epoch=after))
    bench.step(FrameKind.DECODE, 4, epoch=after)
    sink.accept(accept(3, epoch=after))
    route = ("stage-0", "stage-1")
    recovery = RecoveryRecord(
        "STAGE_UNREACHABLE", action, "stage-1", route, ("full",), after, 2, 7, 0.11
    )
    sink.finish(FinishRequest(REQUEST, "length", summary(4, recovery)))
    (span,), (generation,) = bench.named(f"recovery {action}"), bench.named("chat tiny")
    interrupted, resumed = bench.named("decode")
    assert [one.attributes["mesh.epoch"] for one in (interrupted, resumed)] == [before, after]
    (link,) = span.links
    assert link.context.span_id == interrupted.context.span_id
    assert link.attributes["mesh.link"] == "interrupted"
    assert span.parent.span_id == generation.context.span_id
    since = generation.start_time - (bench.started * 1e9)
    assert (span.start_time - since) / 1e9 == pytest.approx(began, abs=1e-5)
    assert (span.end_time - since) / 1e9 == pytest.approx(began + 0.11, abs=1e-5)
    assert span.end_time <= resumed.start_time
    assert span.attributes["mesh.recovery.cause"] == "STAGE_UNREACHABLE"
    assert span.attributes["mesh.route.after"] == ("full",)


def test_a_recovery_that_comes_to_nothing_ends_where_the_next_one_begins(bench: Bench):
    bench.begin()
    sink = bench.submit()
    bench.step(FrameKind.PREFILL, 1, tokens=5)
    sink.accept(accept(0))
    bench.publish("RecoveryStarted")
    bench.clock.advance(0.25)
    bench.publish("RecoveryStarted")
    bench.clock.advance(0.5)
    route = ("stage-0", "stage-1")
    lost = RecoveryRecord("CACHE_LOST", "replay", "", route, route, 1, 1, 6, None)
    left = RecoveryRecord("STAGE_UNREACHABLE", "reroute", "", route, (), 0, 1, 0, None)
    sink.fail(FailRequest(REQUEST, RouteUnavailable("no route"), summary(1, lost, left)))
    (first,), (second,) = bench.named("recovery replay"), bench.named("recovery reroute")
    assert first.end_time - first.start_time == pytest.approx(0.25e9)
    assert second.end_time - second.start_time == pytest.approx(0.5e9)
    assert first.end_time == second.start_time
    (prefill,) = bench.named("prefill")
    for span in (first, second):
        assert [link.context.span_id for link in span.links] == [prefill.context.span_id]


def test_recoveries_of_an_answers_earlier_life_are_not_told_of_again(bench: Bench):
    bench.begin()
    sink = bench.requests.watch(REQUEST, Sink(), recoveries_before=1)
    bench.publish("RecoveryStarted")
    bench.step(FrameKind.PREFILL, 1, tokens=5, epoch=3)
    bench.publish("RecoveryFinished")
    sink.accept(accept(0, epoch=3))
    route = ("stage-0", "stage-1")
    before = RecoveryRecord("STAGE_UNREACHABLE", "reroute", "stage-1", route, (), 0, 2, 0, None)
    own = RecoveryRecord("ROUTE_UNAVAILABLE", "replay", "", (), route, 3, 2, 7, 0.25)
    sink.finish(FinishRequest(REQUEST, "length", summary(3, before, own)))
    assert not bench.named("recovery reroute")
    (span,) = bench.named("recovery replay")
    assert dict(span.attributes) == {
        "mesh.request.id": span.attributes["mesh.request.id"],
        "error.type": "ROUTE_UNAVAILABLE",
        "mesh.recovery.cause": "ROUTE_UNAVAILABLE",
        "mesh.recovery.action": "replay",
        "mesh.worker": "",
        "mesh.route.before": (),
        "mesh.route.after": route,
        "mesh.epoch": 3,
        "mesh.tokens.kept": 2,
        "mesh.tokens.replayed": 7,
    }


def test_what_a_guard_stopped_is_an_event_on_the_span_concerned_with_hop_worker_and_reason(
    bench: Bench,
):
    bench.begin()
    bench.begin(OTHER)
    bench.submit(OTHER)
    sink = bench.submit()
    bench.step(FrameKind.PREFILL, 1, REQUEST, tokens=5)
    fault = {"hop": "0→1", "reason": "CHECKSUM_MISMATCH", "epoch": "1", "step": "1", "detail": "x"}
    bench.requests.event_published(PublishEvent("integrity", "HopFault", b"", "stage-1", fault))
    rejected = {"corruption": "ordering", "epoch": "1", "step": "2", "detail": "chain"}
    event = PublishEvent("integrity", "TokenRejected", REQUEST, "stage-1", rejected)
    bench.requests.event_published(event)
    quiet = {"name": "checkpoint/1/64", "epoch": "1"}
    bench.requests.event_published(PublishEvent("barrier", "BarrierCompleted", REQUEST, "", quiet))
    unknown = {**fault, "step": "77"}
    bench.requests.event_published(PublishEvent("integrity", "HopFault", b"", "stage-1", unknown))
    sink.finish(FinishRequest(REQUEST, "length", summary(1)))
    (span,) = bench.named("chat tiny")
    assert [found.name for found in span.events] == ["HopFault", "TokenRejected"]
    assert dict(span.events[0].attributes) == {
        "mesh.worker": "stage-1",
        "mesh.hop": "0→1",
        "mesh.epoch": "1",
        "mesh.step": "1",
        "error.type": "CHECKSUM_MISMATCH",
        "mesh.detail": "x",
    }
    assert span.events[1].attributes["error.type"] == "ordering"


def test_steps_are_remembered_up_to_a_limit(bench: Bench):
    events = SpanEvents(lambda request, name, attributes: None)
    for step in range(STEPS_REMEMBERED_MAX + 5):
        events.step_sent(frame(FrameKind.DECODE, step + 1))
    assert len(events._steps) == STEPS_REMEMBERED_MAX


def test_a_failed_request_says_why_and_no_more(bench: Bench):
    bench.begin()
    sink = bench.submit()
    sink.fail(FailRequest(REQUEST, RouteUnavailable("no route", prompt="secret words"), summary(0)))
    (generation,) = bench.named("chat tiny")
    assert generation.status.status_code is StatusCode.ERROR
    assert generation.attributes["error.type"] == "ROUTE_UNAVAILABLE"
    assert "secret" not in str([(span.attributes, span.events) for span in bench.spans])


def test_what_was_noticed_about_the_text_stands_on_the_trace(bench: Bench):
    bench.begin()
    bench.sink.advice = ("repetition",)
    run_to_the_end(bench, 2)
    (generation,) = bench.named("chat tiny")
    said = [(one.name, dict(one.attributes)) for one in generation.events]
    assert ("text_signal", {"mesh.signal": "repetition"}) in said


def test_the_watched_sink_passes_everything_on_and_ends_once(bench: Bench):
    bench.begin()
    sink = bench.submit()
    instructions = [
        accept(0),
        AdvanceVerified(REQUEST, 1),
        CorrectTokens(REQUEST, 0, "TOKEN_REJECTED"),
        FinishRequest(REQUEST, "stop", summary(1)),
    ]
    for act, instruction in zip(
        (sink.accept, sink.advance, sink.correct, sink.finish), instructions, strict=True
    ):
        act(instruction)
    sink.finish(instructions[-1])
    assert bench.sink.seen == [*instructions, instructions[-1]]
    assert len(bench.named("chat tiny")) == 1


def test_a_sink_is_watched_once_however_often_it_is_asked_for(bench: Bench):
    bench.begin()
    watched = bench.submit()
    assert bench.requests.watch(REQUEST, watched) is watched


def test_requests_beyond_the_limit_are_served_and_not_followed():
    provider = TracerProvider()
    telemetry = Telemetry(Role("coordinator"))
    few = RequestTelemetry(provider.get_tracer("t"), telemetry.metrics, requests_tracked_max=1)
    few.request_received(REQUEST, {}, "tiny")
    assert few.request_received(OTHER, {"traceparent": TRACEPARENT}, "tiny") == TRACEPARENT
    sink = Sink()
    assert few.watch(OTHER, sink) is sink
    telemetry.shutdown()


# ---------------------------------------------------------------- a stage


def test_a_stage_adds_its_steps_up_below_the_generation(bench: Bench):
    bench.stage.observe(
        frame(FrameKind.PREFILL, 1, tokens=5, traceparent=TRACEPARENT, stage=1),
        StepTiming(finished=1000.5, compute_s=0.5, queue_s=0.1, bytes_out=100),
    )
    for step in (2, 3):
        bench.stage.observe(
            frame(FrameKind.DECODE, step, stage=1),
            StepTiming(finished=1000.5 + step, compute_s=0.25, queue_s=0.125, bytes_out=10),
        )
    assert [span.name for span in bench.spans] == ["stage.prefill"]
    bench.stage.observe(frame(FrameKind.CLOSE, 4, stage=1), StepTiming(1010.0, 0.0))
    prefill, decode = bench.spans
    assert (prefill.name, decode.name) == ("stage.prefill", "stage.decode")
    assert f"{decode.parent.span_id:016x}" == CLIENT_SPAN
    facts = decode.attributes
    assert (facts["mesh.step.count"], facts["mesh.stage.index"]) == (2, 1)
    assert facts["mesh.compute_s"] == pytest.approx(0.5)
    assert facts["mesh.queue_s"] == pytest.approx(0.25)
    assert facts["mesh.bytes_out"] == 20


def test_a_stage_ends_its_spans_when_the_epoch_is_fenced_or_the_request_opens_again(bench: Bench):
    opening = frame(FrameKind.PREFILL, 1, traceparent=TRACEPARENT, stage=0)
    timing = StepTiming(1001.0, 0.1)
    bench.stage.observe(opening, timing)
    bench.stage.observe(
        frame(FrameKind.PREFILL, 1, traceparent=TRACEPARENT, epoch=2, stage=0), timing
    )
    assert [span.attributes["mesh.epoch"] for span in bench.spans] == [1]
    bench.stage.fenced(1)
    assert len(bench.spans) == 1
    bench.stage.fenced(2)
    assert [span.attributes["mesh.epoch"] for span in bench.spans] == [1, 2]


def test_a_stage_follows_an_answer_that_goes_on_behind_what_verified_it(bench: Bench):
    bench.stage.observe(frame(FrameKind.PREFILL, 1, stage=0), StepTiming(1001.0, 0.1))
    bench.stage.observe(frame(FrameKind.SCORE, 2, stage=0), StepTiming(1002.0, 0.1))
    first = frame(FrameKind.DECODE, 3, traceparent=TRACEPARENT, stage=0)
    rows = tuple(replace(row, opening=None) for row in first.rows)
    bench.stage.observe(replace(first, rows=rows), StepTiming(1003.0, 0.1))
    bench.stage.observe(frame(FrameKind.DECODE, 4, stage=0), StepTiming(1004.0, 0.1))
    bench.stage.fenced(1)
    (span,) = bench.spans
    assert (span.name, span.attributes["mesh.step.count"]) == ("stage.decode", 2)
    assert f"{span.parent.span_id:016x}" == CLIENT_SPAN


def test_a_stage_follows_no_more_requests_than_its_limit(bench: Bench):
    few = StageTelemetry(bench.stage._tracer, bench.telemetry.metrics, requests_tracked_max=1)
    for request in (REQUEST, OTHER):
        few.observe(
            frame(FrameKind.PREFILL, 1, request, traceparent=TRACEPARENT, stage=0),
            StepTiming(1001.0, 0.1),
        )
    assert len(bench.spans) == 1, "the oldest was recorded and let go"


def test_an_unsampled_client_is_respected(bench: Bench):
    bench.requests.request_received(REQUEST, {"traceparent": TRACEPARENT[:-1] + "0"}, "tiny")
    run_to_the_end(bench, 2)
    assert not bench.spans


# ---------------------------------------------------------------- RPCs, over a real connection

SERVICE = "stagemesh.v1.GenerationService"


async def _serve(bench: Bench, service: str, kind: str, handler, scenario) -> None:
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    server = grpc.aio.server(interceptors=[ServerInterceptor(observer=bench.telemetry.rpc)])
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {"Call": make(handler)}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with asyncio.timeout(LIMIT_S), open_channel(f"127.0.0.1:{port}") as channel:
        await scenario(getattr(channel, kind)(f"/{service}/Call"))
    await server.stop(LIMIT_S)


def _once(span_name: str, bench: Bench) -> ReadableSpan:
    (span,) = bench.named(span_name)
    return span


@pytest.fixture(autouse=True)
def admitted(monkeypatch: pytest.MonkeyPatch) -> None:
    for service in (SERVICE, "stagemesh.v1.StageService", "grpc.health.v1.Health"):
        monkeypatch.setitem(ACCESS, f"/{service}/Call", frozenset())


async def test_a_unary_call_has_a_server_span_below_the_client(bench: Bench):
    async def answer(request, context):
        return b"ok"

    async def scenario(call):
        await call(b"", metadata=(("traceparent", TRACEPARENT),))

    await _serve(bench, SERVICE, "unary_unary", answer, scenario)
    span = _once(f"{SERVICE}/Call", bench)
    assert f"{span.parent.span_id:016x}" == CLIENT_SPAN
    assert span.attributes["rpc.system.name"] == "grpc"
    assert span.attributes["rpc.method"] == f"{SERVICE}/Call"
    assert span.attributes["rpc.status_code"] == "OK"
    assert span.attributes["rpc.response.status_code"] == "OK"
    assert span.attributes["network.peer.address"] == "127.0.0.1"
    assert span.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream", "stream_stream"])
@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (InvalidRequest("no"), "INVALID_ARGUMENT", StatusCode.UNSET),
        (RouteUnavailable("no"), "UNAVAILABLE", StatusCode.ERROR),
        (ValueError("a bug"), "INTERNAL", StatusCode.ERROR),
    ],
)
async def test_a_failed_call_of_any_kind_is_recorded_as_it_failed(
    bench: Bench, kind, error, code, status
):
    async def fail(request, context):
        raise error

    async def fail_later(request, context):
        yield b"first"
        raise error

    async def read(call):
        if kind == "unary_unary":
            return await call(b"")
        reply = call(iter([b""])) if kind == "stream_stream" else call(b"")
        return [part async for part in reply]

    async def scenario(call):
        with pytest.raises(grpc.aio.AioRpcError):
            await read(call)

    handler = fail if kind == "unary_unary" else fail_later
    await _serve(bench, SERVICE, kind, handler, scenario)
    span = _once(f"{SERVICE}/Call", bench)
    assert span.attributes["rpc.status_code"] == code
    assert span.attributes["error.type"] == code
    assert span.status.status_code is status


async def test_a_cancelled_stream_is_recorded_as_cancelled(bench: Bench):
    ended = asyncio.Event()

    async def endless(request, context):
        try:
            yield b"first"
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def scenario(call):
        reply = call(b"")
        await reply.read()
        reply.cancel()
        await ended.wait()

    await _serve(bench, SERVICE, "unary_stream", endless, scenario)
    span = _once(f"{SERVICE}/Call", bench)
    assert span.attributes["rpc.status_code"] == "CANCELLED"
    assert span.attributes["error.type"] == "CANCELLED"


async def test_a_stream_of_the_mesh_is_a_trace_of_its_own(bench: Bench):
    async def echo(requests, context):
        async for request in requests:
            yield request

    async def scenario(call):
        reply = call(iter([b"a"]), metadata=(("traceparent", TRACEPARENT),))
        assert [part async for part in reply] == [b"a"]

    await _serve(bench, "stagemesh.v1.StageService", "stream_stream", echo, scenario)
    span = _once("stagemesh.v1.StageService/Call", bench)
    assert span.parent is None
    assert f"{span.context.trace_id:032x}" != CLIENT_TRACE


async def test_health_probes_leave_no_spans(bench: Bench):
    async def answer(request, context):
        return b"ok"

    async def scenario(call):
        await call(b"")

    await _serve(bench, "grpc.health.v1.Health", "unary_unary", answer, scenario)
    assert not bench.spans


async def test_the_generation_hangs_below_its_call_and_ends_with_it_if_never_submitted(
    bench: Bench,
):
    async def refuse(request, context):
        bench.begin()
        raise InvalidRequest("empty prompt", field="prompt")

    async def scenario(call):
        with pytest.raises(grpc.aio.AioRpcError):
            await call(b"", metadata=(("traceparent", TRACEPARENT),))

    await _serve(bench, SERVICE, "unary_unary", refuse, scenario)
    rpc = _once(f"{SERVICE}/Call", bench)
    generation = _once("chat tiny", bench)
    assert generation.parent.span_id == rpc.context.span_id
    assert generation.attributes["error.type"] == "INVALID_REQUEST"
    assert f"{rpc.parent.span_id:016x}" == CLIENT_SPAN


def test_a_peer_is_an_address_and_a_port():
    assert tracing._peer("ipv4:10.0.0.1:5")["network.peer.port"] == 5
    assert tracing._peer("ipv6:%5B::1%5D:80")["network.peer.address"] == "::1"
    assert tracing._peer("unix:socket") == {}
