"""The whole chain as real processes: answers, deaths, restarts, drains, orphans, refusals, TLS."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services import certs
from services.rpc_errors import to_mesh_error
from services.trace_view import read_spans, walk
from stagemesh import __version__, errors
from stagemesh.v1 import admin_service_pb2 as admin
from stagemesh.v1 import admin_service_pb2_grpc as admin_rpc
from stagemesh.v1 import generation_service_pb2 as pb
from stagemesh.v1 import generation_service_pb2_grpc as rpc
from stagemesh.v1 import topology_pb2

if TYPE_CHECKING:
    from opentelemetry.proto.trace.v1.trace_pb2 import Span

    from tests.mesh.conftest import Answer, ProcessMesh

PIPELINE = ["stage-0", "stage-1"]
END_S_MAX = 20.0
HOP = (("stage-0", 1), ("stage-1", 0))
"""Where a line of a stage says its bytes on the hop between them: out of one, into the other."""


@pytest.fixture(scope="module")
def standing(
    tmp_path_factory: pytest.TempPathFactory, make_mesh: type[ProcessMesh]
) -> Iterator[ProcessMesh]:
    """One mesh for the tests that leave it as they found it."""
    one = make_mesh(tmp_path_factory.mktemp("standing"))
    try:
        yield one.everything()
    finally:
        one.stop()


@pytest.fixture
def whole(standing: ProcessMesh) -> ProcessMesh:
    """The standing mesh, with every process running and both routes open."""
    for name, span in (("stage-0", "0-2"), ("stage-1", "2-4"), ("full", "all")):
        if standing.processes[name].poll() is not None:
            standing.worker(name, span)
    standing.wait_for_routes(PIPELINE, ["full"])
    return standing


@pytest.fixture(scope="module")
def reference(standing: ProcessMesh) -> Answer:
    """What an undisturbed mesh answers."""
    return standing.generate()


def test_a_pipeline_answers_and_says_how(whole: ProcessMesh, reference: Answer) -> None:
    again = whole.generate()
    assert len(again.tokens) == 40
    assert again.tokens == reference.tokens
    assert again.route == PIPELINE
    assert again.finish.completion_tokens == 40
    assert again.recoveries == []


@pytest.mark.parametrize("victim", PIPELINE)
def test_kill_9_of_a_stage_in_mid_answer_goes_on_with_the_same_tokens(
    whole: ProcessMesh, reference: Answer, victim: str
) -> None:
    def strike(index: int) -> None:
        if index == 10:
            whole.kill(victim)

    answer = whole.generate(on_token=strike)
    assert answer.tokens == reference.tokens
    assert answer.route == ["full"]
    assert answer.recoveries == [("STAGE_UNREACHABLE", "reroute", victim)]
    assert whole.ended(victim) == -signal.SIGKILL
    assert_traced(whole.spans(answer), victim)


def assert_traced(spans: list[Span], victim: str) -> None:
    """The recovery hangs below the generation, between the work that it interrupted and the rest
    on the other route."""

    def facts(span: Span) -> dict[str, str | int]:
        return {one.key: one.value.string_value or one.value.int_value for one in span.attributes}

    by_id = {span.span_id: span for span in spans}
    (recovery,) = [span for span in spans if span.name == "recovery reroute"]
    assert facts(recovery)["mesh.worker"] == victim
    generation = by_id[recovery.parent_span_id]
    assert generation.name.startswith("text_completion ")
    (link,) = recovery.links
    interrupted = by_id[link.span_id]
    assert interrupted.name == "decode"
    assert interrupted.parent_span_id == generation.span_id
    after = [span for span in spans if span.name == "decode" and span is not interrupted]
    assert facts(interrupted)["mesh.epoch"] != facts(recovery)["mesh.epoch"]
    assert {facts(span)["mesh.epoch"] for span in after} == {facts(recovery)["mesh.epoch"]}
    assert interrupted.end_time_unix_nano <= recovery.end_time_unix_nano
    assert recovery.end_time_unix_nano < after[-1].end_time_unix_nano


def test_a_spare_stage_takes_over_from_a_killed_one_and_the_full_worker_may_not(
    tmp_path: Path, make_mesh: type[ProcessMesh], reference: Answer
) -> None:
    mesh = make_mesh(tmp_path)
    with contextlib.ExitStack() as stack:
        stack.callback(mesh.stop)
        mesh.start(
            *("coordinator", "coordinator", *mesh.flags, "--listen", mesh.address),
            *("--fallback", "forbid"),
        )
        for name, span in (("stage-0", "0-2"), ("stage-1", "2-4"), ("full", "all")):
            mesh.worker(name, span)
        mesh.wait_for_routes(PIPELINE, ["full"])
        mesh.worker("spare", "2-4")
        mesh.wait_until(lambda seen: "spare" in {one.worker.name for one in seen.workers})
        mesh.wait_for_routes(PIPELINE, ["full"])  # which needs no spare one

        def strike(index: int) -> None:
            if index == 10:
                mesh.kill("stage-1")

        answer = mesh.generate(on_token=strike)
        assert answer.tokens == reference.tokens
        assert answer.route == ["stage-0", "spare"]
        assert answer.recoveries == [("STAGE_UNREACHABLE", "reroute", "stage-1")]
        again = mesh.generate()
        assert (again.tokens, again.route) == (reference.tokens, ["stage-0", "spare"])


def diagnose(mesh: ProcessMesh, request_id: str, told_by: set[str], *flags: str) -> str:
    """Standard output of the command, once the spans of these workers are with the coordinator."""

    def is_told(_: admin.GetMeshResponse) -> bool:
        async def trace(channel: grpc.aio.Channel) -> bytes:
            request = admin.GetTraceRequest(request_id=request_id)
            return (await admin_rpc.AdminServiceStub(channel).GetTrace(request)).traces

        spans = [span for _, span in walk(read_spans(mesh.call(trace)))]
        return told_by <= {
            str(span.facts.get("mesh.worker")) for span in spans if span.name == "stage.decode"
        }

    mesh.wait_until(is_told)
    command = (sys.executable, "-m", "services", "diagnose", request_id, "--address", mesh.address)
    return subprocess.run(
        (*command, *flags),
        capture_output=True,
        check=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=END_S_MAX,
    ).stdout


def test_diagnose_tells_a_quiet_answers_hops_timings_versions_and_settings(
    whole: ProcessMesh, tmp_path: Path
) -> None:
    request_id = str(uuid.UUID(int=771))
    whole.generate(request_id=request_id)
    bundle = tmp_path / "bundle.zip"
    out = diagnose(whole, request_id, set(PIPELINE), "--bundle", str(bundle), "--json")
    document = json.loads(out)
    assert document["request_id"] == request_id
    assert document["generation"]["finish"]["timings"]["total_s"] > 0
    assert document["version"] == __version__
    assert {"python", "grpcio", "mlx", "mlx_lm", "blas"} <= set(document["environment"])
    told = {"stages": "2", "verification": "numeric", "prefill_chunk_tokens": "128"}
    told |= {"fallback": "prefer_spare", "drain_s": "10.0", "queue_max": "256"}
    assert told.items() <= document["settings"].items()
    assert [(one["boundary"], one["tokens"]) for one in document["digests"]] == [(0, 40)]
    assert not [one for one in document["tokens"] if "text" in one or "token_ids" in one]
    assert (document["logs"], document["missing"]) == ([], {})
    with zipfile.ZipFile(bundle) as archive:
        told_of = archive.read("story.txt").decode().splitlines()
    hops = {line.split()[0]: line for line in told_of if " frames, " in line}
    assert set(hops) == set(PIPELINE)
    for line in hops.values():
        assert line.split()[1] == "40", "one prefill and 39 steps"
        assert " 0 B in" not in line
        assert "compute 0.0 ms" not in line
    sent, received = (hops[name].split(" B ")[place].split()[-1] for name, place in HOP)
    assert sent == received, "what stage 0 sends is what stage 1 gets"


def test_diagnose_puts_what_the_coordinator_logged_of_a_killed_stage_among_the_rest(
    whole: ProcessMesh,
) -> None:
    request_id = str(uuid.UUID(int=772))

    def strike(index: int) -> None:
        if index == 10:
            whole.kill("stage-1")

    whole.generate(request_id=request_id, on_token=strike)
    flags = ("--with-text", "--logs", str(whole.directory))
    told = diagnose(whole, request_id, {"full"}, *flags).splitlines()
    (logged,) = (i for i, line in enumerate(told) if "log: warning RecoveryFinished" in line)
    for part in (
        "coordinator",
        "worker=stage-1",
        "cause=STAGE_UNREACHABLE",
        "action=reroute",
        'from_route="stage-0 stage-1"',
        "to_route=full",
    ):
        assert part in told[logged]
    (began,) = (i for i, line in enumerate(told) if "[recovery] RecoveryStarted" in line)
    (ended,) = (i for i, line in enumerate(told) if "GenerationFinished" in line)
    assert began < logged < ended
    text = whole.log("coordinator")
    assert "WorkerLost worker=stage-1 cause=STAGE_UNREACHABLE" in text
    assert "RouteClosed worker=stage-1" in text
    assert "RouteOpened" in text
    assert "ChunkGenerated" not in text


def test_a_stopped_stage_is_left_behind_and_taken_back_when_it_continues(
    whole: ProcessMesh, reference: Answer
) -> None:
    def strike(index: int) -> None:
        if index == 10:
            whole.kill("stage-1", signal.SIGSTOP)

    try:
        answer = whole.generate(on_token=strike)
    finally:
        whole.kill("stage-1", signal.SIGCONT)
    assert answer.tokens == reference.tokens
    assert answer.route == ["full"]
    whole.wait_for_routes(PIPELINE, ["full"])
    assert whole.generate().route == PIPELINE


def test_a_worker_asked_to_stop_lets_its_answer_finish_first(
    whole: ProcessMesh, reference: Answer
) -> None:
    def ask(index: int) -> None:
        if index == 10:
            whole.kill("stage-0", signal.SIGTERM)

    answer = whole.generate(on_token=ask)
    assert answer.tokens == reference.tokens
    assert (answer.route, answer.recoveries) == (PIPELINE, [])
    assert whole.ended("stage-0") == 0
    assert "drained" in whole.log("stage-0")


def test_a_client_that_goes_away_frees_its_caches_on_every_stage(whole: ProcessMesh) -> None:
    request = pb.GenerateRequest(text="long", max_tokens=5000, ignore_eos=True)

    async def leave_early(channel: grpc.aio.Channel) -> None:
        call = rpc.GenerationServiceStub(channel).Generate(request)
        for _ in range(5):
            await call.read()
        call.cancel()

    whole.call(leave_early)

    def is_free(mesh: admin.GetMeshResponse) -> bool:
        return mesh.running == 0 and not any(worker.kv_tokens for worker in mesh.workers)

    whole.wait_until(is_free)


def test_health_says_whether_the_mesh_makes_tokens(whole: ProcessMesh) -> None:
    async def state(channel: grpc.aio.Channel) -> int:
        name = "stagemesh.v1.GenerationService"
        request = health_pb2.HealthCheckRequest(service=name)
        return int((await health_pb2_grpc.HealthStub(channel).Check(request)).status)

    assert whole.call(state) == health_pb2.HealthCheckResponse.SERVING
    for name in (*PIPELINE, "full"):
        whole.kill(name)
    whole.wait_until(lambda mesh: not mesh.ready)
    assert whole.call(state) == health_pb2.HealthCheckResponse.NOT_SERVING


def test_workers_find_a_restarted_coordinator_by_themselves(
    whole: ProcessMesh, reference: Answer
) -> None:
    whole.kill("coordinator")
    whole.ended("coordinator")
    pids = {name: whole.processes[name].pid for name in (*PIPELINE, "full")}
    whole.coordinator()
    whole.wait_for_routes(PIPELINE, ["full"])
    assert whole.generate().tokens == reference.tokens
    assert {name: whole.processes[name].pid for name in pids} == pids
    assert all(whole.processes[name].poll() is None for name in pids)


def test_a_second_process_of_the_same_name_replaces_the_first_which_ends(
    whole: ProcessMesh, reference: Answer
) -> None:
    first = whole.processes["full"]
    whole.worker("full", "all")
    assert first.wait(END_S_MAX) != 0
    assert "EPOCH_FENCED" in whole.log("full") or "replaced" in whole.log("full")
    whole.wait_for_routes(PIPELINE, ["full"])
    assert whole.generate().tokens == reference.tokens


def test_a_worker_with_other_weights_is_turned_away_and_harms_nobody(
    whole: ProcessMesh, reference: Answer
) -> None:
    flags = ("--model", "tiny:seed=9", "--deterministic", "--coordinator", whole.address)
    stranger = whole.start(
        "stranger", "stage-worker", *flags, "--name", "stranger", "--span", "0-2"
    )

    def is_told(mesh: admin.GetMeshResponse) -> bool:
        return "ROUTE_REFUSED" in whole.log("stranger") or "weights" in whole.log("stranger")

    whole.wait_until(is_told)
    assert whole.generate().tokens == reference.tokens
    assert "stranger" not in {worker.worker.name for worker in whole.status().workers}
    stranger.kill()
    stranger.wait(END_S_MAX)


def test_a_drain_by_an_operator_ends_the_worker_and_requests_go_elsewhere(
    whole: ProcessMesh, reference: Answer
) -> None:
    from stagemesh.v1 import admin_service_pb2_grpc as admin_rpc

    async def drain(channel: grpc.aio.Channel) -> topology_pb2.WorkerStatus:
        request = admin.DrainWorkerRequest(worker="stage-1", timeout_s=5)
        return (await admin_rpc.AdminServiceStub(channel).DrainWorker(request)).worker

    assert whole.call(drain).state in (
        topology_pb2.WORKER_STATE_DRAINING,
        topology_pb2.WORKER_STATE_READY,
    )
    assert whole.ended("stage-1") == 0
    answer = whole.generate()
    assert (answer.tokens, answer.route) == (reference.tokens, ["full"])


def test_sigterm_drains_the_whole_mesh_and_leaves_nobody(mesh: ProcessMesh) -> None:
    mesh.everything()

    def ask(index: int) -> None:
        if index == 5:
            mesh.kill("coordinator", signal.SIGTERM)

    assert len(mesh.generate(on_token=ask).tokens) == 40
    assert mesh.ended("coordinator") == 0
    for name in (*PIPELINE, "full"):
        mesh.kill(name, signal.SIGTERM)
    assert [mesh.ended(name) for name in (*PIPELINE, "full")] == [0, 0, 0]


def test_mutual_tls_on_every_channel_carries_an_answer_and_keeps_roles_apart(
    tmp_path: Path, make_mesh: type[ProcessMesh]
) -> None:
    directory = certs.init(tmp_path / "pki").directory
    mesh = make_mesh(tmp_path, tls=directory)
    with contextlib.ExitStack() as stack:
        stack.callback(mesh.stop)
        mesh.everything()
        assert mesh.generate(8).route == PIPELINE
        with pytest.raises(grpc.RpcError) as refused:
            mesh.generate(8, role="stage")
        assert isinstance(to_mesh_error(refused.value), errors.AccessDenied)


def orphan_parent(mesh: ProcessMesh) -> str:
    """A program that starts a coordinator and a worker with its own pipe, prints pids, and
    waits.
    """
    return f"""
import os, subprocess, sys
read, write = os.pipe()
flags = {list(mesh.flags)!r} + ["--parent-pipe", str(read)]
commands = (["coordinator", "--listen", {mesh.address!r}],
            ["stage-worker", "--name", "full", "--span", "all", "--coordinator", {mesh.address!r}])
found = [subprocess.Popen([sys.executable, "-m", "services", *c, *flags], pass_fds=(read,),
         start_new_session=True) for c in commands]
print(*[p.pid for p in found], flush=True)
sys.stdin.read()
"""


def test_processes_end_when_their_parent_is_killed_with_9(mesh: ProcessMesh) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", orphan_parent(mesh)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    assert parent.stdout is not None
    children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    try:
        mesh.wait_for_routes(["full"])
        parent.kill()
        parent.wait(END_S_MAX)
        gone, alive = psutil.wait_procs(children, timeout=END_S_MAX)
        assert (len(gone), alive) == (2, [])
    finally:
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("coordinator", "--listen", "0.0.0.0:0"), "without TLS"),
        (("stage-worker", "--listen", "0.0.0.0:0"), "without TLS"),
        (("stage-worker", "--span", "0-99"), "exceeds"),
        (("stage-worker", "--model", "no/such/model/anywhere"), "neither a directory"),
        (("stage-worker", "--name", "../x"), "not a worker name"),
    ],
)
def test_what_cannot_be_started_says_why_and_ends(
    mesh: ProcessMesh, arguments: tuple[str, ...], said: str
) -> None:
    model = () if "--model" in arguments else ("--model", "tiny")
    mesh.start("failing", *arguments, *model, "--deterministic")
    assert mesh.ended("failing") not in (0, -signal.SIGKILL)
    assert said in mesh.log("failing")
    assert "Traceback" not in mesh.log("failing")


def test_a_port_in_use_says_so(whole: ProcessMesh, mesh: ProcessMesh) -> None:
    mesh.address = whole.address
    mesh.coordinator()
    assert mesh.ended("coordinator") not in (0, -signal.SIGKILL)
    assert "in use" in mesh.log("coordinator")
    assert "Traceback" not in mesh.log("coordinator")
