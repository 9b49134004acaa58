"""kill -9 of the coordinator at any moment: every answer goes on by itself, token for token."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from services.client import MeshClient, StreamChecker
from services.fault_proxy import FrameProxy, Hold, Passing
from stagemesh.errors import MeshError
from stagemesh.frame import FrameKind, StepFrame
from stagemesh.v1 import generation_service_pb2 as pb
from stagemesh.v1 import topology_pb2
from tests.mesh.conftest import POLL_S, READY_S_MAX, ProcessMesh

PIPELINE = ["stage-0", "stage-1"]
COUNT = 48
LONG_PROMPT = "a prompt that takes more than one chunk " * 24
STREAMS = (1, 4)
SPANS = {"stage-0": "0-2", "stage-1": "2-4", "full": "all"}
OPEN = topology_pb2.ROUTE_STATE_OPEN

pytestmark = pytest.mark.asyncio(loop_scope="module")


def request_of(number: int, *, prompt: str = "hello mesh") -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id=str(uuid.uuid4()),
        text=prompt,
        max_tokens=COUNT,
        ignore_eos=True,
        temperature=0.9,
        seed=number,
    )


class Read:
    """One client's answer, checked as it comes."""

    def __init__(self, request: pb.GenerateRequest) -> None:
        self.request = request
        self.tokens: list[int] = []
        self.text = ""
        self.finishes: list[pb.Finish] = []
        self.grew = asyncio.Event()

    async def read(self, client: MeshClient) -> None:
        checker = StreamChecker(uuid.UUID(self.request.request_id).bytes)
        stream = client.generate(self.request, checker=checker, timeout_s=90)
        async with aclosing(stream) as responses:
            async for response in responses:
                assert not response.tokens or response.position == len(self.tokens)
                self.tokens += [token.token_id for token in response.tokens]
                self.text += response.text
                if response.HasField("finish"):
                    self.finishes.append(response.finish)
                self.grew.set()
        assert checker.token_ids == self.tokens

    async def reaches(self, count: int) -> None:
        while len(self.tokens) < count:
            await self.grew.wait()
            self.grew.clear()

    @property
    def facts(self) -> tuple[list[int], str, list[tuple[int, int, bytes]]]:
        ends = [(end.reason, end.completion_tokens, b"") for end in self.finishes]
        return self.tokens, self.text, ends


class HoldingMesh(ProcessMesh):
    """What any route gives back to the coordinator passes through a proxy on the tests' own event
    loop: so a step can be held on its way, and the coordinator die just then."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.proxy = FrameProxy(self.address)

    def coordinator(self) -> None:
        flags = (*self.flags, "--listen", self.address, "--advertise", self.proxy.address)
        self.start("coordinator", "coordinator", *flags)

    async def until(self, holds: Callable[[Any], bool]) -> None:
        """Until the mesh is as it should be; the loop goes on meanwhile."""
        async with asyncio.timeout(READY_S_MAX), MeshClient(self.address) as client:
            while True:
                with contextlib.suppress(MeshError):
                    if holds(await client.mesh()):
                        return
                await asyncio.sleep(POLL_S)

    async def is_whole(self) -> None:
        """Until both routes are open."""

        def there(mesh: Any) -> bool:
            found = [list(one.workers) for one in mesh.routes if one.state == OPEN]
            return sorted(found) == [["full"], PIPELINE]

        await self.until(there)

    @contextlib.contextmanager
    def held(self, matches: Callable[[Passing], bool]) -> Iterator[Hold]:
        """Hold the first frame that matches, to the end of the block at the latest."""
        hold = self.proxy.hold(matches)
        try:
            yield hold
        finally:
            self.proxy.forget(hold)


def returns(
    requests: list[pb.GenerateRequest],
    kind: FrameKind,
    position: int | None = None,
    *,
    stages: int = 2,
) -> Callable[[Passing], bool]:
    """A step of one of these comes back from a route of so many stages."""
    wanted = {uuid.UUID(request.request_id).bytes for request in requests}

    def matches(passing: Passing) -> bool:
        if not isinstance(passing, StepFrame) or passing.kind is not kind:
            return False
        rows = [row for row in passing.rows if row.request in wanted]
        is_there = any(position in (None, row.first_position) for row in rows)
        return is_there and passing.hop_from == stages - 1

    return matches


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def standing(
    tmp_path_factory: pytest.TempPathFactory, model_home: Path
) -> AsyncIterator[HoldingMesh]:
    """One mesh whose coordinator dies again and again, and is started with the same command."""
    one = HoldingMesh(tmp_path_factory.mktemp("restarts"))
    await one.proxy.start()
    try:
        one.coordinator()
        for name, span in SPANS.items():
            one.worker(name, span)
        yield one
    finally:
        one.stop()
        await one.proxy.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def whole(standing: HoldingMesh) -> HoldingMesh:
    """The standing mesh with both routes open."""
    for name, span in SPANS.items():
        if standing.processes[name].poll() is not None:
            standing.worker(name, span)
    await standing.is_whole()
    return standing


@asynccontextmanager
async def reading(mesh: ProcessMesh, reads: list[Read]) -> AsyncIterator[MeshClient]:
    """Clients that read until the block is left, and then to the end."""
    async with (
        asyncio.timeout(100),
        MeshClient(mesh.address) as client,
        asyncio.TaskGroup() as group,
    ):
        for one in reads:
            group.create_task(one.read(client))
        yield client


async def undisturbed(mesh: ProcessMesh, requests: list[pb.GenerateRequest]) -> list[Read]:
    """The same requests under other ids, with nothing in their way."""
    reads = []
    for request in requests:
        copy = pb.GenerateRequest()
        copy.CopyFrom(request)
        copy.request_id = str(uuid.uuid4())
        reads.append(Read(copy))
    async with reading(mesh, reads):
        pass
    return reads


def kill_and_restart(mesh: ProcessMesh) -> None:
    """The coordinator is gone, whatever it was doing; another takes its place and its journal."""
    before = mesh.processes["coordinator"].pid
    mesh.kill("coordinator")
    assert mesh.ended("coordinator") == -9
    mesh.coordinator()
    assert mesh.processes["coordinator"].pid != before


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize(
    ("phase", "reached"),
    [("prefill", 0), ("first token", 1), ("mid-decode", COUNT // 2), ("last token", COUNT - 1)],
)
async def test_kill_9_of_the_coordinator_costs_no_token_and_repeats_none(
    whole: HoldingMesh, phase: str, reached: int, streams: int
) -> None:
    prompt = LONG_PROMPT if phase == "prefill" else "hello mesh"
    requests = [request_of(number, prompt=prompt) for number in range(streams)]
    expected = await undisturbed(whole, requests)
    reads = [Read(request) for request in requests]
    position = expected[0].finishes[0].prompt_tokens + reached - 1
    point = returns(requests[:1], FrameKind.DECODE, position)
    if not reached:
        point = returns(requests, FrameKind.PREFILL)
    with whole.held(point) as hold:
        async with reading(whole, reads) as client:
            await hold.reached.wait()
            while (await client.mesh()).running < streams and phase == "prefill":
                await asyncio.sleep(0.001)
            await reads[0].reaches(reached)
            seen = [len(one.tokens) for one in reads]
            assert hold.waiting
            await asyncio.to_thread(kill_and_restart, whole)
            hold.release()
    assert seen[0] == reached, "the kill did not come when it should have"
    assert phase != "prefill" or not any(seen)
    assert [one.facts for one in reads] == [one.facts for one in expected]
    assert all(len(one.finishes) == 1 for one in reads)
    assert client.resumes >= 1
    assert "COORDINATOR_RESTARTED" in [one.cause for one in reads[0].finishes[0].recoveries]

    await whole.is_whole()
    async with MeshClient(whole.address) as client:
        for one in reads:
            for position in (0, 7, COUNT):
                stream = client.resume(one.request.request_id, position)
                async with aclosing(stream) as responses:
                    tail = [token.token_id async for r in responses for token in r.tokens]
                assert tail == one.tokens[position:]


async def test_the_coordinator_may_die_while_a_request_is_on_its_way_to_another_route(
    whole: HoldingMesh,
) -> None:
    request = request_of(13)
    (expected,) = await undisturbed(whole, [request])
    read = Read(request)
    with whole.held(returns([request], FrameKind.PREFILL, stages=1)) as hold:
        async with reading(whole, [read]) as client:
            await read.reaches(COUNT // 4)
            whole.kill("stage-1")
            await hold.reached.wait()
            before = len(read.tokens)
            assert hold.waiting
            await asyncio.to_thread(kill_and_restart, whole)
            hold.release()
    assert COUNT // 4 <= before < COUNT
    assert whole.ended("stage-1") == -9
    assert read.facts == expected.facts
    assert client.resumes >= 1
    (finish,) = read.finishes
    assert list(finish.route) == ["full"]
    assert "COORDINATOR_RESTARTED" in [one.cause for one in finish.recoveries]


async def test_two_kills_in_one_answer_are_survived(whole: HoldingMesh) -> None:
    request = request_of(11)
    (expected,) = await undisturbed(whole, [request])
    read = Read(request)
    async with reading(whole, [read]):
        for reached in (10, 25):
            await read.reaches(reached)
            await asyncio.to_thread(kill_and_restart, whole)
    assert read.facts == expected.facts


async def test_an_answer_whose_client_died_with_the_coordinator_is_finished_for_it(
    whole: HoldingMesh,
) -> None:
    request = request_of(12)
    (expected,) = await undisturbed(whole, [request])
    async with MeshClient(whole.address) as client:
        stream = client.generate(request, resume=False)
        async with aclosing(stream) as responses:
            await anext(responses)
            await asyncio.to_thread(kill_and_restart, whole)
    await whole.until(lambda mesh: mesh.finished >= 1 and mesh.running == 0)
    async with MeshClient(whole.address) as client:
        stream = client.resume(request.request_id)
        async with aclosing(stream) as responses:
            later = [token.token_id async for r in responses for token in r.tokens]
    assert later == expected.tokens


async def test_the_command_line_resumes_by_itself(whole: HoldingMesh) -> None:
    await asyncio.to_thread(the_command_line_resumes, whole)


def the_command_line_resumes(whole: HoldingMesh) -> None:
    def arguments(*more: str) -> list[str]:
        flags = ("--raw", "--json", "--ignore-eos", "--temperature", "0.9", "--seed", "5")
        size = ("--max-tokens", "300", "--address", whole.address)
        return [sys.executable, "-m", "services", "generate", "hi", *flags, *size, *more]

    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    undisturbed = subprocess.run(
        arguments(), cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    expected = json.loads(undisturbed.stdout.splitlines()[-1])
    command = subprocess.Popen(
        arguments(), cwd=root, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert command.stdout is not None
    lines = [command.stdout.readline() for _ in range(3)]
    kill_and_restart(whole)
    lines += command.stdout.readlines()
    command.stdout.close()
    assert command.wait(60) == 0
    pieces = [json.loads(line) for line in lines]
    last = pieces[-1]
    assert last["token_ids"] == expected["token_ids"]
    assert last["text"] == expected["text"]
    assert [token for piece in pieces[:-1] for token in piece["token_ids"]] == last["token_ids"]
    assert "COORDINATOR_RESTARTED" in [one["cause"] for one in last["recoveries"]]


async def test_a_damaged_journal_stops_the_coordinator_with_a_clear_error(
    tmp_path: Path, model_home: Path
) -> None:
    mesh = ProcessMesh(tmp_path, "--no-insecure")
    journal = tmp_path / "journal.db"
    journal.write_bytes(b"this is no journal" * 1000)
    try:
        mesh.start(
            *("coordinator", "coordinator", *mesh.flags),
            *("--listen", mesh.address, "--journal", str(journal)),
        )
        assert mesh.ended("coordinator") != 0
        log = mesh.log("coordinator")
        assert "journal" in log
        assert "--journal none" in log
        assert "Traceback" not in log
    finally:
        mesh.stop()
