"""Which spans exist, and what they share. OpenTelemetry's API only; ``telemetry.py`` owns the SDK.

One trace per request, from the client's own context (gRPC metadata ``traceparent``):

    stagemesh.v1.GenerationService/Generate      the RPC, on the coordinator   (RpcTelemetry, here)
    └─ chat MODEL | text_completion MODEL        the generation                (request_telemetry)
       ├─ tokenize, queue                        before the first step
       ├─ prefill                                one per chunk, the last stands for the rest
       ├─ decode                                 one per segment of steps
       ├─ shadow                                 one, for all steps that verified the answer
       ├─ recovery ACTION                        links to the span it interrupted
       ├─ detokenize                             one, with the time it took altogether
       └─ stage.prefill, stage.decode            from every worker, per segment (stage_telemetry)

Segments double in length, so a decode span says how many steps it stands for and how their time was
spent, and an answer of a thousand tokens over five stages has fewer than sixty spans. Steps serve
several requests at once: each request has its own spans, and a decode span has links to the
generations it shared steps with; no span is the child of two requests.

Times are read from one monotonic clock per process and placed on the wall clock once per request: a
duration never contains a clock adjustment, and nothing is subtracted between hosts. Neither text
nor token ids are ever recorded.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

SEGMENT_STEPS_FIRST = 64
"""Decode steps of a request's first segment; each next one is twice as long."""
LINKS_MAX = 8
"""Links of one span to other requests; OpenTelemetry's own limit is 128."""

Attributes = Mapping[str, AttributeValue]
Clock = Callable[[], float]
"""A monotonic clock in seconds."""

_W3C = TraceContextTextMapPropagator()


class Timeline:
    """Places one monotonic clock on the wall clock, once."""

    def __init__(
        self, clock: Clock = time.monotonic, wall_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self._origin_s = clock()
        self._origin_ns = wall_ns()

    def at(self, monotonic_s: float) -> int:
        """Nanoseconds since 1970 for a reading of the clock."""
        return self._origin_ns + round((monotonic_s - self._origin_s) * 1e9)


def parent_of(carrier: Mapping[str, str]) -> Context:
    """The W3C context in gRPC metadata (or any carrier); an empty one if there is none."""
    return _W3C.extract(
        {name: carrier[name] for name in ("traceparent", "tracestate") if name in carrier}
    )


def traceparent_of(context: SpanContext) -> str:
    """The header for a span's context; empty if it is not valid."""
    if not context.is_valid:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def trace_id_of(context: SpanContext) -> str:
    """The trace id in hex; empty if it is not valid."""
    return f"{context.trace_id:032x}" if context.is_valid else ""


def below(span: Span) -> Context:
    """A context whose current span is ``span``; nothing is attached anywhere."""
    return trace.set_span_in_context(span, Context())


def record(
    tracer: Tracer,
    name: str,
    parent: Context,
    start_ns: int,
    end_ns: int,
    *,
    attributes: Attributes | None = None,
    links: Iterable[Link] = (),
    error_type: str = "",
) -> SpanContext:
    """A span of something that is already over. Returns its context, for links."""
    span = tracer.start_span(
        name, context=parent, attributes=attributes, links=tuple(links), start_time=start_ns
    )
    if error_type:
        span.set_attribute("error.type", error_type)
        span.set_status(Status(StatusCode.ERROR))
    span.end(max(start_ns, end_ns))
    return span.get_span_context()


@dataclass(slots=True)
class Segment:
    """Steps of one request that one span stands for. Seconds and bytes are sums.

    Invariant: ``started <= ended``; ``count`` steps lie between them.
    """

    started: float
    ended: float
    epoch: int
    first_step: int
    count: int = 0
    tokens: int = 0
    rows: int = 0
    sums: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    peers: dict[bytes, None] = field(default_factory=dict)

    def add(self, started: float, ended: float, tokens: int, rows: int) -> None:
        """One more step that took from ``started`` to ``ended`` and served ``rows`` requests. What
        else is known of it goes into ``sums``."""
        self.started = min(self.started, started)
        self.ended = max(self.ended, ended)
        self.count += 1
        self.tokens += tokens
        self.rows += rows

    def attributes(self) -> dict[str, AttributeValue]:
        """What its span says."""
        facts: dict[str, AttributeValue] = {
            "mesh.epoch": self.epoch,
            "mesh.step.first": self.first_step,
            "mesh.step.count": self.count,
            "mesh.tokens": self.tokens,
            "mesh.batch.mean": round(self.rows / max(1, self.count), 2),
        }
        for name, value in self.sums.items():
            facts[f"mesh.{name}"] = round(value, 9) if name.endswith("_s") else int(value)
        return facts


def segment_steps_max(index: int) -> int:
    """Steps of a request's segment number ``index`` (from 0)."""
    return SEGMENT_STEPS_FIRST << min(index, 16)


# ---------------------------------------------------------------- the RPC itself

STREAMS_OF_THE_MESH = frozenset({"StageService", "WorkerService"})
"""Streams that live as long as a link: their span says when they were up and is nobody's parent."""
SILENT_PREFIXES = ("/grpc.health.", "/grpc.reflection.", "/grpc.channelz.")
"""Probes, asked every few seconds."""
_SERVER_FAULTS = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)
"""Status codes that are an error of the server; the others are an answer."""


@dataclass(slots=True)
class RpcCall:
    """A call that is being handled. ``unclaimed`` are generations it started but did not submit."""

    method: str
    service: str
    started: float
    span: Span
    abandoned: list[Callable[[str, BaseException | None], None]] = field(default_factory=list)


current_call: ContextVar[RpcCall | None] = ContextVar("stagemesh_rpc", default=None)
"""The call this task handles. Set, never reset: gRPC gives every call its own task and context."""


class RpcTelemetry:
    """An RpcObserver: a span and a duration for every call, failed and cancelled ones included."""

    def __init__(
        self,
        tracer: Tracer,
        *,
        on_ended: Callable[[str, str, float], None] | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._tracer = tracer
        self._on_ended = on_ended
        self._clock = clock

    def rpc_started(self, method: str, metadata: dict[str, str], peer: str) -> object:
        """A call to ``/package.Service/Method`` begins."""
        name = method.lstrip("/")
        service = name.rpartition("/")[0].rpartition(".")[2]
        if method.startswith(SILENT_PREFIXES):
            span: Span = trace.INVALID_SPAN
        else:
            own_trace = service in STREAMS_OF_THE_MESH
            span = self._tracer.start_span(
                name,
                context=Context() if own_trace else parent_of(metadata),
                kind=SpanKind.SERVER,
                attributes={"rpc.system.name": "grpc", "rpc.method": name, **_peer(peer)},
            )
        call = RpcCall(name, service, self._clock(), span)
        current_call.set(call)
        return call

    def rpc_ended(self, call: object, code: str, error: BaseException | None) -> None:
        """It ended with a gRPC status name."""
        if not isinstance(call, RpcCall):
            return
        for abandon in call.abandoned:
            abandon(code, error)
        call.abandoned.clear()
        # Both names: the convention renamed one to the other between two releases.
        call.span.set_attribute("rpc.status_code", code)
        call.span.set_attribute("rpc.response.status_code", code)
        if code != "OK":
            call.span.set_attribute("error.type", code)
        if code in _SERVER_FAULTS:
            call.span.set_status(Status(StatusCode.ERROR))
        call.span.end()
        if self._on_ended is not None and call.service not in STREAMS_OF_THE_MESH:
            self._on_ended(call.method, code, self._clock() - call.started)


def _peer(peer: str) -> dict[str, AttributeValue]:
    """``ipv4:127.0.0.1:5`` as network attributes."""
    kind, _, rest = peer.partition(":")
    host, _, port = rest.replace("%5B", "[").replace("%5D", "]").rpartition(":")
    if kind not in {"ipv4", "ipv6"} or not port.isdecimal():
        return {}
    return {"network.peer.address": host.strip("[]"), "network.peer.port": int(port)}
