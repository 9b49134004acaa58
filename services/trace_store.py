"""The embedded trace store: the spans of recent requests, in memory, found by request id.

It exists so that `stagemesh trace` works with no collector at all. OTLP bytes go in (the
coordinator's own spans and those its workers forward) and come out; nothing is invented on the way.
Bounded by traces and by spans: traces that belong to no request go first, then the oldest, and a
trace that is over its own limit takes no more. Bytes that are no TracesData, or spans without ids,
are counted and ignored. Safe to use from any thread.
"""

from __future__ import annotations

import base64
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError
from opentelemetry.proto.common.v1.common_pb2 import InstrumentationScope
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span, TracesData

from stagemesh.errors import RequestUnknown

REQUEST_ATTRIBUTE = "mesh.request.id"
TRACES_MAX = 1000
SPANS_MAX = 50_000
SPANS_OF_TRACE_MAX = 2000
OTHER_TRACES_MAX = 200
"""Traces without a request (an operator's polling): they go before any request's does."""
TRACE_ID_BYTES = 16
SPAN_ID_BYTES = 8


@dataclass(frozen=True, slots=True)
class _Kept:
    resource: Resource
    scope: InstrumentationScope
    span: Span
    request: str


@dataclass(slots=True)
class _Trace:
    spans: dict[bytes, _Kept] = field(default_factory=dict)
    requests: set[str] = field(default_factory=set)


class TraceStore:
    """Spans by trace, traces by request. Invariant: ``span_count`` is the sum over the traces
    kept.
    """

    def __init__(
        self,
        *,
        traces_max: int = TRACES_MAX,
        spans_max: int = SPANS_MAX,
        spans_of_trace_max: int = SPANS_OF_TRACE_MAX,
    ) -> None:
        self._traces_max = traces_max
        self._spans_max = spans_max
        self._spans_of_trace_max = spans_of_trace_max
        self._traces: OrderedDict[bytes, _Trace] = OrderedDict()
        self._others: OrderedDict[bytes, None] = OrderedDict()
        self._trace_of: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self.span_count = 0
        self.refused = 0

    def add(self, traces: bytes) -> int:
        """Take serialized TracesData; the number of spans kept."""
        try:
            data = TracesData.FromString(traces)
        except DecodeError:
            self.refused += 1
            return 0
        with self._lock:
            kept = sum(
                self._keep(_Kept(of_resource.resource, of_scope.scope, span, _request_of(span)))
                for of_resource in data.resource_spans
                for of_scope in of_resource.scope_spans
                for span in of_scope.spans
            )
            self._evict()
        return kept

    def get(self, request_id: str) -> bytes:
        """TracesData of one request: its own spans, and the spans above them. Raises
        RequestUnknown.
        """
        with self._lock:
            trace = self._traces.get(self._trace_of.get(request_id, b""))
            if trace is None:
                raise RequestUnknown("no trace of this request", request_id=request_id)
            chosen = {
                span_id: one for span_id, one in trace.spans.items() if one.request == request_id
            }
            for one in list(chosen.values()):
                parent = trace.spans.get(one.span.parent_span_id)
                while parent is not None and parent.span.span_id not in chosen:
                    chosen[parent.span.span_id] = parent
                    parent = trace.spans.get(parent.span.parent_span_id)
        return _assemble(list(chosen.values())).SerializeToString()

    def requests(self) -> list[str]:
        """Ids of the requests whose traces are kept, oldest first."""
        with self._lock:
            return list(self._trace_of)

    def _keep(self, one: _Kept) -> bool:
        span = one.span
        if len(span.trace_id) != TRACE_ID_BYTES or len(span.span_id) != SPAN_ID_BYTES:
            self.refused += 1
            return False
        trace = self._traces.setdefault(span.trace_id, _Trace())
        if len(trace.spans) >= self._spans_of_trace_max and span.span_id not in trace.spans:
            self.refused += 1
            return False
        self.span_count += span.span_id not in trace.spans
        trace.spans[span.span_id] = one
        if one.request:
            trace.requests.add(one.request)
            self._trace_of[one.request] = span.trace_id
            self._others.pop(span.trace_id, None)
        elif not trace.requests:
            self._others[span.trace_id] = None
        return True

    def _evict(self) -> None:
        while len(self._others) > OTHER_TRACES_MAX:
            self._drop(next(iter(self._others)))
        while self._traces and (
            len(self._traces) > self._traces_max or self.span_count > self._spans_max
        ):
            self._drop(next(iter(self._others or self._traces)))

    def _drop(self, trace_id: bytes) -> None:
        dropped = self._traces.pop(trace_id)
        self._others.pop(trace_id, None)
        self.span_count -= len(dropped.spans)
        for request in dropped.requests:
            if self._trace_of.get(request) == trace_id:
                del self._trace_of[request]


def _request_of(span: Span) -> str:
    for attribute in span.attributes:
        if attribute.key == REQUEST_ATTRIBUTE:
            return attribute.value.string_value
    return ""


def _assemble(kept: list[_Kept]) -> TracesData:
    """Spans grouped by resource and scope again."""
    data = TracesData()
    groups: dict[tuple[bytes, bytes], Any] = {}
    for one in kept:
        key = (
            one.resource.SerializeToString(deterministic=True),
            one.scope.SerializeToString(deterministic=True),
        )
        if key not in groups:
            of_resource = data.resource_spans.add()
            of_resource.resource.CopyFrom(one.resource)
            groups[key] = of_resource.scope_spans.add()
            groups[key].scope.CopyFrom(one.scope)
        groups[key].spans.add().CopyFrom(one.span)
    return data


def to_otlp_json(traces: bytes) -> dict[str, Any]:
    """OTLP's JSON of serialized TracesData: ids in hex, enums as numbers; other tools import it."""
    plain: dict[str, Any] = MessageToDict(
        TracesData.FromString(traces), use_integers_for_enums=True
    )
    for of_resource in plain.get("resourceSpans", ()):
        for of_scope in of_resource.get("scopeSpans", ()):
            for span in of_scope.get("spans", ()):
                for holder in (span, *span.get("links", ())):
                    for name in ("traceId", "spanId", "parentSpanId"):
                        if name in holder:
                            holder[name] = base64.b64decode(holder[name]).hex()
    return plain
