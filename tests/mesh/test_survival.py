"""More than one fault at once, on real processes: what is left goes on, and what cannot says so."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path

import pytest
import pytest_asyncio

sys.path.insert(0, str(Path(__file__).parent))

from matrix import TRIES_MAX, Asked, Phase, Stream, is_stopped, passes, requests, undisturbed
from wires import FULL, PIPELINE, ROOT, WiredMesh, Worker, wired_mesh, within

from services.client import MeshClient
from services.fault_connection import Direction
from services.fault_proxy import Fault, FaultKind, NoFaults, Passing, SameFault
from services.tokenizer import load_served_model
from stage_worker import model_source
from stagemesh import errors
from stagemesh.frame import FrameKind, StepFrame
from stagemesh.v1 import admin_service_pb2, topology_pb2
from stagemesh.v1.generation_service_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP, Finish

MODEL = "tiny:layers=6"
SPANS = ("0-2", "2-4", "4-6")
FLAGS = ("--prefill-chunk-tokens", "32", "--failed-worker-s-max", "0.1", "--route-wait-s-max", "10")
REACHED_S_MAX = 20.0
DECODING = admin_service_pb2.GENERATION_STATE_DECODING
QUARANTINED = topology_pb2.WORKER_STATE_QUARANTINED

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def asked(model_home: Path) -> dict[bool, list[Asked]]:
    return undisturbed(MODEL, requests(80, 20, 24))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def standing(
    tmp_path_factory: pytest.TempPathFactory, asked: dict[bool, list[Asked]]
) -> AsyncIterator[WiredMesh]:
    async with wired_mesh(tmp_path_factory.mktemp("survival"), MODEL, SPANS, *FLAGS) as one:
        yield one


@pytest_asyncio.fixture(loop_scope="module")
async def mesh(standing: WiredMesh) -> AsyncIterator[WiredMesh]:
    """The standing mesh, whole before and after."""
    await standing.ready()
    yield standing
    standing.returned.plan = NoFaults()
    for name, worker in list(standing.workers.items()):
        worker.control.heal()
        worker.signal(signal.SIGCONT)
        if not worker.is_alive:
            await standing.replace(name)


async def kill(mesh: WiredMesh, *names: str) -> None:
    for name in names:
        mesh.workers[name].signal(signal.SIGKILL)
    for name in names:
        assert await mesh.workers[name].ended() == -signal.SIGKILL


async def resumed(mesh: WiredMesh, request_id: str, position: int) -> tuple[list[int], Finish]:
    """What the client reads that comes back for an answer."""
    tokens: list[int] = []
    finishes = []
    async with (
        MeshClient(mesh.address) as client,
        aclosing(client.resume(request_id, position)) as stream,
    ):
        async for response in stream:
            tokens += [token.token_id for token in response.tokens]
            finishes += [response.finish] if response.HasField("finish") else []
    (finish,) = finishes
    return tokens, finish


async def command_line(mesh: WiredMesh, request_id: str, position: int, *, status: int = 0) -> str:
    """What ``stagemesh generate --resume`` says."""
    words = ("--json", "--resume", request_id, "--from-position", str(position))
    command = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services", "generate", "--address", mesh.address, *words),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=ROOT,
    )
    said, _ = await command.communicate()
    assert command.returncode == status, said.decode()
    return said.decode()


async def in_mid_decode(mesh: WiredMesh, stream: Stream, stage: int = 1):
    """The stream runs, and the frame of its middle token waits before a stage."""
    hold = mesh.workers[PIPELINE[stage]].frames.hold(
        passes(stream.request, Phase.MID_DECODE, stream.asked)
    )
    reading = asyncio.create_task(stream.read(mesh))
    assert await within(REACHED_S_MAX, hold.reached.wait())
    return hold, reading


def second_decode_step(request: bytes) -> Callable[[Passing], bool]:
    """Of a request on the route that took it over: by then it has answered there."""
    positions = set[int]()

    def matches(passing: Passing) -> bool:
        rows = passing.rows if isinstance(passing, StepFrame) else ()
        positions.update(
            row.first_position
            for row in rows
            if row.request == request and passing.kind is FrameKind.DECODE
        )
        return len(positions) == 2

    return matches


async def test_the_full_worker_may_die_during_the_reroute(
    mesh: WiredMesh, asked: dict[bool, list[Asked]]
):
    stream = Stream(asked[True][0])
    mesh.expect("stage-1")
    hold, reading = await in_mid_decode(mesh, stream)

    def concerns(passing: Passing) -> bool:
        rows = passing.rows if isinstance(passing, StepFrame) else ()
        return any(row.request == stream.request for row in rows)

    async def is_rerouted() -> None:
        while list((await mesh.generation_of(stream.request_id)).route) != [FULL]:
            await asyncio.sleep(0.005)

    taking_over = mesh.workers[FULL].frames.hold(concerns)
    await kill(mesh, "stage-1")
    hold.release(drop=True)
    assert await within(REACHED_S_MAX, is_rerouted())
    assert await within(REACHED_S_MAX, taking_over.reached.wait())
    await kill(mesh, FULL)
    taking_over.release(drop=True)
    await mesh.replace("stage-1")
    await reading
    stream.check()
    assert [one.worker for one in stream.recoveries] == ["stage-1", FULL]
    assert list(stream.finishes[0].route) == list(PIPELINE)


HELD = slice(4, 6)
"""Tokens of the second sampled answer whose text may be the beginning of a stop string."""


@pytest.mark.parametrize("completes", [True, False], ids=["stops", "goes on"])
async def test_a_stage_may_die_while_half_a_stop_string_is_held_back(
    mesh: WiredMesh, asked: dict[bool, list[Asked]], completes: bool
):
    one = asked[True][1]
    words = load_served_model(model_source.resolve(MODEL).directory, MODEL).tokenizer.detokenizer()
    pieces = [words.add(token) for token in one.answer]
    half, following = "".join(pieces[HELD]), pieces[HELD.stop]
    assert all(pieces[: HELD.stop + 1])
    stop = half + (following if completes else f"not {following}")
    request_id = str(uuid.uuid4())
    message = one.message(request_id)
    message.stop.append(stop)
    ahead = one.count - 1 - HELD.stop
    hold = mesh.workers["stage-1"].frames.hold(
        passes(uuid.UUID(request_id).bytes, Phase.LAST_TOKEN, one, ahead=ahead)
    )
    text, tokens, finish = "", list[int](), None
    async for response in mesh.generation.Generate(message, timeout=60.0):
        text += response.text
        tokens += [token.token_id for token in response.tokens]
        if len(tokens) == HELD.stop and not hold.released.is_set():
            assert text == "".join(pieces[: HELD.start]), "the rest is held back"
            assert await within(REACHED_S_MAX, hold.reached.wait())
            await kill(mesh, "stage-1")
            hold.release(drop=True)
        finish = response.finish if response.HasField("finish") else None
    assert finish is not None
    assert [recovery.worker for recovery in finish.recoveries] == ["stage-1"]
    assert list(finish.route) == [FULL]
    if completes:
        assert text == "".join(pieces[: HELD.start])
        assert (finish.reason, finish.matched_stop) == (FINISH_REASON_STOP, stop)
    else:
        assert text == "".join(pieces) + words.finish()
        assert (finish.reason, tuple(tokens)) == (FINISH_REASON_LENGTH, one.answer)


@pytest.mark.parametrize("pair", [(0, 1), (0, 2), (1, 2)], ids=str)
async def test_two_stages_may_die_at_once(
    mesh: WiredMesh, asked: dict[bool, list[Asked]], pair: tuple[int, int]
):
    streams = [Stream(one) for one in asked[pair[0] == 0]]
    others = [asyncio.create_task(one.read(mesh)) for one in streams[1:]]
    hold, reading = await in_mid_decode(mesh, streams[0], pair[1])
    await kill(mesh, *(PIPELINE[stage] for stage in pair))
    hold.release(drop=True)
    await asyncio.gather(reading, *others)
    for stream in streams:
        stream.check()
    assert streams[0].recoveries[0].worker in {PIPELINE[stage] for stage in pair}
    assert list(streams[0].finishes[0].route) == [FULL]


async def test_without_any_route_the_end_is_typed_and_the_answer_can_be_gone_on_with(
    mesh: WiredMesh, asked: dict[bool, list[Asked]]
):
    whole = asked[True][0]
    stream = Stream(whole)
    hold, reading = await in_mid_decode(mesh, stream)
    await kill(mesh, "stage-1", FULL)
    hold.release(drop=True)
    await reading
    assert isinstance(stream.error, errors.RouteUnavailable)
    assert stream.error.metadata["position"] == str(len(stream.tokens))
    assert 0 < len(stream.tokens) < whole.count
    assert stream.tokens == whole.answer[: len(stream.tokens)]
    assert not stream.finishes
    assert stream.error.metadata["resumable"] == "yes"
    position = len(stream.tokens)
    said = await command_line(mesh, stream.request_id, position, status=1)  # still no route
    assert f"--resume {stream.request_id} --from-position {position}" in said
    for name in ("stage-1", FULL):
        await mesh.replace(name)
    await mesh.ready()
    rest, finish = await resumed(mesh, stream.request_id, position)
    assert (*stream.tokens, *rest) == whole.answer
    assert finish.reason == FINISH_REASON_LENGTH
    causes = [one.cause for one in finish.recoveries]
    assert set(causes[:-2]) == {"STAGE_UNREACHABLE"}  # once, or once for each of the two
    assert causes[-2:] == ["ROUTE_UNAVAILABLE"] * 2
    last = finish.recoveries[-1]
    assert (last.kept, list(last.to_route)) == (position, list(PIPELINE))
    shown = await mesh.generation_of(stream.request_id)
    assert list(shown.recoveries) == list(finish.recoveries)
    again = json.loads((await command_line(mesh, stream.request_id, 0)).splitlines()[-1])
    assert tuple(again["token_ids"]) == whole.answer


async def test_a_zombie_that_goes_on_is_fenced_and_rejoins_as_it_is(
    mesh: WiredMesh, asked: dict[bool, list[Asked]]
):
    pids = {name: worker.pid for name, worker in mesh.workers.items()}
    zombie = mesh.workers["stage-1"]
    streams = [Stream(one) for one in asked[False]]
    others = [asyncio.create_task(one.read(mesh)) for one in streams[1:]]
    hold, reading = await in_mid_decode(mesh, streams[0])
    zombie.signal(signal.SIGSTOP)
    assert await within(5.0, is_stopped(zombie))
    zombie.control.black_hole(Direction.BACK)  # nobody tells it that its epoch has ended
    hold.release()  # into the socket of a process that does not run
    await asyncio.gather(reading, *others)
    for stream in streams:
        stream.check()
    before = await mesh.fenced()
    zombie.signal(signal.SIGCONT)
    assert await within(REACHED_S_MAX, is_fenced(mesh, before)), await mesh.diagnostics()
    zombie.control.heal()
    await mesh.ready()
    assert {name: worker.pid for name, worker in mesh.workers.items()} == pids
    again = Stream(asked[True][1])
    await again.read(mesh)
    again.check()
    assert list(again.finishes[0].route) == list(PIPELINE)


@pytest.mark.parametrize("stage", [0, 1, 2], ids=["first", "middle", "last"])
async def test_a_zombie_that_speaks_while_its_request_goes_on_elsewhere_is_fenced(
    mesh: WiredMesh, asked: dict[bool, list[Asked]], stage: int
):
    for _ in range(TRIES_MAX):
        if await zombie_speaks_meanwhile(
            mesh, Stream(asked[True][0]), mesh.workers[PIPELINE[stage]]
        ):
            return
        await mesh.ready()
    raise AssertionError("the request had always ended when the zombie was fenced")


async def zombie_speaks_meanwhile(mesh: WiredMesh, stream: Stream, zombie: Worker) -> bool:
    """Whether its request was still under way on the new route when the zombie was fenced. The
    mesh does not wait for a test: a new route that a frame is held on is itself given up in time.
    """
    hold, reading = await in_mid_decode(mesh, stream, PIPELINE.index(zombie.name))
    kept = (await mesh.generation_of(stream.request_id)).completion_tokens
    zombie.signal(signal.SIGSTOP)
    assert await within(5.0, is_stopped(zombie))
    zombie.control.black_hole(Direction.BACK)  # nobody tells it that its epoch has ended
    elsewhere = mesh.workers[FULL].frames.hold(second_decode_step(stream.request))
    hold.release()  # into the socket of a process that does not run
    assert await within(REACHED_S_MAX, elsewhere.reached.wait())
    before = await mesh.fenced()
    zombie.signal(signal.SIGCONT)
    assert await within(REACHED_S_MAX, is_fenced(mesh, before)), await mesh.diagnostics()
    seen = await mesh.generation_of(stream.request_id)
    meanwhile = elsewhere.waiting and not reading.done()
    elsewhere.release()
    await reading
    zombie.control.heal()
    stream.check()
    assert stream.recoveries[0].worker == zombie.name
    if not meanwhile:
        return False
    assert seen.state == DECODING
    assert list(seen.route) == [FULL]
    assert kept < seen.completion_tokens < stream.asked.count, "the new route has answered"
    assert list(stream.finishes[0].route) == [FULL]
    return True


async def is_fenced(mesh: WiredMesh, before: int) -> None:
    while await mesh.fenced() == before:
        await asyncio.sleep(0.02)


async def test_a_worker_that_keeps_corrupting_is_quarantined_reloaded_and_taken_back(
    mesh: WiredMesh, asked: dict[bool, list[Asked]]
):
    liar = mesh.workers["stage-2"]
    pids = {name: worker.pid for name, worker in mesh.workers.items()}
    streams = [Stream(one) for one in asked[True]]
    others = [asyncio.create_task(one.read(mesh)) for one in streams[1:]]
    hold, reading = await in_mid_decode(mesh, streams[0])
    mesh.returned.plan_hop_from = 2
    mesh.returned.plan = SameFault(Fault(FaultKind.TOKEN_FIELD, resealed=True))
    hold.release()
    await asyncio.gather(reading, *others)
    for stream in streams:
        stream.check()

    async def is_quarantined() -> None:
        while not (await mesh.diagnostics()).counters["quarantines"]:
            await asyncio.sleep(0.02)

    assert await within(REACHED_S_MAX, is_quarantined())
    mesh.returned.plan = NoFaults()
    assert any(one.cause == "TOKEN_REJECTED" for one in streams[0].recoveries)
    await mesh.ready()
    assert "reinitialising" in liar.log.read_text()
    assert {name: worker.pid for name, worker in mesh.workers.items()} == pids
    again = Stream(asked[False][1])
    await again.read(mesh)
    again.check()
    assert list(again.finishes[0].route) == list(PIPELINE)
