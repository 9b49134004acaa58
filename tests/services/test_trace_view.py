"""The waterfall: every span a line, bars that lie where the time went, and a hundred columns."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as some
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData
from rich.console import Console

from services import trace_view

MS = 1_000_000


def built(*spans: tuple[int, int, str, float, float, dict[str, object]]) -> bytes:
    """Spans as (id, parent id, name, start ms, end ms, attributes)."""
    data = TracesData()
    scope = data.resource_spans.add().scope_spans.add()
    for span_id, parent, name, start, end, facts in spans:
        span = scope.spans.add(trace_id=b"t" * 16, span_id=span_id.to_bytes(8), name=name)
        span.parent_span_id = parent.to_bytes(8) if parent else b""
        span.start_time_unix_nano = int(10**18 + start * MS)
        span.end_time_unix_nano = int(10**18 + end * MS)
        for key, value in facts.items():
            one = span.attributes.add(key=key)
            if isinstance(value, str):
                one.value.string_value = value
            elif isinstance(value, int):
                one.value.int_value = value
            else:
                one.value.double_value = value
    return data.SerializeToString()


def stage(name: str, index: int, count: int, compute_s: float) -> tuple[str, dict[str, object]]:
    facts: dict[str, object] = {
        "mesh.worker": f"stage-{index}",
        "mesh.stage.index": index,
        "mesh.step.count": count,
        "mesh.tokens": count,
        "mesh.compute_s": compute_s,
        "mesh.queue_s": 0.001,
        "mesh.bytes_out": 2048,
    }
    return name, facts


@pytest.fixture
def answer() -> bytes:
    request = {"mesh.request.id": "7f3a0000-0000-4000-8000-000000000000"}
    usage = {"gen_ai.usage.input_tokens": 12, "gen_ai.usage.output_tokens": 40}
    prefill, prefill_facts = stage("stage.prefill", 0, 1, 0.09)
    decode, decode_facts = stage("stage.decode", 1, 39, 0.4)
    shared = {"mesh.step.count": 39, "mesh.tokens": 39, "mesh.batch.mean": 1.5}
    return built(
        (1, 0, "a.v1.GenerationService/Generate", 0, 1000, {"rpc.response.status_code": "OK"}),
        (2, 1, "chat smollm2", 0, 1000, {"gen_ai.operation.name": "chat", **request, **usage}),
        (3, 2, "queue", 1, 10, request),
        (4, 2, "prefill", 10, 200, {"mesh.step.count": 1, "mesh.tokens": 12}),
        (5, 2, "decode", 200, 1000, shared),
        (6, 2, prefill, 12, 100, prefill_facts),
        (7, 2, decode, 210, 990, decode_facts),
        (8, 2, "recovery reroute", 400, 600, {"mesh.recovery.cause": "STAGE_UNREACHABLE"}),
    )  # fmt: skip


def printed(traces: bytes, width: int = 200) -> list[str]:
    target = io.StringIO()
    trace_view.print_trace(traces, Console(file=target, width=width, color_system=None))
    return target.getvalue().splitlines()


def test_every_span_is_a_line_and_no_line_is_wider_than_a_hundred_columns(answer: bytes):
    lines = printed(answer)
    for name in ("Generate", "chat smollm2", "queue", "prefill", "decode", "recovery reroute"):
        assert sum(name in line.split("█")[0] for line in lines) >= 1, name
    assert max(len(line) for line in lines) <= trace_view.WIDTH
    assert printed(answer, width=80) == lines, "a narrow terminal or a pipe loses nothing"
    assert "7f3a0000-0000-4000-8000-000000000000" in lines[0]


def test_bars_lie_where_the_time_went(answer: bytes):
    lines = printed(answer)
    (decode,) = [line for line in lines if line.strip().startswith("decode")]
    bar = decode[trace_view.NAME_COLUMNS + 1 :][: trace_view.BAR_COLUMNS]
    first = len(bar) - len(bar.lstrip())
    assert first == pytest.approx(0.2 * trace_view.BAR_COLUMNS, abs=1)
    assert bar.rstrip().endswith("█")
    assert "800 ms" in decode
    assert "39 st 39 tok ×1.5" in decode


def test_stages_are_summed_up(answer: bytes):
    lines = printed(answer)
    (row,) = [line for line in lines if "stage-1 decode" in line and "ms" in line and "39" in line]
    assert "400 ms" in row
    assert "10.3 ms" in row
    assert "2.0 KiB" in row


def test_a_trace_without_workers_or_generation_still_prints():
    lines = printed(built((1, 0, "alone", 0, 5, {})))
    assert any("alone" in line and "5 ms" in line for line in lines)
    assert printed(TracesData().SerializeToString()) == ["no spans"]


def test_spans_of_another_clock_are_clipped_to_the_axis():
    lines = printed(
        built(
            (1, 0, "chat m", 0, 100, {"gen_ai.operation.name": "chat"}),
            (2, 1, "stage.decode", -5000, 9000, {"mesh.worker": "far"}),
        )
    )
    assert max(len(line) for line in lines) <= trace_view.WIDTH


@given(some.floats(-2, 3), some.floats(-2, 3), some.integers(1, 80))
def test_a_bar_always_fills_its_columns_and_is_always_visible(
    start: float, end: float, columns: int
):
    drawn = trace_view.bar(min(start, end), max(start, end), columns)
    assert len(drawn) == columns
    assert drawn.strip()


def test_durations_and_sizes_read_well():
    shown = [trace_view.duration(seconds) for seconds in (0.000_012, 0.000_4, 0.0123, 1.234, 125)]
    assert shown == ["12 µs", "0.4 ms", "12.3 ms", "1.23 s", "2 m 05 s"]
    assert [trace_view.size(count) for count in (5, 1536, 3 << 20)] == ["5 B", "1.5 KiB", "3.0 MiB"]
