"""Benchmarks: the arithmetic of results, the JSON that scripts rely on, and one tiny run of all."""

import asyncio
import json
import random
from dataclasses import replace

import pytest

from services import cli
from services.bench import memory, neighbours, overhead, plots, report
from services.bench.null_stage import NullStage, token_at
from services.bench.results import Result, failed, measured, paired, percent_of, percentile
from services.bench.run import MEASUREMENTS, SUITES, Bench, Measurement
from services.bench.sides import Sizes, Timeline, default_settings, take_turns
from stagemesh.errors import MeshError, RouteUnavailable
from stagemesh.frame import FrameKind, RowStatus

FIELDS = ("name", "ours", "baseline", "ratio", "unit", "higher_is_better", "spread")
CONTRACT = {
    "decode_single",
    "ttft_512",
    "prefill_1024",
    "batch_16",
    "batch_32",
    "admission_gap",
    "overhead_integrity",
    "overhead_numeric",
    "overhead_tracing",
    "overhead_shadow",
    "coordinator_tokens",
    "coordinator_latency_p99",
    "idle_streams_1000",
    "failover_gap_sigkill",
    "failover_gap_sigstop",
    "failover_notice_sigkill",
    "failover_notice_sigstop",
}


def rate(name, ours, baseline):
    return paired(name, ours, baseline, unit="tokens/s", higher_is_better=True)


def test_the_ratio_is_that_of_neighbouring_turns_so_that_drift_cannot_move_it():
    found = rate("x", [10.0, 20.0, 40.0], [20.0, 40.0, 80.0])
    assert (found.ours, found.baseline, found.ratio, found.spread) == (20.0, 40.0, 0.5, 0.0)


def test_spread_is_the_distance_of_the_quartiles_over_the_median():
    found = measured("x", [8.0, 9.0, 10.0, 11.0, 12.0], unit="s", higher_is_better=False)
    assert found.ours == 10.0
    assert found.spread == pytest.approx(0.2)
    assert measured("x", [8.0], unit="s", higher_is_better=False).spread is None


def test_a_percentile_is_a_value_that_was_seen():
    values = [float(value) for value in range(1, 101)]
    assert percentile(values, 99.0) == 99.0
    assert percentile([5.0], 99.0) == 5.0
    assert percent_of(0.001, 0.1) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "ours", "baseline", "met"),
    [
        ("decode_single", 0.96, 1.0, True),
        ("decode_single", 0.94, 1.0, False),
        ("ttft_512", 0.99, 1.0, True),
        ("ttft_512", 1.01, 1.0, False),
        ("batch_32", 1.2, 1.0, True),
        ("batch_32", 1.1, 1.0, False),
    ],
)
def test_a_target_on_the_ratio_is_judged_in_its_own_direction(name, ours, baseline, met):
    found = rate(name, [ours], [baseline]).as_json()
    assert found["met"] is met


def test_a_target_on_our_own_figure_needs_no_baseline():
    slow = measured("coordinator_tokens", [4999.0], unit="tokens/s", higher_is_better=True)
    fast = measured("coordinator_tokens", [5000.0], unit="tokens/s", higher_is_better=True)
    assert (slow.met, fast.met) == (False, True)


def test_every_result_has_the_stable_fields_in_json_and_no_number_that_json_lacks():
    shown = [
        rate("decode_single", [1.0], [2.0]).as_json(),
        failed("batch_16", "it broke").as_json(),
        Result("x", float("inf"), None, float("nan"), "s", True, None).as_json(),
    ]
    for one in shown:
        assert tuple(one)[: len(FIELDS)] == FIELDS
        json.dumps(one, allow_nan=False)
    assert shown[1]["error"] == "it broke"
    assert shown[1]["met"] is None


def test_the_suites_together_owe_every_result_of_the_contract():
    owed = {name for one in MEASUREMENTS for name in one.names}
    assert owed >= CONTRACT
    suites = {"single", "prefill", "batch", "overhead", "coordinator", "failover", "memory"}
    assert set(SUITES) == suites
    assert all((one.on_sides is None) is not (one.alone is None) for one in MEASUREMENTS)


def test_a_and_b_take_turns_and_the_first_turn_does_not_count():
    order = []

    def side(name):
        async def turn(index):
            order.append(name)
            return float(len(order))

        return turn

    mine, others = asyncio.run(take_turns(2, side("A"), side("B")))
    assert order == list("ABABAB")
    assert (mine, others) == ([3.0, 5.0], [4.0, 6.0])


def test_a_timeline_counts_from_the_first_token():
    seen = Timeline(began=1.0, arrivals=[3.0, 3.5, 4.0, 6.0], tokens=[1, 2, 3, 4])
    assert seen.ttft_s == 2.0
    assert seen.decode_tokens_per_s == 1.0
    assert seen.gaps() == [0.5, 0.5, 2.0]
    assert seen.gaps(3.6, 5.0) == [0.5]


def test_a_measurement_that_fails_is_a_result_that_says_so_and_the_others_go_on():
    async def breaks(_settings, _sizes, _report):
        raise MeshError("no such luck")

    async def works(_settings, _sizes, _report):
        return [measured("fine", [1.0], unit="s", higher_is_better=False)]

    bench = Bench(default_settings({}), Sizes.quick(), say=lambda _line: None)
    asyncio.run(bench._take(Measurement("s", ("a", "b"), alone=breaks), breaks(0, 0, 0)))
    asyncio.run(bench._take(Measurement("s", ("fine",), alone=works), works(0, 0, 0)))
    assert [one.name for one in bench.results] == ["a", "b", "fine"]
    assert [bool(one.error) for one in bench.results] == [True, True, False]
    assert not bench.ok


def test_what_is_told_from_an_earlier_measurement_has_the_neighbours_of_that_one(monkeypatch):
    async def works(name):
        return [measured(name, [1.0], unit="s", higher_is_better=False)]

    moments = [(0.0, 0.0), (10.0, 8.0), (10.0, 8.0), (10.01, 8.02), (10.01, 8.02), (20.0, 8.02)]
    readings = iter([neighbours.Reading(at, busy, 0.0) for at, busy in moments])
    monkeypatch.setattr(neighbours, "read", lambda: next(readings))
    bench = Bench(default_settings({}), Sizes.quick(), say=lambda _line: None)
    bench._cores = 2
    for name in ("first", "told", "quiet"):
        asyncio.run(bench._take(Measurement("s", (name,)), works(name)))
    assert [one.others_cpu for one in bench.results] == [0.4, 0.4, 0.0]


def test_sides_that_do_not_start_fail_every_result_they_owe(monkeypatch):
    class Broken:
        async def __aenter__(self):
            raise RouteUnavailable("nothing listens")

        async def __aexit__(self, *_error):
            return False

    bench = Bench(default_settings({}), Sizes.quick(), say=lambda _line: None)
    monkeypatch.setattr(bench, "_sides", Broken)
    asyncio.run(bench.run(("single",)))
    assert {one.name for one in bench.results} == {"decode_single", "ttft_512", "ttft_1024"}
    assert all("nothing listens" in one.error for one in bench.results)


def test_the_page_names_what_was_missed_and_where_it_was_measured():
    document = {
        "results": [
            rate("decode_single", [0.5], [1.0]).as_json(),
            rate("batch_16", [3.0], [2.0]).as_json(),
            failed("ttft_512", "the mesh was not ready").as_json(),
        ],
        "environment": {"model": "smollm2", "cores": 2, "blas": "OpenBLAS", "load_before": 3.0},
    }
    page = report.page(document)
    assert "1 of 2 goals are met" in page
    assert "**Missed:** One stream, decoding" in page
    assert "**Failed:** First token, 512-token prompt: the mesh was not ready" in page
    assert "| model | smollm2 |" in page


def test_plots_are_svg_with_one_bar_per_ratio(tmp_path):
    document = {"results": [rate("batch_16", [3.0, 3.1], [2.0, 2.0]).as_json()]}
    written = plots.plot(document, tmp_path)
    assert all(path.read_text().startswith("<svg") for path in written)
    assert written[0].read_text().count("<rect") == 2


def test_the_checks_that_are_measured_are_the_ones_that_reject_damage():
    step = overhead.a_step()
    overhead.verify(step.to_second, fingerprint=overhead.FINGERPRINT)
    assert all(frame.header_crc32c for frame in step.hops)
    for checks in (overhead.integrity_checks(), overhead.numeric_checks()):
        assert all(check() is not False for check in checks.values())


def test_null_stages_answer_with_marks_and_a_chained_token():
    first, last = NullStage("null-0"), NullStage("null-1")
    first.open(0, 2)
    last.open(1, 2)
    frame = last.step(first.step(overhead.a_step().to_first))
    row = frame.rows[0]
    assert frame.kind is FrameKind.DECODE
    assert row.status is RowStatus.OK
    assert len(row.marks) == 2
    assert row.token.token_id == token_at(row.end_position)
    row.token.verify()


def test_an_unknown_suite_is_bad_usage(capsys):
    for suite in ("everything", "single,everything"):
        assert cli.main(["bench", "--suite", suite]) == 2
        assert "no suite 'everything'" in capsys.readouterr().err


def test_a_saved_run_becomes_a_page_without_measuring_again(tmp_path, capsys):
    run = {"results": [rate("batch_16", [3.0], [2.0]).as_json()], "environment": {"cores": 2}}
    saved, page = tmp_path / "run.json", tmp_path / "page.md"
    saved.write_text(json.dumps(run))
    assert cli.main(["bench", "--from", str(saved), "--write", str(page)]) == 0
    assert "16 streams" in page.read_text()
    assert "batch_16" in capsys.readouterr().out
    saved.write_text("{}")
    assert cli.main(["bench", "--from", str(saved)]) == 2


@pytest.mark.slow
def test_one_tiny_run_through_both_sides_gives_every_figure_and_the_same_tokens(capsys):
    code = cli.main(["bench", "--suite", "single", "--quick", "--model", "tiny", "--json"])
    run = json.loads(capsys.readouterr().out)
    assert code == 0
    assert [one["name"] for one in run["results"]] == ["decode_single", "ttft_512", "ttft_1024"]
    assert all(one["ratio"] > 0 for one in run["results"])
    assert run["results"][0]["note"].startswith("3 of 3 answers token for token")
    for fact in ("model", "dtype", "blas", "threads", "cores", "python", "mlx", "mlx_lm", "grpcio"):
        assert run["environment"][fact]


def test_a_process_that_grows_is_told_from_one_that_jitters():
    readings = memory.Readings()
    draw = random.Random(1)
    for index in range(60):
        readings.answered.append(100.0 * index)
        start = 900.0 * min(index, 20)  # caches fill first
        readings.rss_kib.setdefault("leaks", []).append(50_000 + start + 20.0 * index)
        readings.rss_kib.setdefault("level", []).append(60_000 + start + draw.gauss(0, 50))
    slopes = readings.slopes()
    assert slopes["leaks"].slope == pytest.approx(200.0)
    assert not slopes["leaks"].is_noise
    assert slopes["level"].is_noise
    found = memory.result_of(readings, 6000)
    assert found.ours == pytest.approx(200.0)
    assert "leaks +200 ± 0" in found.note
    assert "(noise)" in found.note


def test_a_line_needs_points_to_have_a_slope():
    assert memory.Slope.of([0, 1, 2], [1, 3, 5]).slope == 2.0
    with pytest.raises(ValueError, match="three points"):
        memory.Slope.of([0, 1], [1, 2])
    with pytest.raises(ValueError, match="one place"):
        memory.Slope.of([1, 1, 1], [1, 2, 3])
    assert memory.result_of(memory.Readings(), 10).error


@pytest.mark.timeout(300)
def test_memory_is_read_of_every_process_while_requests_are_answered():
    sizes = replace(Sizes.quick(), memory_requests=120)
    settings = default_settings({"model": "tiny"})
    (found,) = asyncio.run(memory.growth(settings, sizes, lambda _line: None))
    assert not found.error, found.error
    assert found.unit == "KiB per 1,000 requests"
    for process in ("coordinator", "stage-0", "stage-1", "full-worker"):
        assert process in found.note
