"""The embedded store: OTLP in, OTLP out, bounded, never confused by what it is given."""

import json

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData

from services.trace_store import OTHER_TRACES_MAX, TraceStore, to_otlp_json
from stagemesh.errors import RequestUnknown


def traces(
    trace: int, *spans: tuple[int, int, str, str], service: str = "stagemesh-coordinator"
) -> bytes:
    """Spans as (id, parent id, name, request id)."""
    data = TracesData()
    of_resource = data.resource_spans.add()
    attribute = of_resource.resource.attributes.add()
    attribute.key, attribute.value.string_value = "service.name", service
    scope = of_resource.scope_spans.add()
    scope.scope.name = "stagemesh"
    for span_id, parent, name, request in spans:
        span = scope.spans.add(
            trace_id=trace.to_bytes(16), span_id=span_id.to_bytes(8), name=name, kind=2
        )
        span.start_time_unix_nano, span.end_time_unix_nano = 1_000 + span_id, 2_000 + span_id
        if parent:
            span.parent_span_id = parent.to_bytes(8)
        if request:
            fact = span.attributes.add()
            fact.key, fact.value.string_value = "mesh.request.id", request
    return data.SerializeToString()


def names(stored: bytes) -> list[str]:
    data = TracesData.FromString(stored)
    return sorted(
        span.name
        for of_resource in data.resource_spans
        for of_scope in of_resource.scope_spans
        for span in of_scope.spans
    )


def test_a_request_comes_back_with_its_spans_from_every_process_and_those_above_them():
    store = TraceStore()
    store.add(traces(1, (1, 99, "rpc", ""), (2, 1, "chat", "a"), (3, 2, "decode", "a")))
    store.add(traces(1, (4, 2, "stage.decode", "a"), service="stagemesh-stage-worker"))
    store.add(traces(1, (5, 1, "chat", "b"), (6, 5, "decode of b", "b")))
    stored = store.get("a")
    assert names(stored) == ["chat", "decode", "rpc", "stage.decode"]
    services = {
        of_resource.resource.attributes[0].value.string_value
        for of_resource in TracesData.FromString(stored).resource_spans
    }
    assert services == {"stagemesh-coordinator", "stagemesh-stage-worker"}


def test_an_unknown_request_is_a_typed_error():
    with pytest.raises(RequestUnknown):
        TraceStore().get("nobody")


def test_a_span_that_comes_twice_is_kept_once():
    store = TraceStore()
    for _ in range(2):
        store.add(traces(1, (1, 0, "chat", "a")))
    assert store.span_count == 1


def test_the_oldest_traces_go_first_and_their_requests_with_them():
    store = TraceStore(traces_max=2)
    for number in range(1, 4):
        store.add(traces(number, (1, 0, "chat", f"request {number}")))
    assert store.requests() == ["request 2", "request 3"]
    with pytest.raises(RequestUnknown):
        store.get("request 1")


def test_an_operator_who_polls_pushes_no_request_out():
    store = TraceStore(traces_max=300)
    store.add(traces(1, (1, 0, "chat", "a")))
    for number in range(2, 1000):
        store.add(traces(number, (1, 0, "GetMesh", "")))
    assert store.requests() == ["a"]
    assert store.span_count == OTHER_TRACES_MAX + 1


def test_the_number_of_spans_is_bounded_over_all_and_per_trace():
    store = TraceStore(spans_max=10, spans_of_trace_max=6)
    for number in range(1, 4):
        spans = [(index, 0, "decode", "a") for index in range(1, 9)]
        assert store.add(traces(number, *spans)) == 6
    assert store.span_count <= 10
    assert store.refused == 6


def test_bytes_that_are_no_spans_are_counted_and_ignored():
    store = TraceStore()
    assert store.add(b"\xff\xff\xff not protobuf") == 0
    data = TracesData()
    data.resource_spans.add().scope_spans.add().spans.add(name="no ids", trace_id=b"short")
    assert store.add(data.SerializeToString()) == 0
    assert (store.refused, store.span_count) == (2, 0)


def test_spans_whose_parents_form_a_ring_end():
    store = TraceStore()
    store.add(traces(1, (1, 2, "a", "a"), (2, 1, "b", "")))
    assert names(store.get("a")) == ["a", "b"]


def test_otlp_json_has_hex_ids_and_numbers_for_enums():
    store = TraceStore()
    store.add(traces(0xABC, (1, 0, "chat", "a"), (2, 1, "decode", "a")))
    plain = to_otlp_json(store.get("a"))
    spans = json.loads(json.dumps(plain))["resourceSpans"][0]["scopeSpans"][0]["spans"]
    assert {span["traceId"] for span in spans} == {f"{0xABC:032x}"}
    assert [span["parentSpanId"] for span in spans if "parentSpanId" in span] == [f"{1:016x}"]
    assert {span["kind"] for span in spans} == {2}
    assert spans[0]["startTimeUnixNano"].isdecimal()
