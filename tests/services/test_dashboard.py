"""The shipped dashboard asks for metrics and labels that a scrape really has."""

import json
import re
import socket
import urllib.request
import uuid
from pathlib import Path

import pytest

from coordinator.instructions import (
    AcceptTokens,
    FailRequest,
    FinishRequest,
    RecoveryRecord,
    RequestSummary,
)
from services.stage_telemetry import StepTiming
from services.telemetry import Role, TraceStore, start_telemetry
from stagemesh.errors import CacheLost
from stagemesh.frame import FrameKind, StepFrame, StepRow
from stagemesh.token import TokenChunk

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana-dashboard.json"
REQUEST, FAILED = uuid.UUID(int=7).bytes, uuid.UUID(int=8).bytes
METRIC = re.compile(r"\b(?:gen_ai|mesh|rpc)_[a-z_]+\b")
SELECTOR = re.compile(r"\{([^{}]*)\}")
BY = re.compile(r"\bby\s*\(([^)]*)\)")
LEGEND = re.compile(r"\{\{(\w+)\}\}")


def expressions() -> list[tuple[str, str, str]]:
    """(panel, expression, legend) of every target."""
    document = json.loads(DASHBOARD.read_text())
    return [
        (panel["title"], target["expr"], target["legendFormat"])
        for panel in document["panels"]
        for target in panel["targets"]
    ]


def labels_of(expression: str, legend: str) -> set[str]:
    found = {part.strip() for group in BY.findall(expression) for part in group.split(",")}
    for inside in SELECTOR.findall(expression):
        found |= {part.split("=")[0].rstrip("!~ ") for part in inside.split(",") if "=" in part}
    return (found | set(LEGEND.findall(legend))) - {"le", ""}


def metrics_of(expression: str) -> set[str]:
    bare = BY.sub("", SELECTOR.sub("", expression))
    return set(METRIC.findall(bare))


def exercise(telemetry) -> None:
    """Something of everything that can be measured."""
    token = TokenChunk(REQUEST, 0, 1, 1, 1, 0.0, 0.0, 0, "s", bytes(16))
    requests, metrics = telemetry.requests, telemetry.metrics

    class Sink:
        advice = ()

        def accept(self, _instruction: object) -> None: ...
        def finish(self, _instruction: object) -> None: ...
        def fail(self, _instruction: object) -> None: ...

    for request in (REQUEST, FAILED):
        requests.request_received(request, {}, "tiny")
    sink, failing = requests.watch(REQUEST, Sink()), requests.watch(FAILED, Sink())
    for kind, step in ((FrameKind.PREFILL, 1), (FrameKind.DECODE, 2)):
        rows = (StepRow(REQUEST, step, (1,)),)
        frame = StepFrame(kind, bytes(8), 1, step, 1, 2, rows)
        requests.step_sent(frame, 1.0)
        requests.step_returned(frame, 2.0, 1.0)
        timing = StepTiming(float(step), 0.1, 0.01, 0.01, bytes_in=10, bytes_out=20)
        telemetry.stage.observe(frame, timing)
        sink.accept(AcceptTokens(REQUEST, step - 1, (token,)))
    recovery = RecoveryRecord("CACHE_LOST", "replay", "stage-0", (), (), 1, 1, 1, 0.1)
    sink.finish(FinishRequest(REQUEST, "stop", RequestSummary(9, 2, (), (recovery,))))
    failing.fail(FailRequest(FAILED, CacheLost("gone"), RequestSummary(9, 0)))
    metrics.rpc_ended("stagemesh.v1.GenerationService/Generate", "OK", 0.1)
    metrics.dropped.add(1)
    counters = {"frames_fenced": 1, "validation_us.integrity": 5, "barrier_wait_us.broken": 5}
    metrics.observe_guards(lambda: {"stage-0": counters})
    metrics.observe_kv(lambda: {"stage-0": (1, 2)})
    metrics.observe_requests(lambda: {"running": 1, "queued": 0})
    metrics.observe_lag(lambda: [1])


@pytest.fixture(scope="module")
def scrape() -> dict[str, set[str]]:
    """Labels by metric name, of a real scrape."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "OTEL_METRICS_EXPORTER": "prometheus",
        "OTEL_EXPORTER_PROMETHEUS_HOST": "127.0.0.1",
        "OTEL_EXPORTER_PROMETHEUS_PORT": str(port),
    }
    telemetry = start_telemetry(
        Role("test", worker="stage-1"), store=TraceStore(), environment=environment
    )
    try:
        exercise(telemetry)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
            text = answer.read().decode()
    finally:
        telemetry.shutdown()
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        match = re.match(r"(\w+)(?:\{(.*)\})? ", line)
        if match and not line.startswith("#"):
            names = set(re.findall(r'(\w+)="', match[2] or ""))
            found[match[1]] = found.get(match[1], set()) | names
    return found


@pytest.mark.parametrize(("panel", "expression", "legend"), expressions())
def test_a_panel_asks_for_what_a_scrape_has(scrape, panel: str, expression: str, legend: str):
    wanted = metrics_of(expression)
    assert wanted, f"{panel}: no metric in {expression}"
    assert wanted <= scrape.keys(), f"{panel}: {wanted - scrape.keys()}"
    labels = set().union(*(scrape[name] for name in wanted))
    assert labels_of(expression, legend) <= labels, f"{panel}: {labels_of(expression, legend)}"


def test_every_metric_of_the_mesh_is_on_the_dashboard(scrape):
    shown = {
        re.sub(r"_(bucket|sum|count)$", "", name)
        for _, e, _ in expressions()
        for name in metrics_of(e)
    }
    there = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in scrape}
    ours = {name for name in there if METRIC.fullmatch(name)}
    missing = {name for name in ours if name not in shown and name + "_total" not in shown}
    assert not missing


def test_panels_have_titles_units_and_their_own_places():
    document = json.loads(DASHBOARD.read_text())
    places = [(one["gridPos"]["x"], one["gridPos"]["y"]) for one in document["panels"]]
    assert len(set(places)) == len(places)
    assert len({one["id"] for one in document["panels"]}) == len(places)
    assert all(
        one["title"] and one["fieldConfig"]["defaults"]["unit"] for one in document["panels"]
    )


def test_a_metric_or_label_that_does_not_exist_would_be_found():
    assert metrics_of("sum by (mesh_worker) (rate(mesh_no_such_thing_total[1m]))") == {
        "mesh_no_such_thing_total"
    }
    assert labels_of('x{mesh_a="b"}', "{{mesh_c}}") == {"mesh_a", "mesh_c"}
