"""Benchmarks on paper: saved runs as one, the page, the pictures, the table beside llama.cpp."""

import asyncio
import json
import re
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from services import cli
from services.bench import live_checks, llama_cpp, neighbours, plots, report, saved, side_by_side
from services.bench.results import TARGETS, Result, failed, measured, paired
from services.bench.side_by_side import Rounds, Task
from stagemesh.errors import InvalidConfiguration

MACHINE = {
    "cores": 2,
    "platform": "Linux x86_64",
    "python_build": "optimized",
    "mlx": "0.32.4",
    "load_before": 0.1,
}
PREFILL, DECODE = Task("prefill", "prefill of 512"), Task("decode", "decode, one stream")


def rate(name, ours, baseline):
    return paired(name, [ours], [baseline], unit="tokens/s", higher_is_better=True).as_json()


def own(name, ours):
    return measured(name, [ours], unit="%", higher_is_better=False).as_json()


def run(*results, **facts):
    return {"results": list(results), "environment": MACHINE | facts}


def compared():
    rounds = Rounds(("split", "whole", "other"), {"system": ("split", "whole")})
    for split, whole, other in ((8.0, 10.0, 5.0), (4.0, 8.0, 5.0), (9.0, 9.0, 6.0)):
        for side, value in (("split", split), ("whole", whole), ("other", other)):
            rounds.add(PREFILL, side, value)
            rounds.add(DECODE, side, value / 10)
    return rounds.document("SmolLM2 <Q4_1>", (PREFILL, DECODE), {"file": "x.gguf"}, ["a note"])


# -- several runs make one ------------------------------------------------------------------------


def test_results_come_in_the_order_of_the_goals_whatever_that_of_the_runs():
    goals = ("decode_single", "batch_16", "coordinator_linear")
    runs = [run(rate("codec", 1.0, 1.0)), *(run(rate(name, 1.0, 1.0)) for name in reversed(goals))]
    merged = saved.merge(runs)
    assert tuple(one["name"] for one in merged["results"]) == (*goals, "codec")


def test_what_was_measured_twice_counts_as_it_was_measured_last():
    merged = saved.merge(
        [
            run(rate("batch_16", 1.0, 2.0), rate("batch_32", 1.0, 1.0)),
            run(rate("batch_16", 4.0, 2.0), load_before=2.5),
        ]
    )
    assert {one["name"]: one["ratio"] for one in merged["results"]} == {
        "batch_16": 2.0,
        "batch_32": 1.0,
    }
    assert merged["environment"]["load_before"] == 2.5


def test_the_page_shows_the_interval_of_a_difference_and_judges_all_of_it():
    near = Result(
        "overhead_switched", 0.9, None, None, "% of a decode step", False, None, interval=(0.4, 1.2)
    )
    assert near.as_json()["interval"] == [0.4, 1.2]
    page = report.page(run(near.as_json()))
    row = next(line for line in page.splitlines() if line.startswith("| All checks on and off"))
    assert "0.9 % of a decode step (0.4 to 1.2)" in row
    assert "≤ 1 (aim 0.1) | **missed**" in row
    clear = replace(near, interval=(0.85, 0.95))
    assert "| met, aim not |" in report.page(run(clear.as_json()))


@pytest.mark.parametrize(
    ("fact", "value"),
    [("cores", 4), ("mlx", "0.33.0"), ("platform", "Darwin arm64"), ("python_build", "plain")],
)
def test_runs_of_different_machines_or_versions_make_no_page(fact, value):
    with pytest.raises(InvalidConfiguration, match=f"{fact} is"):
        saved.merge([run(), run(**{fact: value})])


def test_runs_of_different_models_make_no_page_but_a_run_without_a_mesh_knows_none():
    mesh = {"spans": ["[0, 15)"], "model": "smollm2", "dtype": "f32"}
    bare = {"model": "smollm2", "dtype": "auto"}
    for order in ((mesh, bare), (bare, mesh)):
        merged = saved.merge([run(**facts) for facts in order])
        assert merged["environment"]["dtype"] == "f32"
    with pytest.raises(InvalidConfiguration, match="model is"):
        saved.merge([run(**mesh), run(**mesh | {"model": "tiny"})])


def test_a_comparison_that_was_repeated_replaces_the_one_before():
    first, second = compared(), compared() | {"notes": ["again"]}
    merged = saved.merge([run() | {"side_by_side": [first]}, run() | {"side_by_side": [second]}])
    assert merged["side_by_side"] == [second]
    assert "side_by_side" not in saved.merge([run()])


# -- the page -------------------------------------------------------------------------------------


def test_the_page_says_of_every_goal_whether_it_and_its_aim_are_met():
    page = report.page(
        run(
            rate("batch_16", 1.7, 1.0),
            rate("batch_32", 1.3, 1.0),
            rate("decode_single", 0.9, 1.0),
            own("overhead_tracing", 0.2),
        )
    )
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("|")}
    assert rows["16 streams of mixed lengths"].endswith("| met, aim too |")
    assert rows["32 streams of mixed lengths"].endswith("| met, aim not |")
    assert rows["One stream, decoding"].endswith("| – | ratio ≥ 0.95 (aim 1) | **missed** |")
    assert rows["Tracing, default sampling"].endswith("| – | ≤ 1 | met |")
    assert "3 of 4 goals are met." in page


def test_the_page_names_the_goals_that_were_not_measured():
    page = report.page(run(rate("batch_16", 1.7, 1.0)))
    missing = next(line for line in page.splitlines() if "Not measured" in line)
    assert "32 streams of mixed lengths" in missing
    assert "16 streams" not in missing
    everything = [own(name, 0.1) for name in TARGETS]
    assert "Not measured" not in report.page(run(*everything))


def test_the_page_shows_what_has_no_goal_in_a_table_of_its_own():
    page = report.page(run(rate("batch_16", 1.7, 1.0), own("checksum_1_mib", 50.0)))
    goals, _, others = page.partition("## Also measured")
    assert "CRC32C of 1 MiB" in others
    assert "CRC32C of 1 MiB" not in goals
    assert "## Also measured" not in report.page(run(rate("batch_16", 1.7, 1.0)))


def test_what_others_used_is_what_was_busy_and_not_ours():
    before, after = neighbours.Reading(10.0, 100.0, 40.0), neighbours.Reading(20.0, 115.0, 45.0)
    assert neighbours.others_share(before, after, cores=2) == pytest.approx(0.5)
    moment = neighbours.Reading(10.01, 100.02, 40.0)  # a tick of 10 ms is all the CPU there was
    assert neighbours.others_share(before, moment, cores=2) is None
    seen = neighbours.read()
    assert seen.own_s > 0
    assert seen.busy_s > seen.own_s


def test_the_page_says_when_its_figures_are_not_to_be_trusted():
    noisy = rate("batch_16", 1.7, 1.0) | {"others_cpu": 0.4}
    document = run(failed("ttft_512", "the mesh was not ready").as_json(), noisy)
    page = report.page(document | {"quick": True})
    assert "up to 40 %" in page
    assert "not quiet" not in report.page(run(rate("batch_16", 1.7, 1.0) | {"others_cpu": 0.01}))
    assert "**Failed:** First token, 512-token prompt: the mesh was not ready" in page
    assert "was not quiet" in page
    assert "Quick sizes" in page


def test_the_page_shows_the_comparison_and_links_the_pictures():
    page = report.page(run() | {"side_by_side": [compared()]}, ["benchmarks/ratios.svg"])
    assert "| prefill of 512, tokens/s | 8 ± 31 % | 9 ± 11 % | 5 ± 10 % |" in page
    assert "| system | 0.80 | 0.80 |" in page
    assert "![](benchmarks/ratios.svg)" in page


def test_the_ratio_of_split_and_whole_is_that_of_the_same_round():
    document = compared()
    # 8/10, 4/8 and 9/9; the ratio of the medians would be 8/9.
    assert document["split_over_whole"] == [{"system": "system", "prefill": 0.8, "decode": 0.8}]
    assert document["rows"][0]["values"] == {"split": 8.0, "whole": 9.0, "other": 5.0}
    assert side_by_side.section([document])[0] == "## Beside llama.cpp"


def test_thousands_of_samples_make_a_picture_of_dots_that_can_be_told_apart(tmp_path):
    values = [40.0 + 20.0 * index / 5000 for index in range(5001)]
    many = measured("decode_step_switched", values, unit="ms", higher_is_better=False).as_json()
    written = plots.plot(run(many), tmp_path)
    text = next(path for path in written if path.name == "samples.svg").read_text()
    places = [int(place) for place in re.findall(r'<circle cx="(\d+)"', text)]
    assert places == sorted(set(places))
    middle = places[0] + (places[-1] - places[0]) // 2
    assert (places[0], middle, places[-1]) == (544, 590, 636)
    assert len(places) == 93


def test_a_picture_of_a_comparison_has_a_bar_for_every_side_of_every_task(tmp_path):
    written = plots.plot(run() | {"side_by_side": [compared()]}, tmp_path)
    text = next(path for path in written if path.name == "side-by-side-1.svg").read_text()
    assert text.count("<rect") == 1 + 2 * 3
    assert "SmolLM2 &lt;Q4_1&gt;" in text


def test_the_projects_own_page_is_what_its_saved_runs_say(tmp_path):
    """Nothing on it is typed by hand, and no run is left out."""
    docs = Path(report.__file__).parents[2] / "docs"
    runs = sorted(str(path) for path in (docs / "benchmarks" / "runs").glob("*.json"))
    page, pictures = tmp_path / "benchmarks.md", tmp_path / "benchmarks"
    assert cli.main(["bench", "--from", *runs, "--write", str(page), "--plot", str(pictures)]) == 0
    assert page.read_text(encoding="utf-8") == (docs / page.name).read_text(encoding="utf-8")
    drawn = {path.name: path.read_bytes() for path in pictures.iterdir()}
    kept = {path.name: path.read_bytes() for path in (docs / "benchmarks").glob("*.svg")}
    assert drawn == kept


def test_the_command_puts_saved_runs_together_and_refuses_those_that_do_not_fit(tmp_path, capsys):
    names = [str(tmp_path / name) for name in ("a.json", "b.json")]
    page, pictures = tmp_path / "page.md", tmp_path / "pictures"
    Path(names[0]).write_text(json.dumps(run(rate("batch_16", 3.0, 2.0))))
    Path(names[1]).write_text(json.dumps(run(own("overhead_tracing", 0.1))))
    flags = ["--write", str(page), "--plot", str(pictures)]
    assert cli.main(["bench", "--from", *names, *flags]) == 0
    text = page.read_text()
    assert "16 streams" in text
    assert "Tracing" in text
    assert "![](pictures/ratios.svg)" in text
    Path(names[1]).write_text(json.dumps(run(cores=64)))
    assert cli.main(["bench", "--from", *names]) == 2
    assert "do not belong together" in capsys.readouterr().err


def test_an_interrupted_run_prints_what_it_has_by_then(monkeypatch, capsys):
    async def interrupted(bench, _suites):
        bench.results.append(measured("decode_single", [9.0], unit="s", higher_is_better=True))
        raise asyncio.CancelledError

    monkeypatch.setattr("services.bench.run.Bench.run", interrupted)
    assert cli.main(["bench", "--suite", "single", "--json"]) == 130
    shown = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in shown["results"]] == ["decode_single"]


# -- checks of a running mesh ---------------------------------------------------------------------


def test_audits_and_checks_are_shares_of_the_time_the_pipeline_was_busy():
    spent = {"integrity": 2_000, "numeric": 3_000, "shadow": 100_000}
    shadow, checks = live_checks.shares(spent, busy_s=10.0, streams=5)
    assert (shadow.name, shadow.ours) == ("overhead_shadow", pytest.approx(1.0))
    assert (checks.name, checks.ours) == ("overhead_counted", pytest.approx(0.05))
    assert shadow.met
    assert not live_checks.shares({"shadow": 300_000}, busy_s=10.0, streams=5)[0].met


# -- llama.cpp's server ---------------------------------------------------------------------------


class _Server(BaseHTTPRequestHandler):
    """Speaks as llama.cpp's server does: an event a token, the last one with the count."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list] = []
    cut_short = False

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        if len(body["prompt"]) > 8:
            self.send_error(400)
            return
        count = body["n_predict"] - self.cut_short
        events = [{"content": "x", "stop": False} for _ in range(count)]
        events.append({"content": "", "stop": True, "tokens_predicted": count})
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in events:
            data = f"data: {json.dumps(event)}\n\n".encode()
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_arguments):
        """Tests are quiet."""


@pytest.fixture
def server():
    handler = type("Handler", (_Server,), {"asked": []})
    with HTTPServer(("127.0.0.1", 0), handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield listening.server_address[1], handler
        listening.shutdown()
        thread.join()


def test_an_answer_of_llama_cpp_is_counted_and_no_prompt_may_be_reused(server):
    port, handler = server
    seen = llama_cpp.ask(port, [5, 6, 7], 4)
    assert seen.tokens == 4
    assert seen.first_s > 0
    assert seen.decode_s >= 0
    body = handler.asked[0]
    assert (body["prompt"], body["n_predict"], body["ignore_eos"]) == ([5, 6, 7], 4, True)
    assert body["cache_prompt"] is False


def test_an_answer_that_was_refused_or_cut_short_is_an_error_and_no_figure(server):
    port, handler = server
    with pytest.raises(llama_cpp.LlamaServerFailed, match="status 400"):
        llama_cpp.ask(port, list(range(9)), 4)
    handler.cut_short = True
    with pytest.raises(llama_cpp.LlamaServerFailed, match="3 of 4 tokens"):
        llama_cpp.ask(port, [5], 4)


def test_a_server_that_is_not_there_is_not_healthy_and_gives_no_answer(server):
    port, _handler = server
    assert llama_cpp.is_healthy(port)
    gone = llama_cpp.free_port()
    assert not llama_cpp.is_healthy(gone)
    with pytest.raises(llama_cpp.LlamaServerFailed, match="no answer"):
        llama_cpp.ask(gone, [5], 4)


def test_the_split_server_is_told_its_rpc_servers_and_the_whole_one_is_not():
    whole = llama_cpp.server_arguments(Path("m.gguf"), 1, threads=2)
    split = llama_cpp.server_arguments(Path("m.gguf"), 1, threads=1, rpc_ports=(7, 8))
    assert "--rpc" not in whole
    assert split[split.index("--rpc") + 1] == "127.0.0.1:7,127.0.0.1:8"
    assert split[split.index("--tensor-split") + 1] == "1,1"
    slots = int(whole[whole.index("--parallel") + 1])
    assert int(whole[whole.index("--ctx-size") + 1]) // slots >= llama_cpp.PREFILL_TOKENS + 1
