"""The supervisor: restarts with bounded backoff, orderly ends, and no orphans."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from services import cli, settings
from services import supervisor as module
from services.local_mesh import (
    ProcessSpec,
    choose_address,
    free_port,
    layer_costs,
    plan_processes,
    plan_spans,
    with_metrics_ports,
)
from services.setting_fields import (
    COORDINATOR_ONLY,
    PROCESS_NAMES,
    WORKER_ONLY,
    MeshSettings,
    ProcessSettings,
)
from services.supervisor import Supervisor, restart_wait_s, tail
from stage_worker.model_source import resolve
from stagemesh.errors import InvalidConfiguration
from stagemesh.topology import Span

PYTHON = (sys.executable, "-c")
SLEEP = "import time; time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print('deaf', flush=True)\n"
    "while True: time.sleep(1)"
)


def spec(name: str, code: str) -> ProcessSpec:
    return ProcessSpec(name, (code,), program=PYTHON)


async def until(condition, *, seconds: float = 15.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
async def supervisor(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RESTART_WAIT_S_FIRST", 0.01)
    monkeypatch.setattr(module, "KILL_GRACE_S", 0.3)
    made = Supervisor(tmp_path / "run")
    yield made
    if made.pipe_read >= 0:
        await made.stop(0.1)


async def test_a_killed_process_is_started_again_after_its_exit_was_collected(supervisor):
    await supervisor.start([spec("stage-0", SLEEP)])
    supervisor.proven()
    first = supervisor.pids["stage-0"]
    os.kill(first, signal.SIGKILL)
    await until(lambda: supervisor.pids.get("stage-0", first) != first)
    child = supervisor.children["stage-0"]
    assert (child.restarts, child.status, child.state) == (1, -signal.SIGKILL, "running")
    assert not psutil.pid_exists(first)


async def test_a_process_has_a_group_of_its_own_in_the_session_of_the_supervisor(supervisor):
    await supervisor.start([spec("stage-0", SLEEP)])
    child = supervisor.pids["stage-0"]
    assert os.getpgid(child) == child != os.getpgid(0), "Ctrl-C would reach it"
    assert os.getsid(child) == os.getsid(0), "it would be scheduled as if it were alone"


async def test_a_process_that_keeps_dying_is_given_up(supervisor, monkeypatch):
    monkeypatch.setattr(module, "RESTARTS_MAX", 3)
    supervisor.proven()
    await supervisor.start([spec("coordinator", "raise SystemExit(7)"), spec("stage-0", SLEEP)])
    await until(supervisor.gave_up.is_set)
    child = supervisor.children["coordinator"]
    assert (child.state, child.status, child.restarts) == ("given up", 7, 3)
    assert supervisor.children["stage-0"].state == "running"


async def test_a_start_that_is_refused_is_tried_again_like_a_death(supervisor, monkeypatch):
    monkeypatch.setattr(module, "SETTLED_S", 0.0)
    await supervisor.start([spec("stage-0", SLEEP)])
    supervisor.proven()
    child = supervisor.children["stage-0"]
    aside = supervisor.run_directory.rename(supervisor.run_directory.with_name("aside"))
    os.kill(child.pid, signal.SIGKILL)
    await until(lambda: child.restarts >= 2)
    assert child.pid == 0
    aside.rename(supervisor.run_directory)
    await until(lambda: child.pid != 0)
    assert child.state == "running"


async def test_a_worker_that_leaves_on_purpose_stays_away_but_a_coordinator_comes_back(supervisor):
    supervisor.proven()
    code = "import sys; sys.exit(0)"
    await supervisor.start([spec("coordinator", code), spec("stage-0", code)])
    await until(lambda: supervisor.children["coordinator"].restarts > 0)
    await until(lambda: supervisor.children["stage-0"].state == "left")
    assert supervisor.children["stage-0"].restarts == 0


def test_pauses_double_and_are_bounded():
    waits = [restart_wait_s(deaths) for deaths in range(1, 12)]
    assert waits[:3] == [0.5, 1.0, 2.0]
    assert max(waits) == module.RESTART_WAIT_S_MAX
    assert waits == sorted(waits)


async def test_a_process_that_lived_long_enough_starts_counting_anew(supervisor, monkeypatch):
    monkeypatch.setattr(module, "SETTLED_S", 0.0)
    await supervisor.start([spec("stage-0", SLEEP)])
    supervisor.proven()
    for expected in (1, 2):
        os.kill(supervisor.pids["stage-0"], signal.SIGKILL)
        await until(lambda expected=expected: supervisor.children["stage-0"].restarts == expected)
        assert supervisor.children["stage-0"].deaths == 1


async def test_a_death_before_the_mesh_worked_is_a_failed_start_with_the_logs_end(supervisor):
    code = "print('cannot load the weights'); raise SystemExit(3)"
    await supervisor.start([spec("stage-1", code), spec("stage-0", SLEEP)])
    await until(lambda: supervisor.failed_start() is not None)
    failure = supervisor.failed_start()
    assert "stage-1 ended with status 3" in failure.message
    assert "cannot load the weights" in failure.message
    assert supervisor.children["stage-1"].restarts == 0


async def test_stopping_ends_everyone_the_deaf_included(supervisor):
    await supervisor.start([spec("coordinator", SLEEP), spec("stage-0", STUBBORN)])
    supervisor.proven()
    await until(lambda: "deaf" in tail(supervisor.children["stage-0"].log))
    pids = list(supervisor.pids.values())
    await supervisor.stop(0.2)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert supervisor.children["stage-0"].status == -signal.SIGKILL
    assert {child.state for child in supervisor.children.values()} == {"ended"}


async def test_a_process_that_waits_for_its_restart_is_not_started_while_stopping(
    supervisor, monkeypatch
):
    monkeypatch.setattr(module, "RESTART_WAIT_S_FIRST", 30.0)
    await supervisor.start([spec("stage-0", "raise SystemExit(1)")])
    supervisor.proven()
    supervisor.children["stage-0"].state = "running"
    await until(lambda: supervisor.children["stage-0"].state in {"waiting", "ended"})
    await supervisor.stop(0.1)
    assert supervisor.pids == {}


async def test_children_hold_only_the_reading_end_of_the_pipe(supervisor):
    """Its end-of-file, when the supervisor is gone, is what tells them."""
    code = (
        "import os, sys; fd = int(sys.argv[1])\n"
        "assert os.read(fd, 1) == b''\n"
        "print('parent is gone', flush=True)"
    )
    child = ProcessSpec("stage-0", (code, str(supervisor.pipe_read)), program=PYTHON)
    await supervisor.start([child])
    log = supervisor.children["stage-0"].log
    await asyncio.sleep(0.1)
    assert tail(log) == ""
    os.close(supervisor._pipe_write)
    supervisor._pipe_write = -1
    await until(lambda: "parent is gone" in tail(log))


def test_the_end_of_a_log_is_a_few_lines_of_a_long_file(tmp_path):
    log = tmp_path / "x.log"
    log.write_text("\n".join(f"line {number}" for number in range(100_000)))
    assert tail(log, 2) == "line 99998\nline 99999"
    assert tail(tmp_path / "none.log") == ""


async def test_a_process_has_variables_of_its_own(supervisor):
    code = "import os; print('port', os.environ['METRICS_PORT_FOR_TEST'], flush=True)"
    child = ProcessSpec(
        "stage-0", (code,), program=PYTHON, environment=(("METRICS_PORT_FOR_TEST", "9470"),)
    )
    await supervisor.start([child])
    await until(lambda: "port 9470" in tail(supervisor.children["stage-0"].log))


def test_processes_of_one_machine_serve_metrics_on_ports_side_by_side():
    specs = tuple(spec(name, "pass") for name in ("coordinator", "stage-0", "stage-1"))
    asked = {"OTEL_METRICS_EXPORTER": "otlp, prometheus", "OTEL_EXPORTER_PROMETHEUS_PORT": "9500"}
    ports = [dict(one.environment) for one in with_metrics_ports(specs, asked)]
    variable = "OTEL_EXPORTER_PROMETHEUS_PORT"
    assert ports == [{variable: "9500"}, {variable: "9501"}, {variable: "9502"}]
    assert with_metrics_ports(specs, {"OTEL_METRICS_EXPORTER": "otlp"}) == specs


# -- planning ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> Path:
    return resolve("tiny:layers=6").directory


def test_spans_are_balanced_by_parameters_or_taken_as_given(tiny):
    costs = layer_costs(tiny)
    assert len(costs.layers) == 6
    assert len(set(costs.layers)) == 1
    assert costs.head > 0
    spans = plan_spans(tiny, MeshSettings(stages=3))
    assert (len(spans), spans[0].first, spans[-1].last) == (3, 0, 6)
    given = (Span(0, 5), Span(5, 6))
    assert plan_spans(tiny, MeshSettings(spans=given)) == given


@pytest.mark.parametrize(
    "spans",
    [(Span(0, 3),), (Span(0, 4), Span(3, 6)), (Span(0, 2), Span(3, 6)), (Span(0, 7),)],
)
def test_missing_and_overlapping_spans_are_refused(tiny, spans):
    with pytest.raises(InvalidConfiguration):
        plan_spans(tiny, MeshSettings(spans=spans))


def test_more_stages_than_layers_are_refused(tiny):
    with pytest.raises(InvalidConfiguration, match="6 layers cannot be split over 7"):
        plan_spans(tiny, MeshSettings(stages=7))


def test_a_port_in_use_is_a_clear_error_and_no_port_takes_a_free_one():
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InvalidConfiguration, match="is in use"):
            choose_address(address)
    assert choose_address("127.0.0.1:0").startswith("127.0.0.1:")
    assert choose_address("").startswith("127.0.0.1:")
    assert 0 < free_port() < 65536


def test_every_process_of_a_mesh_is_planned_with_equal_mesh_settings():
    mesh = MeshSettings(model="tiny", stages=2)
    specs = plan_processes(
        mesh,
        ProcessSettings(),
        (Span(0, 2), Span(2, 4)),
        address="127.0.0.1:5",
        full_worker=True,
        pipe=9,
        cores=4,
    )
    assert [one.name for one in specs] == ["coordinator", "stage-0", "stage-1", "full-worker"]
    for one in specs:
        words = one.command
        assert words[words.index("--model") + 1] == "tiny"
        assert words[words.index("--parent-pipe") + 1] == "9"
    assert specs[1].arguments[specs[1].arguments.index("--threads") + 1] == "2"
    assert specs[3].arguments[specs[3].arguments.index("--span") + 1] == "all"
    most = [one.command[one.command.index("--threads-max") + 1] for one in specs[1:]]
    assert most == ["4", "4", "4"]  # while the others wait
    niceness = [one.command[one.command.index("--niceness") + 1] for one in specs[1:]]
    assert niceness == ["0", "0", "5"]  # audits get what the stages leave over


# What `up` decides itself, for each of its processes.
DECIDED = {
    "name", "span", "listen", "admin_listen", "advertise", "coordinator", "tls_ca", "tls_cert",
    "tls_key", "threads", "threads_max", "ready_file", "parent_pipe", "log_format",
}  # fmt: skip


def test_every_setting_reaches_the_processes_that_take_it():
    chosen = ProcessSettings(
        **{
            one.name: one.default + 1
            for one in dataclasses.fields(ProcessSettings)
            if type(one.default) in (int, float) and one.name not in {*DECIDED, "audit_budget"}
        },
        audit_budget=0.5,
        insecure=True,
        log_level="debug",
        journal="/kept/here.db",
        journal_sync="full",
    )
    coordinator, worker = plan_processes(
        MeshSettings(model="tiny"),
        chosen,
        (Span(0, 4),),
        address="127.0.0.1:5",
        full_worker=False,
        pipe=9,
        cores=2,
    )
    for spec, not_taken in ((coordinator, WORKER_ONLY), (worker, COORDINATOR_ONLY)):
        parsed = cli.parser_of(spec.arguments[0]).parse_args(spec.arguments[1:])
        got = settings.load(environment={}, flags=settings.flags_of(parsed)).process
        for name in set(PROCESS_NAMES) - set(not_taken) - DECIDED:
            assert getattr(got, name) == getattr(chosen, name), (spec.name, name)
