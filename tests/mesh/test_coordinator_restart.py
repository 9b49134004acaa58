"""kill -9 of the coordinator at any moment: every answer goes on by itself, token for token."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from services.client import MeshClient, StreamChecker
from services.fault_proxy import FrameProxy, Hold, Passing
from stagemesh.frame import FrameKind, StepFrame
from stagemesh.v1 import generation_service_pb2 as pb
from tests.mesh.conftest import ProcessMesh

PIPELINE = ["stage-0", "stage-1"]
COUNT = 48
LONG_PROMPT = "a prompt that takes more than one chunk " * 24
STREAMS = (1, 4)
REACHED_S_MAX = 30.0


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
    """What any route gives back to the coordinator passes through a proxy of the test, in a thread
    of its own: so a step can be held on its way, and the coordinator die just then."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy")
        self._thread.start()
        self._proxy = FrameProxy(self.address)
        self._do(self._proxy.start())

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(REACHED_S_MAX)

    def coordinator(self) -> None:
        flags = (*self.flags, "--listen", self.address, "--advertise", self._proxy.address)
        self.start("coordinator", "coordinator", *flags)

    def stop(self) -> None:
        super().stop()
        self._do(self._proxy.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @asynccontextmanager
    async def held(self, matches: Callable[[Passing], bool]) -> AsyncIterator[asyncio.Future[Any]]:
        """Done as soon as a frame that matches is held; let go of at the end of the block."""

        async def hold() -> Hold:
            return self._proxy.hold(matches)

        async def forget(hold: Hold) -> None:
            self._proxy.forget(hold)

        one = self._do(hold())
        reached = asyncio.run_coroutine_threadsafe(one.reached.wait(), self._loop)
        try:
            yield asyncio.wrap_future(reached)
        finally:
            reached.cancel()
            self._do(forget(one))


def returns(
    request: pb.GenerateRequest, kind: FrameKind, position: int | None = None, *, stages: int = 2
) -> Callable[[Passing], bool]:
    """A step of this request comes back from a route of so many stages."""
    wanted = uuid.UUID(request.request_id).bytes

    def matches(passing: Passing) -> bool:
        if not isinstance(passing, StepFrame) or passing.kind is not kind:
            return False
        rows = [row for row in passing.rows if row.request == wanted]
        is_there = any(position in (None, row.first_position) for row in rows)
        return is_there and passing.hop_from == stages - 1

    return matches


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, model_home: Path) -> Iterator[HoldingMesh]:
    """One mesh whose coordinator dies again and again, and is started with the same command."""
    one = HoldingMesh(tmp_path_factory.mktemp("restarts"))
    try:
        one.everything()
        yield one
    finally:
        one.stop()


@pytest.fixture
def whole(standing: HoldingMesh) -> HoldingMesh:
    """The standing mesh with both routes open."""
    if standing.processes["stage-1"].poll() is not None:
        standing.worker("stage-1", "2-4")
    standing.wait_for_routes(PIPELINE, ["full"])
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


def undisturbed(mesh: ProcessMesh, requests: list[pb.GenerateRequest]) -> list[Read]:
    """The same requests under other ids, with nothing in their way."""
    reads = []
    for request in requests:
        copy = pb.GenerateRequest()
        copy.CopyFrom(request)
        copy.request_id = str(uuid.uuid4())
        reads.append(Read(copy))

    async def work() -> None:
        async with reading(mesh, reads):
            pass

    asyncio.run(work())
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
def test_kill_9_of_the_coordinator_costs_no_token_and_repeats_none(
    whole: HoldingMesh, phase: str, reached: int, streams: int
) -> None:
    prompt = LONG_PROMPT if phase == "prefill" else "hello mesh"
    requests = [request_of(number, prompt=prompt) for number in range(streams)]
    expected = undisturbed(whole, requests)
    reads = [Read(request) for request in requests]
    position = expected[0].finishes[0].prompt_tokens + reached - 1
    point = (FrameKind.DECODE, position) if reached else (FrameKind.PREFILL, None)

    async def work() -> tuple[int, list[int]]:
        async with (
            whole.held(returns(requests[0], *point)) as is_held,
            reading(whole, reads) as client,
        ):
            await is_held
            while (await client.mesh()).running < streams and phase == "prefill":
                await asyncio.sleep(0.001)
            await reads[0].reaches(reached)
            seen = [len(one.tokens) for one in reads]
            await asyncio.to_thread(kill_and_restart, whole)
        return client.resumes, seen

    resumes, seen = asyncio.run(work())
    assert seen[0] == reached, "the kill did not come when it should have"
    assert phase != "prefill" or not any(seen)
    assert [one.facts for one in reads] == [one.facts for one in expected]
    assert all(len(one.finishes) == 1 for one in reads)
    assert resumes >= 1
    assert "COORDINATOR_RESTARTED" in [one.cause for one in reads[0].finishes[0].recoveries]

    whole.wait_for_routes(PIPELINE, ["full"])

    async def again() -> None:
        async with MeshClient(whole.address) as client:
            for one in reads:
                for position in (0, 7, COUNT):
                    stream = client.resume(one.request.request_id, position)
                    async with aclosing(stream) as responses:
                        tail = [token.token_id async for r in responses for token in r.tokens]
                    assert tail == one.tokens[position:]

    asyncio.run(again())


def test_the_coordinator_may_die_while_a_request_is_on_its_way_to_another_route(
    whole: HoldingMesh,
) -> None:
    request = request_of(13)
    (expected,) = undisturbed(whole, [request])
    read = Read(request)

    async def work() -> tuple[int, int]:
        taken_over = returns(request, FrameKind.PREFILL, stages=1)
        async with whole.held(taken_over) as is_held, reading(whole, [read]) as client:
            await read.reaches(COUNT // 4)
            whole.kill("stage-1")
            await is_held
            before = len(read.tokens)
            await asyncio.to_thread(kill_and_restart, whole)
        return client.resumes, before

    resumes, before = asyncio.run(work())
    assert COUNT // 4 <= before < COUNT
    assert whole.ended("stage-1") == -9
    assert read.facts == expected.facts
    assert resumes >= 1
    (finish,) = read.finishes
    assert list(finish.route) == ["full"]
    assert "COORDINATOR_RESTARTED" in [one.cause for one in finish.recoveries]


def test_two_kills_in_one_answer_are_survived(whole: ProcessMesh) -> None:
    request = request_of(11)
    (expected,) = undisturbed(whole, [request])
    read = Read(request)

    async def work() -> None:
        async with reading(whole, [read]):
            for reached in (10, 25):
                await read.reaches(reached)
                await asyncio.to_thread(kill_and_restart, whole)

    asyncio.run(work())
    assert read.facts == expected.facts


def test_an_answer_whose_client_died_with_the_coordinator_is_finished_for_it(
    whole: ProcessMesh,
) -> None:
    request = request_of(12)
    (expected,) = undisturbed(whole, [request])

    async def cut_off() -> None:
        async with MeshClient(whole.address) as client:
            stream = client.generate(request, resume=False)
            async with aclosing(stream) as responses:
                await anext(responses)
                await asyncio.to_thread(kill_and_restart, whole)

    asyncio.run(cut_off())
    whole.wait_until(lambda mesh: mesh.finished >= 1 and mesh.running == 0)

    async def later() -> list[int]:
        async with MeshClient(whole.address) as client:
            stream = client.resume(request.request_id)
            async with aclosing(stream) as responses:
                return [token.token_id async for r in responses for token in r.tokens]

    assert asyncio.run(later()) == expected.tokens


def test_the_command_line_resumes_by_itself(whole: ProcessMesh) -> None:
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


def test_a_damaged_journal_stops_the_coordinator_with_a_clear_error(
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
