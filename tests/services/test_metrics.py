"""Numbers by OpenTelemetry's names, in label sets that cannot grow."""

import asyncio
import itertools
import re
import threading
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from coordinator.instructions import AcceptTokens, FinishRequest, RecoveryRecord, RequestSummary
from services import tracing
from services.metrics import OTHER, WORKERS_LABELLED_MAX, BoundedLabels, on_loop
from services.stage_telemetry import StepTiming
from services.telemetry import Role, Telemetry
from stagemesh.frame import FrameKind, StepFrame, StepRow
from stagemesh.token import TokenChunk

REQUEST = uuid.UUID(int=7).bytes


class Bench:
    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        self.now = 100.0
        self.telemetry = Telemetry(Role("test"), readers=[self.reader], clock=lambda: self.now)

    def points(self, name: str) -> list:
        data = self.reader.get_metrics_data()
        return [
            point
            for of_resource in (data.resource_metrics if data else ())
            for of_scope in of_resource.scope_metrics
            for metric in of_scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]


@pytest.fixture(autouse=True)
def nobody_calls():
    """No call of another test is left in this thread's context."""
    tracing.current_call.set(None)


@pytest.fixture
def bench():
    bench = Bench()
    yield bench
    bench.telemetry.shutdown()


class Sink:
    advice = ()

    def accept(self, instruction: object) -> None: ...
    def finish(self, instruction: object) -> None: ...


def token(index: int) -> TokenChunk:
    return TokenChunk(REQUEST, index, 1, 1, index + 1, 0.0, 0.0, 0, "s", bytes(16))


def frame(kind: FrameKind, step: int, stage: int = -1) -> StepFrame:
    return StepFrame(kind, bytes(8), 1, step, stage, stage + 1, (StepRow(REQUEST, step, (1,)),))


def test_a_request_is_measured_from_received_to_the_last_token(bench: Bench):
    requests = bench.telemetry.requests
    requests.request_received(REQUEST, {}, "tiny")
    sink = requests.watch(REQUEST, Sink())
    bench.now += 0.2
    requests.step_sent(frame(FrameKind.PREFILL, 1), bench.now)
    bench.now += 0.3
    requests.step_returned(frame(FrameKind.PREFILL, 1), bench.now, 0.3)
    sink.accept(AcceptTokens(REQUEST, 0, (token(0),)))
    for index in (1, 2):
        bench.now += 0.05
        requests.step_returned(frame(FrameKind.DECODE, index + 1), bench.now, 0.05)
        sink.accept(AcceptTokens(REQUEST, index, (token(index),)))
    recovery = RecoveryRecord("CACHE_LOST", "replay", "stage-0", (), (), 1, 1, 1, 0.1)
    sink.finish(FinishRequest(REQUEST, "stop", RequestSummary(9, 3, (), (recovery,))))
    sums = {
        "gen_ai.server.time_to_first_token": (0.5, 1),
        "gen_ai.server.time_per_output_token": (0.1, 2),
        "gen_ai.server.request.duration": (0.6, 1),
        "mesh.request.queue.duration": (0.2, 1),
    }
    for name, (total, count) in sums.items():
        (point,) = bench.points(name)
        assert (point.sum, point.count) == (pytest.approx(total), count), name
    usage = {
        p.attributes["gen_ai.token.type"]: p.sum for p in bench.points("gen_ai.client.token.usage")
    }
    assert usage == {"input": 9, "output": 3}
    (recovered,) = bench.points("mesh.recoveries")
    assert recovered.attributes == {
        "mesh.recovery.cause": "CACHE_LOST",
        "mesh.recovery.action": "replay",
    }


def test_a_stage_is_measured_by_phase(bench: Bench):
    timing = StepTiming(1.0, compute_s=0.02, queue_s=0.001, bytes_in=10, bytes_out=20)
    bench.telemetry.stage.observe(frame(FrameKind.PREFILL, 1, stage=1), timing)
    bench.telemetry.stage.observe(frame(FrameKind.DECODE, 2, stage=1), timing)
    phases = {
        p.attributes["mesh.phase"]: p.sum for p in bench.points("mesh.stage.compute.duration")
    }
    assert phases == {"prefill": pytest.approx(0.02), "decode": pytest.approx(0.02)}
    moved = {p.attributes["mesh.hop"]: p.value for p in bench.points("mesh.hop.io")}
    assert moved == {"stage-in": 20, "stage-out": 40}


def test_the_rows_of_a_step_are_the_requests_in_it(bench: Bench):
    one = frame(FrameKind.DECODE, 1)
    others = tuple(replace(one.rows[0], request=uuid.UUID(int=n).bytes) for n in (8, 9))
    bench.telemetry.requests.step_returned(replace(one, rows=one.rows + others), 101.0, 0.1)
    bench.telemetry.requests.step_returned(one, 102.0, 0.1)
    (rows,) = bench.points("mesh.step.rows")
    assert (rows.count, rows.sum, rows.min, rows.max) == (2, 4, 1, 3)
    assert rows.attributes == {"mesh.phase": "decode"}


def test_guards_cache_and_requests_are_read_when_asked_for(bench: Bench):
    metrics = bench.telemetry.metrics
    metrics.observe_guards(lambda: {"stage-0": {"frames_checked": 5}, "stage-1": {}})
    metrics.observe_kv(lambda: {"stage-0": (10, 100)})
    metrics.observe_requests(lambda: {"running": 2, "queued": 1, "unheard of": 9})
    (guard,) = bench.points("mesh.guard.events")
    assert guard.value == 5
    assert guard.attributes == {"mesh.worker": "stage-0", "mesh.guard": "frames_checked"}
    assert [point.value for point in bench.points("mesh.kv.limit")] == [100]
    assert {p.attributes["mesh.request.state"] for p in bench.points("mesh.requests")} == {
        "running", "queued"
    }  # fmt: skip


def test_a_clock_that_steps_back_records_no_negative_time(bench: Bench, caplog):
    requests = bench.telemetry.requests
    requests.request_received(REQUEST, {}, "tiny")
    sink = requests.watch(REQUEST, Sink())
    for index, now in enumerate((101.0, 100.9, 101.2)):
        bench.now = now
        sink.accept(AcceptTokens(REQUEST, index, (token(index),)))
    (point,) = bench.points("gen_ai.server.time_per_output_token")
    assert (point.count, point.sum) == (2, pytest.approx(0.2))
    assert "non-negative" not in caplog.text


def test_a_stages_time_is_accounted_for_with_the_wait_between_steps(bench: Bench):
    for finished in (1.0, 1.5):
        timing = StepTiming(finished, compute_s=0.1, queue_s=0.02, transfer_s=0.01)
        bench.telemetry.stage.observe(frame(FrameKind.DECODE, 1, stage=1), timing)
    found = {p.attributes["mesh.stage.activity"]: p.value for p in bench.points("mesh.stage.time")}
    assert found == {
        "compute": pytest.approx(0.2),
        "queue": pytest.approx(0.04),
        "transfer": pytest.approx(0.02),
        "wait": pytest.approx(0.4),
    }


def test_time_spent_on_checking_is_read_by_tier_and_is_no_guards_event(bench: Bench):
    counters = {"validation_us.integrity": 2_000_000, "validation_us.made_up": 5, "frames_held": 1}
    bench.telemetry.metrics.observe_guards(lambda: {"stage-0": counters})
    (spent,) = bench.points("mesh.validation.time")
    assert spent.value == 2.0
    assert spent.attributes == {"mesh.worker": "stage-0", "mesh.validation.tier": "integrity"}
    (event,) = bench.points("mesh.guard.events")
    assert event.attributes["mesh.guard"] == "frames_held"


def test_time_waited_at_barriers_is_read_by_how_they_ended_and_is_no_guards_event(bench: Bench):
    counters = {"barrier_wait_us.complete": 250_000, "barrier_wait_us.forming": 7}
    bench.telemetry.metrics.observe_guards(lambda: {"coordinator": counters})
    (waited,) = bench.points("mesh.barrier.wait")
    assert waited.value == 0.25
    assert waited.attributes == {"mesh.worker": "coordinator", "mesh.barrier.state": "complete"}
    assert bench.points("mesh.guard.events") == []


def test_the_lag_of_the_watermark_is_the_largest_and_the_sum(bench: Bench):
    bench.telemetry.metrics.observe_lag(lambda: [3, 5])
    found = {p.attributes["mesh.lag"]: p.value for p in bench.points("mesh.watermark.lag")}
    assert found == {"largest": 5, "sum": 8}


def test_a_reading_that_changes_underneath_is_left_out_not_raised(bench: Bench):
    def changing() -> dict[str, dict[str, int]]:
        raise RuntimeError("dictionary changed size during iteration")

    bench.telemetry.metrics.observe_guards(changing)
    assert bench.points("mesh.guard.events") == []


def test_numbers_of_the_event_loop_are_read_on_the_event_loop():
    async def scenario() -> tuple[int, int]:
        read = on_loop(asyncio.get_running_loop(), threading.get_ident)
        return await asyncio.to_thread(read), threading.get_ident()

    there, here = asyncio.run(scenario())
    assert there == here


def test_a_loop_that_has_ended_or_is_busy_gives_no_numbers(bench: Bench):
    async def nothing() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    ended = asyncio.run(nothing())
    bench.telemetry.metrics.observe_requests(on_loop(ended, lambda: {"running": 1}))
    idle = asyncio.new_event_loop()  # never runs, so it never gets to it
    late = on_loop(idle, lambda: {"stage-0": (1, 2)}, timeout_s=0.01)
    bench.telemetry.metrics.observe_kv(late)
    assert bench.points("mesh.requests") == bench.points("mesh.kv.tokens") == []
    idle.close()


def test_no_peer_can_make_the_label_sets_grow(bench: Bench):
    metrics = bench.telemetry.metrics
    workers = {f"worker-{number}": {"x": 1} for number in range(WORKERS_LABELLED_MAX + 50)}
    metrics.observe_guards(lambda: workers)
    points = bench.points("mesh.guard.events")
    assert len(points) == WORKERS_LABELLED_MAX + 1
    assert {p.value for p in points if p.attributes["mesh.worker"] == OTHER} == {50}
    metrics.recovered("made up by a peer", "likewise")
    (point,) = bench.points("mesh.recoveries")
    assert set(point.attributes.values()) == {OTHER}


def test_the_first_values_are_labels_and_the_rest_are_other():
    labels = BoundedLabels(2)
    assert [labels(value) for value in "abca"] == ["a", "b", OTHER, "a"]


def created() -> dict[str, str]:
    """Every instrument that is made, and its unit."""
    from services import metrics

    found: dict[str, str] = {}

    class Recorder:
        def __getattr__(self, name: str):
            def create(name: str, *args: object, unit: str = "", **kwargs: object) -> None:
                found[name] = unit

            return create

    recorded = metrics.MeshMetrics(Recorder())
    recorded.observe_guards(dict)
    recorded.observe_kv(dict)
    recorded.observe_requests(dict)
    recorded.observe_lag(list)
    return found


def test_every_metric_the_docstring_names_exists_in_its_unit_and_no_other():
    from services import metrics

    documented: dict[str, str] = {}
    for line in (metrics.__doc__ or "").splitlines():
        words = line.replace(",", "").split()
        names = list(itertools.takewhile(lambda word: "." in word, words))
        if line.startswith("    "):
            documented |= dict.fromkeys(names, words[len(names)])
    assert documented
    assert {name: unit.strip("{}") for name, unit in created().items()} == documented
    bare = {unit for unit in created().values() if not unit.startswith("{")}
    assert bare == {"s", "By"}, "what is counted stands in braces"


def test_the_operations_page_has_every_metric_in_its_unit():
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    documented: dict[str, str] = {}
    for names, units in re.findall(r"^\| (`[a-z_`., ]+`) \| ([\w, ]+) \|", page, re.MULTILINE):
        metrics = [name for name in re.findall(r"`([\w.]+)`", names) if "." in name]
        spoken = units.split(", ")
        documented |= dict(zip(metrics, spoken if len(spoken) > 1 else spoken * 9, strict=False))
    assert {name: unit.strip("{}") for name, unit in created().items()} == documented
