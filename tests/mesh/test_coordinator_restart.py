"""kill -9 of the coordinator at any moment: every answer goes on by itself, token for token."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from services.client import MeshClient, StreamChecker
from stagemesh.v1 import generation_service_pb2 as pb
from tests.mesh.conftest import ProcessMesh

PIPELINE = ["stage-0", "stage-1"]
COUNT = 48
LONG_PROMPT = "a prompt that takes more than one chunk " * 24
STREAMS = (1, 4)


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


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory, model_home: Path) -> Iterator[ProcessMesh]:
    """One mesh whose coordinator dies again and again, and is started with the same command."""
    one = ProcessMesh(tmp_path_factory.mktemp("restarts"))
    try:
        yield one.everything()
    finally:
        one.stop()


@pytest.fixture
def whole(standing: ProcessMesh) -> ProcessMesh:
    """The standing mesh with both routes open."""
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
@pytest.mark.parametrize("phase", ["prefill", "first token", "mid-decode", "last token"])
def test_kill_9_of_the_coordinator_costs_no_token_and_repeats_none(
    whole: ProcessMesh, phase: str, streams: int
) -> None:
    prompt = LONG_PROMPT if phase == "prefill" else "hello mesh"
    requests = [request_of(number, prompt=prompt) for number in range(streams)]
    expected = undisturbed(whole, requests)
    reads = [Read(request) for request in requests]
    reached = {"prefill": 0, "first token": 1, "mid-decode": COUNT // 2, "last token": COUNT}[phase]

    async def work() -> tuple[int, list[int]]:
        async with reading(whole, reads) as client:
            if not reached:
                while (await client.mesh()).running < streams:
                    await asyncio.sleep(0.001)
            await asyncio.gather(*(one.reaches(reached) for one in reads))
            seen = [len(one.tokens) for one in reads]
            await asyncio.to_thread(kill_and_restart, whole)
        return client.resumes, seen

    resumes, seen = asyncio.run(work())
    assert [one.facts for one in reads] == [one.facts for one in expected]
    assert all(len(one.finishes) == 1 for one in reads)
    if phase in ("prefill", "mid-decode"):
        assert all(count < COUNT for count in seen), "the kill came too late to mean anything"
        assert resumes >= 1

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
