"""`stagemesh trace`: one request's spans as a waterfall in the terminal.

A line per span: name (indented below its parent), a bar on the request's own time axis, how long it
took, and what it stands for. Below, a line per stage: steps, compute, waiting, bytes. Spans of
other hosts lie where their clocks say, clipped to the axis; durations are theirs and exact. Fits
WIDTH columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status, TracesData
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

WIDTH = 100
NAME_COLUMNS = 34
TIME_COLUMNS = 9
NOTE_COLUMNS = 20
BAR_COLUMNS = WIDTH - NAME_COLUMNS - TIME_COLUMNS - NOTE_COLUMNS - 3
EIGHTHS = "▏▎▍▌▋▊▉█"

Value = str | int | float | bool
_STYLES = {
    "recovery": "yellow",
    "stage.": "cyan",
    "prefill": "blue",
    "decode": "green",
    "shadow": "magenta",
}


@dataclass(slots=True)
class TraceSpan:
    """One span. Times in nanoseconds since 1970."""

    span_id: bytes
    parent_id: bytes
    name: str
    start_ns: int
    end_ns: int
    failed: bool
    facts: Mapping[str, Value]
    service: str
    children: list[TraceSpan] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return max(0, self.end_ns - self.start_ns) / 1e9

    def number(self, name: str) -> float:
        """A numeric attribute; 0 if there is none."""
        value = self.facts.get(name, 0)
        return float(value) if isinstance(value, int | float) else 0.0


def read_spans(traces: bytes) -> list[TraceSpan]:
    """The roots of serialized TracesData, children below them, by start."""
    found: dict[bytes, TraceSpan] = {}
    for of_resource in TracesData.FromString(traces).resource_spans:
        resource = {one.key: _value(one.value) for one in of_resource.resource.attributes}
        for of_scope in of_resource.scope_spans:
            for span in of_scope.spans:
                found[span.span_id] = _read(span, str(resource.get("service.name", "")))
    roots: list[TraceSpan] = []
    for one in found.values():
        parent = found.get(one.parent_id)
        (roots if parent is None or parent is one else parent.children).append(one)
    for one in found.values():
        one.children.sort(key=lambda child: (child.start_ns, child.end_ns))
    return sorted(roots, key=lambda root: root.start_ns)


def _read(span: Span, service: str) -> TraceSpan:
    return TraceSpan(
        span.span_id,
        span.parent_span_id,
        span.name,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        span.status.code == Status.STATUS_CODE_ERROR,
        {one.key: _value(one.value) for one in span.attributes},
        service,
    )


def _value(value: AnyValue) -> Value:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return ", ".join(str(_value(one)) for one in value.array_value.values)
    if kind in {"string_value", "int_value", "double_value", "bool_value"}:
        plain: Value = getattr(value, kind)
        return plain
    return ""


def walk(spans: list[TraceSpan], depth: int = 0) -> Iterator[tuple[int, TraceSpan]]:
    """Every span with its depth, parents first."""
    for one in spans:
        yield depth, one
        yield from walk(one.children, depth + 1)


def duration(seconds: float) -> str:
    """``0.412 ms``, ``12.3 ms``, ``1.23 s``, ``2 m 05 s``."""
    if seconds >= 60:
        return f"{int(seconds // 60)} m {int(seconds % 60):02d} s"
    if seconds >= 1:
        return f"{seconds:.2f} s"
    milliseconds = seconds * 1000
    return f"{milliseconds:.3g} ms" if milliseconds >= 0.1 else f"{milliseconds * 1000:.3g} µs"


def size(count: float) -> str:
    """``512 B``, ``1.5 KiB``, ``3.2 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def bar(start: float, end: float, columns: int = BAR_COLUMNS) -> str:
    """A bar from ``start`` to ``end`` (fractions of the axis), at least an eighth of a column
    wide.
    """
    start, end = min(max(start, 0.0), 1.0), min(max(end, 0.0), 1.0)
    first = min(int(start * columns), columns - 1)
    eighths = max(1, round((end * columns - first) * 8))
    whole, rest = divmod(min(eighths, (columns - first) * 8), 8)
    return (" " * first + "█" * whole + (EIGHTHS[rest - 1] if rest else "")).ljust(columns)


def _note(one: TraceSpan) -> str:
    """What a span stands for, in a few words."""
    if one.name.startswith("recovery"):
        return f"{one.facts.get('mesh.recovery.cause', '')}".lower()
    if count := int(one.number("mesh.step.count")):
        tokens = int(one.number("mesh.tokens"))
        batch = one.number("mesh.batch.mean")
        shared = f" ×{batch:g}" if batch > 1 else ""
        return f"{count} st {tokens} tok{shared}"
    if tokens := int(one.number("mesh.tokens")):
        return f"{tokens} tok"
    if "gen_ai.usage.output_tokens" in one.facts:
        prompt = one.number("gen_ai.usage.input_tokens")
        return f"{prompt:.0f} → {one.number('gen_ai.usage.output_tokens'):.0f} tok"
    return str(one.facts.get("rpc.response.status_code", ""))


def _label(depth: int, one: TraceSpan) -> str:
    name = one.name.rpartition(".")[2] if "/" in one.name else one.name
    if one.name.startswith("stage."):
        name = f"{one.name} {one.facts.get('mesh.worker', one.service)}"
    text = "  " * min(depth, 8) + name
    return text if len(text) <= NAME_COLUMNS else text[: NAME_COLUMNS - 1] + "…"


def _style(one: TraceSpan) -> str:
    if one.failed:
        return "red"
    return next((style for start, style in _STYLES.items() if one.name.startswith(start)), "white")


def waterfall(roots: list[TraceSpan]) -> RenderableType:
    """The bars."""
    spans = list(walk(roots))
    axis = next((one for _, one in spans if "gen_ai.operation.name" in one.facts), roots[0])
    start, length = axis.start_ns, max(1, axis.end_ns - axis.start_ns)
    lines = [Text(f"{'':{NAME_COLUMNS}} 0{duration(length / 1e9):>{BAR_COLUMNS - 1}}", style="dim")]
    for depth, one in spans:
        begin, end = (one.start_ns - start) / length, (one.end_ns - start) / length
        line = Text(f"{_label(depth, one):{NAME_COLUMNS}} ")
        line.append(bar(begin, end), style=_style(one))
        line.append(f" {duration(one.seconds):>{TIME_COLUMNS}} ")
        line.append(_note(one)[:NOTE_COLUMNS], style="dim")
        lines.append(line)
    return Group(*lines)


def stage_totals(roots: list[TraceSpan]) -> Table | None:
    """A line per stage and phase; None if no worker's span is there."""
    sums: dict[tuple[int, str, str], dict[str, float]] = {}
    for _, one in walk(roots):
        if not one.name.startswith("stage."):
            continue
        worker = str(one.facts.get("mesh.worker", one.service))
        key = (int(one.number("mesh.stage.index")), worker, one.name.removeprefix("stage."))
        total = sums.setdefault(key, {})
        for name in ("step.count", "compute_s", "queue_s", "transfer_s", "bytes_in", "bytes_out"):
            total[name] = total.get(name, 0.0) + one.number(f"mesh.{name}")
    if not sums:
        return None
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), width=WIDTH)
    table.add_column("stage")
    for name in ("steps", "compute", "per step", "queue", "transfer", "in", "out"):
        table.add_column(name, justify="right")
    order = {"prefill": 0, "decode": 1}
    for (index, worker, phase), total in sorted(
        sums.items(), key=lambda item: (item[0][0], item[0][1], order.get(item[0][2], 2))
    ):
        steps = total["step.count"]
        table.add_row(
            f"{index} {worker} {phase}",
            f"{steps:.0f}",
            duration(total["compute_s"]),
            duration(total["compute_s"] / max(1.0, steps)),
            duration(total["queue_s"]),
            duration(total["transfer_s"]) if total["transfer_s"] else "",
            size(total["bytes_in"]),
            size(total["bytes_out"]),
        )
    return table


def render(traces: bytes) -> RenderableType:
    """Everything `stagemesh trace` prints for serialized TracesData."""
    roots = read_spans(traces)
    if not roots:
        return Text("no spans")
    generation = next((one for _, one in walk(roots) if "mesh.request.id" in one.facts), roots[0])
    request = generation.facts.get("mesh.request.id", "?")
    head = Text(f"request {request}   {len(list(walk(roots)))} spans", style="bold")
    totals = stage_totals(roots)
    parts: list[RenderableType] = [head, waterfall(roots)]
    if totals is not None:
        parts.append(totals)
    return Group(*parts)


def print_trace(traces: bytes, console: Console | None = None) -> None:
    """Print the waterfall, WIDTH columns wide whatever the terminal or file is."""
    target = console or Console(highlight=False)
    target.width = max(WIDTH, target.width)
    target.print(render(traces))
