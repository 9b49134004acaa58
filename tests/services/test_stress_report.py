"""What a stress run prints and writes, for programs and for people, when it holds and when not."""

import argparse
import asyncio
import dataclasses
import json
import os
import shlex
import signal
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from rich.console import Console

from services import cli, cli_stress
from services.setting_fields import MESH_NAMES
from services.settings import load
from services.stress import live, session
from services.stress.history import Answer, End, Line, Mark, Repair, from_lines
from services.stress.machines import Machines
from services.stress.plan import FaultName, builtin
from services.stress.report import summary_lines, to_json, write_report
from services.stress.schedule import schedule
from services.stress.session import Run, Wanted, with_stress_settings
from services.stress.verdict import Life, Tally
from services.stress.watch import Sample, Watch
from stage_worker.model_source import ResolvedModel
from stagemesh.errors import InvalidConfiguration
from stagemesh.v1 import admin_service_pb2 as pb
from stagemesh.v1 import event_service_pb2 as events

CONTRACT = {
    "ok", "seed", "duration_s", "streams", "tokens", "faults", "recoveries", "lost", "duplicated",
    "wrong", "hung", "violations", "recovery_seconds", "rss_mib",
}  # fmt: skip


def flags(*words: str) -> argparse.Namespace:
    return cli.parser_of("stress").parse_args(list(words))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that is over, with one answer, two faults and a recovery."""
    plan = builtin("drop,sigkill")
    wanted = Wanted(
        settings=load(environment={}, flags={"stages": 3}),
        model=ResolvedModel(tmp_path, "tiny", "tiny"),
        plan=plan,
        seed=9,
        duration_s=10.0,
        streams=2,
        folder=tmp_path,
        command=cli_stress.replay_command(flags("--model", "tiny", "--duration", "10s"), 9),
    )
    repair = Repair("SILENT", "reroute", "stage-1", ("a",), ("full",), 8, 2, 4, 0.5)
    answer = Answer(
        0,
        0,
        "id",
        0.0,
        lines=[Line(0.5, 0, (1, 2), 7), Line(2.5, 2, (3,), 8)],
        ends=[End(2.6, "length", 3, 2, (repair,))],
    )
    marks = [
        Mark(0, "drop", "a → b", 1.0, 1.0, 1.1, fired=True, evidence="step 3", path="counter:x"),
        Mark(1, "sigkill", "b", 2.0, 2.0, 2.4, fired=False, evidence="was not there"),
    ]
    return Run(
        wanted=wanted,
        injections=schedule(plan, 9, 10.0, 3),
        expected={0: (1, 2, 3)},
        answers=[answer],
        marks=marks,
        samples=[Sample(float(at), at, {"stage-0": 50.0 + at}) for at in range(4)],
        lives=[
            Life("stage-0", 1, (50.0, 51.0), (30, 30), (9, 9)),
            Life("stage-0", 2, (40.0, 42.0, 44.0), (20, 25, 26), (7, 8, 8)),
        ],
        environment={"cores": "2"},
        faults_ended_at=10.0,
        ended_at=11.0,
        phase="done",
    )


def test_the_json_has_what_scripts_rely_on(run: Run):
    found = json.loads(json.dumps(to_json(run)))
    assert found.keys() >= CONTRACT
    assert found["ok"] is True
    assert found["faults"] == {"drop": 1, "sigkill": 0}
    assert found["recovery_seconds"] == {"p50": 0.5, "p99": 0.5, "max": 0.5}
    assert found["rss_mib"]["stage-0"] == {"start": 40.0, "end": 44.0, "lives": 2}
    assert found["tokens"] == 3


def test_a_violation_comes_with_the_seed_and_a_command_that_replays_it(run: Run):
    run.tally.found("I1", "1 wrong token", "id")
    text = "\n".join(summary_lines(run))
    assert text.startswith("FAILED")
    assert "! I1 request id: 1 wrong token" in text
    command = text.rpartition("to see it again: ")[2]
    words = shlex.split(command)
    assert words[:2] == ["stagemesh", "stress"]
    again = flags(*words[2:])
    assert (again.seed, again.model, again.duration) == (9, "tiny", "10s")
    assert not to_json(run)["ok"]


OTHER = {
    "model": "smollm2",
    "stages": "5",
    "spans": "0-12,12-30",
    "dtype": "bf16",
    "deterministic": False,
    "verification": "shadow",
    "verification_max": "numeric",
    "delivery": "verified",
    "kv_budget_tokens": "1234",
    "threads": "3",
    "config": "mesh.toml",
}
"""Something else than the default, for all that the mesh can be told."""


def test_whatever_the_mesh_was_told_survives_a_replay():
    assert OTHER.keys() == {*MESH_NAMES, "threads", "config"}
    given = [
        word
        for name, value in OTHER.items()
        for word in ([f"--{name.replace('_', '-')}", value] if value else [f"--no-{name}"])
    ]
    asked = flags(*given, "--duration", "10s", "--every", "0.5")
    words = shlex.split(cli_stress.replay_command(asked, 9))
    again = flags(*words[2:])
    assert {name: getattr(again, name) for name in OTHER} == OTHER
    assert (again.seed, again.every, again.duration) == (9, 0.5, "10s")
    usual = cli_stress.replay_command(flags("--duration", "10s"), 9)
    assert not [name for name in OTHER if f"--{name.replace('_', '-')}" in usual]


def test_a_run_in_which_nothing_was_asked_is_not_ok(run: Run):
    run.answers.clear()
    assert not run.ok


def test_a_report_has_a_page_with_its_charts_and_a_history_to_judge_again(run: Run, tmp_path: Path):
    page = write_report(run, tmp_path / "report")
    text = page.read_text()
    for name in ("throughput", "latency", "recovery", "memory"):
        assert f"({name}.svg)" in text
        assert (page.parent / f"{name}.svg").read_text().startswith("<svg")
    assert "**no**: was not there" in text
    lines = (page.parent / "history.jsonl").read_text().splitlines()
    assert from_lines(lines) == (run.answers, run.marks)


def shapes(path: Path, kind: str) -> list[ElementTree.Element]:
    return list(
        ElementTree.fromstring(path.read_text()).iter(f"{{http://www.w3.org/2000/svg}}{kind}")
    )


@pytest.mark.parametrize("chart", ["throughput", "latency", "memory"])
def test_a_chart_over_time_marks_each_fault_where_it_was(run: Run, tmp_path: Path, chart: str):
    write_report(run, tmp_path / "report")
    marks = [one for one in shapes(tmp_path / f"report/{chart}.svg", "line") if len(one)]
    assert [one[0].text for one in marks] == ["drop a → b", "sigkill b"]
    drop, kill = ({**one.attrib} for one in marks)
    assert float(drop["x1"]) == float(drop["x2"]) < float(kill["x1"]) == float(kill["x2"])
    assert float(kill["stroke-width"]) > float(drop["stroke-width"]), "it may close a route"
    run.marks.clear()
    write_report(run, tmp_path / "none")
    assert not [one for one in shapes(tmp_path / f"none/{chart}.svg", "line") if len(one)]


def test_the_chart_of_recoveries_has_a_step_for_each_and_ends_at_all_of_them(
    run: Run, tmp_path: Path
):
    repair, seconds = run.answers[0].ends[0].repairs[0], (0.5, 2.0, 1.0)
    repairs = tuple(dataclasses.replace(repair, seconds=one) for one in seconds)
    run.answers[0].ends[0] = dataclasses.replace(run.answers[0].ends[0], repairs=repairs)
    write_report(run, tmp_path / "report")
    (line,) = shapes(tmp_path / "report/recovery.svg", "polyline")
    points = [tuple(map(float, one.split(","))) for one in line.attrib["points"].split()]
    (left, bottom), *steps = points
    right, top = steps[-1]
    shares = [(bottom - y) / (bottom - top) for _x, y in steps]
    assert shares == pytest.approx([1 / 3, 2 / 3, 1.0], abs=0.01)
    assert [2.0 * (x - left) / (right - left) for x, _y in steps] == pytest.approx(
        sorted(seconds), abs=0.01
    )


def test_the_page_says_what_each_process_held(run: Run, tmp_path: Path):
    rows = write_report(run, tmp_path / "report").read_text().splitlines()
    at = rows.index("| process | lives | MiB | descriptors | threads |")
    assert rows[at + 2] == "| stage-0 | 2 | 40 → 44 | 20 → 26 | 7 → 8 |", "of the longest life"
    faults = [row for row in rows if row.startswith(("| 1.0 ", "| 2.0 "))]
    assert faults == [
        "| 1.0 | drop | a → b | step 3 | counter:x |",
        "| 2.0 | sigkill | b | **no**: was not there |  |",
    ]


def test_progress_is_a_line_or_a_table(run: Run):
    line = live.line(run)
    for part in ("token/s", "1/1 answers", "1/20 faults", "0 violations"):
        assert part.replace("/20", f"/{len(run.injections)}") in line
    console = Console(record=True, width=140)
    console.print(live.render(run))
    assert "sigkill" in console.export_text()
    run.expected[0] = (1, 9)
    assert "1 violations" in live.line(run), "a wrong token is seen while the run goes on"


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400)]
)
def test_durations_have_units(text: str, seconds: float):
    assert cli_stress.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "0s", "ten", "5d", "-3s"])
def test_a_duration_that_is_none_is_bad_usage(text: str):
    with pytest.raises(InvalidConfiguration):
        cli_stress.seconds_of(text)


def test_plans_come_from_words_and_files_and_every_can_be_given(tmp_path: Path):
    file = tmp_path / "plan.toml"
    file.write_text("[faults]\ndrop = 2\n")
    plan = cli_stress.plan_of(flags("--faults", str(file), "--every", "0.5"), 3)
    assert plan.every_s == 0.5
    assert [name.value for name in plan.faults] == ["drop"]
    assert len(cli_stress.plan_of(flags(), 1).faults) + 1 == len(
        cli_stress.plan_of(flags(), 3).faults
    )
    with pytest.raises(InvalidConfiguration, match="too short"):
        cli_stress.plan_of(flags("--every", "0"), 3)


def test_a_lossy_network_has_no_proxies_and_says_so():
    plan = cli_stress.plan_of(flags("--network", "lossy"), 3)
    assert plan.faults.keys() == Machines.faults
    assert FaultName.DROP not in plan.faults
    assert FaultName.SIGKILL in plan.faults
    with pytest.raises(InvalidConfiguration, match="sigkill"):
        cli_stress.plan_of(flags("--network", "lossy", "--faults", "drop"), 3)
    assert not cli_stress.plan_of(flags("--network", "lossy", "--faults", "none"), 3).faults


def test_a_lossy_run_is_replayed_as_one():
    words = ("--network", "lossy", "--plaintext", "--duration", "10s")
    again = shlex.split(cli_stress.replay_command(flags(*words), 9))
    assert again[-3:] == ["--network", "lossy", "--plaintext"]
    assert "--network" not in cli_stress.replay_command(flags("--duration", "10s"), 9)


def test_plaintext_is_for_a_lossy_network(capsys):
    assert cli.main(["stress", "--plaintext", "--duration", "10s"]) == 2
    assert "--network lossy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("counts", "invariants"),
    [
        ({"carried": 30_000, "lost": 300, "corrupted": 30, "forged": 30}, ["S"]),
        ({"carried": 30_000, "lost": 300, "forged": 30}, ["S"]),
        ({"carried": 300, "lost": 3}, []),
        ({}, ["S"]),
    ],
)
def test_links_that_were_never_bad_prove_nothing(counts, invariants):
    """The first: no kernel counted a checksum error, so nothing corrupted ever arrived."""
    machines, tally = Machines(2, 1, None), Tally()
    machines._switch.counts.update(counts)
    machines.judge(tally)
    assert [one.invariant for one in tally.violations] == invariants


class Forever:
    """Faults that never end."""

    async def run(self, _injections) -> None:
        await asyncio.Event().wait()


async def test_a_run_that_is_cut_short_is_judged_and_is_not_ok(run: Run):
    run.began = time.monotonic()
    reading = asyncio.create_task(asyncio.Event().wait())
    disturbing = asyncio.create_task(session._disturb(run, Forever(), reading))
    run.cut.set()
    await disturbing
    reading.cancel()
    assert not run.ok
    assert "cut short" in str(run.tally.violations[0])
    assert run.faults_ended_at > 0


async def test_the_first_signal_cuts_a_run_short_and_the_second_ends_it(run: Run):
    async def disturbed() -> None:
        with session._cut_by_signal(run):
            os.kill(os.getpid(), signal.SIGTERM)
            await run.cut.wait()
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.Event().wait()

    loop = asyncio.get_running_loop()
    try:
        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(disturbed())
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def test_failed_workers_come_back_soon_and_every_stream_is_admitted():
    settings = with_stress_settings(load(environment={}), 100)
    assert settings.process.requests_max == 100
    assert settings.process.failed_worker_s_max == 1.0
    assert settings.process.threads == 1


def test_an_earlier_runs_journal_does_not_answer_for_this_one(tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("journal.db", "journal.db-wal", "stage-0.log", "mine.txt"):
        (folder / name).write_text("old")
    assert cli_stress._run_folder(str(tmp_path)) == folder
    assert [one.name for one in folder.iterdir()] == ["mine.txt"]


async def test_counters_only_grow_although_processes_start_again():
    seen = iter(
        [
            {"frames_held": 2, "frames_checked": 9},
            {"frames_held": 3, "frames_checked": 9},
            {"frames_checked": 1},
            {"frames_held": 3, "frames_checked": 4},
        ]
    )

    class Mesh:
        async def diagnostics(self) -> pb.GetDiagnosticsResponse:
            one = pb.WorkerCounters(worker="stage-0", counters=next(seen))
            return pb.GetDiagnosticsResponse(workers=[one])

    watch = Watch(Mesh(), dict, lambda: {"client:resumes": 1})
    found = []
    for _ in range(4):
        await watch.look()
        found.append((watch.counters()["frames_held"], watch.counters()["frames_checked"]))
    assert found == [(2, 9), (3, 9), (3, 10), (6, 13)]
    reading = watch.reading()
    assert reading["counter:frames_held@stage-0"] == reading["counter:frames_held"] == 6
    assert watch.counters().keys() == {"frames_held", "frames_checked"}, "each once"
    assert watch.reading()["client:resumes"] == 1


async def test_events_are_counted_once_over_all_streams_and_recoveries_by_cause():
    watch = Watch(None, dict, dict)
    recovered = {"cause": "SILENT"}
    for time_ns in (1, 2, 2, 1, 3):
        watch._note(
            events.Event(
                topic=events.TOPIC_RECOVERY,
                time_unix_ns=time_ns,
                type="RecoveryFinished",
                attributes=recovered,
            )
        )
    assert watch.counts["event:RecoveryFinished"] == watch.counts["cause:SILENT"] == 3
    watch._note(
        events.Event(
            topic=events.TOPIC_RECOVERY,
            time_unix_ns=4,
            type="RecoveryOvertaken",
            attributes={"cause": "COORDINATOR_RESTARTED", "by": "SILENT"},
        )
    )
    assert watch.causes == {"SILENT": 3, "COORDINATOR_RESTARTED": 1}


def membership(time_ns: int, kind: str, worker: str = "", **facts: str) -> events.Event:
    return events.Event(
        topic=events.TOPIC_MEMBERSHIP,
        time_unix_ns=time_ns,
        type=kind,
        worker=worker,
        attributes=facts,
    )


def test_events_are_counted_by_worker_and_the_end_of_a_route_for_all_in_it():
    watch = Watch(None, dict, dict)
    watch._note(membership(1, "RouteOpening", epoch="7", workers="stage-0 stage-1"))
    watch._note(membership(2, "RouteOpening", epoch="8", workers="full-worker"))
    watch._note(membership(3, "WorkerLost", "stage-1"))
    watch._note(membership(4, "RouteClosed", "stage-1", epoch="7", cause="STAGE_UNREACHABLE"))
    counts = watch.reading()
    assert counts["event:WorkerLost@stage-1"] == 1
    assert counts["event:RouteClosed@7"] == 1
    assert counts["route:closed@stage-0"] == counts["route:closed@stage-1"] == 1
    assert not {"event:WorkerLost@stage-0", "event:RouteClosed@8", "route:closed@full-worker"} & {
        *counts
    }


def test_a_coordinators_routes_end_with_it_although_it_cannot_say_so():
    pids = {"coordinator": 1}
    watch = Watch(None, lambda: pids, dict)
    watch._leave_routes_behind()
    watch._note(membership(1, "RouteOpening", epoch="7", workers="stage-0"))
    watch._leave_routes_behind()
    assert "event:RouteClosed@7" not in watch.reading()
    pids["coordinator"] = 2
    watch._leave_routes_behind()
    watch._leave_routes_behind()
    assert watch.reading()["event:RouteClosed@7"] == watch.reading()["route:closed@stage-0"] == 1
