"""What a mesh says of its guards and barriers: over AdminService, on the command line, as metrics,
on its topics; and that a worker leaves by the drain barrier."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData

from coordinator.events import DrainRequested
from coordinator.settings import MeshPolicy
from services.client import MeshClient
from services.fault_proxy import Fault, FaultKind, ScriptedFaults
from stage_worker.tiny_models import write_tiny_model
from stagemesh.guards import FAMILIES, GUARDS
from tests.mesh.own_loop_mesh import OwnLoopMesh, own_loop_mesh

COUNT = 80


class Looked:
    """A mesh behind one answer with a damaged frame in it, and everything there is to see of it."""

    def __init__(self, runner: asyncio.Runner, mesh: OwnLoopMesh) -> None:
        self.runner, self.mesh = runner, mesh
        self.address = mesh.coordinator.server.address

    def command(self, *words: str) -> str:
        """Standard output of a command line against this mesh."""

        async def run() -> str:
            arguments = ("-m", "services", *words, "--address", self.address)
            pipe = asyncio.subprocess.PIPE
            process = await asyncio.create_subprocess_exec(
                sys.executable, *arguments, stdout=pipe, cwd=Path(__file__).parents[2]
            )
            out, _ = await process.communicate()
            assert process.returncode == 0
            return out.decode()

        return self.runner.run(run())


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Looked]:
    directory = tmp_path_factory.mktemp("tiny")
    write_tiny_model(directory, "llama", layers=4)
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        policy = MeshPolicy(canary_interval_s=3600.0)
        mesh = runner.run(stack.enter_async_context(own_loop_mesh(directory, policy=policy)))
        fault = {mesh.next_step + 5: [Fault(FaultKind.PAYLOAD_BIT)]}
        mesh.proxies["middle"].plan = ScriptedFaults(fault)
        runner.run(mesh.generate(COUNT, text="look"))
        runner.run(mesh.settled())
        try:
            yield Looked(runner, mesh)
        finally:
            runner.run(stack.aclose())


async def diagnostics(address: str):
    client = MeshClient(address)
    try:
        return await client.diagnostics()
    finally:
        await client.close()


async def reported(address: str):
    """Diagnostics, once the workers' reports are in."""
    async with asyncio.timeout(10):
        while True:
            seen = await diagnostics(address)
            if any("frames_rejected.checksum_mismatch" in one.counters for one in seen.workers):
                return seen


def test_every_process_says_what_its_guards_have_counted(looked: Looked) -> None:
    seen = looked.runner.run(reported(looked.address))
    workers = {one.worker: dict(one.counters) for one in seen.workers}
    assert workers["stage-1"]["frames_rejected.checksum_mismatch"] == 1
    assert workers["stage-0"]["frames_retransmitted"] >= 1  # a timer may fire on a busy machine
    assert "frames_rejected.checksum_mismatch" not in workers["stage-0"]
    own = dict(seen.counters)
    assert own["frames_checked"] >= COUNT  # its own hop
    assert own["tokens_checked"] == COUNT
    assert own["events_published"] > COUNT  # its own topics
    assert own["checkpoints_completed"] == 1
    assert own["hop_faults.checksum_mismatch"] == 1
    strange = [n for n in own if n not in GUARDS and not n.startswith(tuple(FAMILIES))]
    assert not strange


def test_barriers_are_shown_with_who_came_and_how_they_ended(looked: Looked) -> None:
    seen = looked.runner.run(diagnostics(looked.address))
    by_name = {one.name.partition("/")[0]: one for one in seen.barriers}
    opened, checkpoint = by_name["open-route"], by_name["checkpoint"]
    assert (opened.state, list(opened.arrived)) == ("complete", ["stage-0", "stage-1"])
    assert (checkpoint.state, list(checkpoint.arrived)) == ("complete", ["stage-0", "stage-1"])
    assert (opened.remaining_ms, opened.cause, list(opened.absent)) == (0, "", [])


def test_the_command_line_shows_barriers_and_guards(looked: Looked) -> None:
    document = json.loads(looked.command("status", "--barriers", "--guards", "--json"))
    names = {one["name"].partition("/")[0] for one in document["barriers"]}
    assert names == {"open-route", "checkpoint"}
    assert document["guards"]["coordinator"]["tokens_checked"] == COUNT
    text = looked.command("status", "--barriers", "--guards")
    assert "barrier open-route epoch" in text
    assert "2 of 2 arrived" in text
    assert "frames_checked" in text


def test_events_are_followed_from_an_offset_on_the_command_line(looked: Looked) -> None:
    words = ("events", "--topic", "generation", "--from", "2", "--count", "3", "--json")
    lines = [json.loads(line) for line in looked.command(*words).splitlines()]
    assert [line["offset"] for line in lines] == [2, 3, 4]
    first = lines[0]
    assert {"topic", "offset", "time", "type", "request_id", "worker"} <= set(first)
    assert (first["topic"], first["type"], first["worker"]) == (
        "generation",
        "ChunkGenerated",
        "stage-1",
    )
    facts = first["attributes"]
    assert (facts["status"], facts["marks"], facts["position"]) == ("VALID", "2", "0")
    assert len(bytes.fromhex(facts["chain"])) == 16
    assert int(facts["checksum"], 16) >= 0
    assert float(facts["margin"]) >= 0.0
    words = ("events", "--topic", "integrity", "--from", "1", "--count", "1")
    assert "HopFault" in looked.command(*words)


def test_the_trace_of_the_answer_says_which_hop_worker_and_reason_a_guard_stopped(
    looked: Looked,
) -> None:
    looked.runner.run(reported(looked.address))
    request = next(e.request for e in looked.mesh.published if e.type == "ChunkGenerated")
    traces = looked.mesh.telemetry.traces_of(str(uuid.UUID(bytes=request)))
    found = [
        {one.key: one.value.string_value for one in event.attributes}
        for resource in TracesData.FromString(traces).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
        for event in span.events
        if event.name == "HopFault"
    ]
    assert found
    assert found[0]["mesh.hop"] == "0→1"
    assert (found[0]["mesh.worker"], found[0]["error.type"]) == ("stage-1", "CHECKSUM_MISMATCH")


def test_guards_are_metrics_by_worker_and_name(looked: Looked) -> None:
    looked.runner.run(reported(looked.address))
    found = looked.runner.run(looked.mesh.points("coordinator", "mesh.guard.events"))
    assert found["frames_rejected.checksum_mismatch", "stage-1"].value == 1
    assert found["tokens_checked", "coordinator"].value == COUNT


def test_a_worker_leaves_by_the_drain_barrier(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama", layers=4)

    async def leave() -> None:
        async with own_loop_mesh(tmp_path) as mesh:
            await mesh.generate(5, text="bye")
            mesh.coordinator.driver.feed(DrainRequested("stage-1", 5.0))
            await mesh.until(
                lambda: {"WorkerDrained", "WorkerLeft"} <= {event.type for event in mesh.published}
            )
            seen = mesh.coordinator.driver.snapshot().barriers
            (met,) = (one for one in seen if one.name == "drain")
            assert met.complete
            assert met.arrived == ("stage-1",)

    asyncio.run(leave())
