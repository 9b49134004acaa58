"""Suite ``coordinator``: what the coordinator itself costs, over stages that compute nothing.

Three processes: the coordinator exactly as `stagemesh coordinator` starts it, the null stages of
`null_stage`, and this one, which holds the clients. Where the machine has more than one core, the
coordinator gets one to itself, so that a figure is one of a core. Latency runs from the moment a
token was sampled (its own timestamp, on this machine's clock) until its client has it. Clients
only note when which bytes came: reading and checking them, on the core that the stages need as
well, waits until all streams have ended, and so do looks for reference cycles among them: one takes
10 to 20 ms, in which no client sees a token that has long arrived.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil

from services.bench.results import Result, measured, paired, percentile
from services.bench.sides import Report, Sizes
from services.channel import open_channel
from services.client import ConnectionLost, MeshClient
from services.local_mesh import COORDINATOR, ProcessSpec
from services.settings import Settings, arguments_for
from services.supervisor import Supervisor
from stagemesh.errors import MeshError, RouteUnavailable
from stagemesh.v1 import generation_service_pb2 as pb

GENERATE = "/stagemesh.v1.GenerationService/Generate"
NULL_STAGES = "null-stages"
START_S_MAX = 60.0
PROMPT = (30, 31, 32, 33)
HALF_LOAD_TOKENS_PER_S = 2500.0
"""Half of the promised 5,000."""
ACTIVE_STREAMS = 16
ACTIVE_TOKENS_PER_S = 640.0
"""Forty tokens per second and stream, beside the idle ones."""
CHANNELS = 8
"""Connections the clients share, as clients behind a few gateways would."""
STREAM_S_MAX = 120.0
FIRST_TOKENS = 4
"""Tokens of each stream that do not count: all requests come in at the same instant."""
ADMISSION_S = 0.5
"""What the active streams get to be admitted before the idle ones come."""


@dataclass(slots=True)
class NullMesh:
    """A coordinator with null stages, ready."""

    coordinator: psutil.Process
    calls: list[Any]

    def cpu_s(self) -> float:
        """CPU seconds the coordinator has used."""
        times = self.coordinator.cpu_times()
        return float(times.user + times.system)

    def call(self, index: int) -> Any:
        """Generate, on one of the shared connections; its responses stay bytes."""
        return self.calls[index % len(self.calls)]


@contextlib.asynccontextmanager
async def null_mesh(
    settings: Settings,
    *,
    requests_max: int,
    tokens_per_s: float,
    report: Report,
) -> AsyncIterator[NullMesh]:
    """A coordinator and its null stages; ended with the block."""
    before = _usable_cores()
    with tempfile.TemporaryDirectory(prefix="stagemesh-bench-") as folder:
        supervisor = Supervisor(Path(folder))
        ready = Path(folder) / "ready.json"
        flags = arguments_for(
            settings.mesh,
            listen="127.0.0.1:0",
            ready_file=str(ready),
            journal=str(Path(folder) / "journal.db"),
            requests_max=requests_max,
            step_rows_max=settings.process.step_rows_max,
            queue_max=100_000,
            log_level="warning",
            parent_pipe=supervisor.pipe_read,
            drain_s=0.0,
        )
        channels: list[grpc.aio.Channel] = []
        try:
            await supervisor.start([ProcessSpec(COORDINATOR, (COORDINATOR, *flags))])
            await _until(ready.exists, supervisor)
            address = str(json.loads(ready.read_text(encoding="utf-8"))["address"])
            await supervisor.start([_null_stages(address, tokens_per_s, supervisor.pipe_read)])
            await _until_ready(address, supervisor)
            channels += [open_channel(address) for _ in range(CHANNELS)]
            mesh = NullMesh(
                psutil.Process(supervisor.pids[COORDINATOR]),
                [
                    one.unary_stream(GENERATE, pb.GenerateRequest.SerializeToString)
                    for one in channels
                ],
            )
            _separate(mesh.coordinator.pid, supervisor.pids[NULL_STAGES], report)
            yield mesh
        finally:
            await asyncio.gather(*(channel.close() for channel in channels))
            await supervisor.stop(1.0)
            _own_cores(before)


def _null_stages(coordinator: str, tokens_per_s: float, pipe: int) -> ProcessSpec:
    arguments = (
        *("--coordinator", coordinator),
        *("--tokens-per-s", str(tokens_per_s)),
        *("--parent-pipe", str(pipe)),
    )
    program = (sys.executable, "-m", "services.bench.null_stage")
    return ProcessSpec(NULL_STAGES, arguments, program=program)


async def _until_ready(address: str, supervisor: Supervisor) -> None:
    ready = False

    async def look() -> None:
        nonlocal ready
        with contextlib.suppress(ConnectionLost):
            ready = (await client.mesh()).ready

    async with MeshClient(address) as client:
        await _until(lambda: ready, supervisor, look)


async def _until(
    reached: Callable[[], bool],
    supervisor: Supervisor,
    look: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Wait for it. Raises StartFailed if a process ended, RouteUnavailable if it takes too long."""
    deadline = time.monotonic() + START_S_MAX
    while time.monotonic() < deadline:
        if look is not None:
            await look()
        if reached():
            return
        failure = supervisor.failed_start()
        if failure is not None:
            raise failure
        await asyncio.sleep(0.05)
    raise RouteUnavailable(f"the null mesh was not ready within {START_S_MAX:.0f} s")


def _separate(coordinator: int, stages: int, report: Report) -> None:
    """One core for the coordinator, the others for the fixture and the clients."""
    cores = sorted(_usable_cores())
    if not cores:
        return
    if len(cores) < 2:
        report("one core only: coordinator, stages and clients share it")
        return
    for thread in psutil.Process(coordinator).threads():
        os.sched_setaffinity(thread.id, {cores[0]})
    os.sched_setaffinity(coordinator, {cores[0]})
    for thread in psutil.Process(stages).threads():
        os.sched_setaffinity(thread.id, set(cores[1:]))
    _own_cores(set(cores[1:]))


def _usable_cores() -> set[int]:
    """Cores this process may use; none where a process cannot choose."""
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set()


def _own_cores(cores: set[int]) -> None:
    """Keep this process, with every thread it has, to ``cores``; none changes nothing."""
    if not cores:
        return
    for thread in psutil.Process().threads():
        with contextlib.suppress(OSError):
            os.sched_setaffinity(thread.id, cores)


@dataclass(slots=True)
class Stream:
    """What one client got: responses as bytes, each with when it came (Unix time in ns)."""

    arrivals: list[tuple[int, bytes]] = field(default_factory=list)

    def timed(self, max_tokens: int) -> list[tuple[int, float]]:
        """Each token: when it came, and how long after it was sampled (seconds). Raises MeshError
        if a token is not the one that was due, or not all of them came."""
        found: list[tuple[int, float]] = []
        for at_ns, data in self.arrivals:
            for token in pb.GenerateResponse.FromString(data).tokens:
                due = len(PROMPT) + len(found)
                if token.position != due:
                    raise MeshError(f"token {due} was due, {token.position} came")
                found.append((at_ns, (at_ns - token.sampled_at_unix_ns) / 1e9))
        if len(found) != max_tokens:
            raise MeshError(f"an answer has {len(found)} of {max_tokens} tokens")
        return found


async def read(call: Any, max_tokens: int) -> Stream:
    """One answer to its end. Raises MeshError if it fails."""
    request = pb.GenerateRequest(
        tokens=pb.TokenPrompt(token_ids=PROMPT), max_tokens=max_tokens, ignore_eos=True
    )
    stream = Stream()
    try:
        async for data in call(request, timeout=STREAM_S_MAX):
            stream.arrivals.append((time.time_ns(), data))
    except grpc.aio.AioRpcError as error:
        raise MeshError(f"an answer failed: {error.code().name} {error.details()}") from error
    return stream


async def _all(mesh: NullMesh, streams: int, tokens: int) -> list[Stream]:
    work = (read(mesh.call(index), tokens) for index in range(streams))
    with _cycles_left():
        return list(await asyncio.gather(*work))


@contextlib.contextmanager
def _cycles_left() -> Iterator[None]:
    """Reference cycles are looked for before and after, not meanwhile."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _checked(streams: Sequence[Stream], tokens: int, *, behind: int) -> list[float]:
    """Latencies of all tokens but the first ``behind`` of each stream."""
    return [value for stream in streams for _, value in stream.timed(tokens)[behind:]]


async def throughput(settings: Settings, sizes: Sizes, report: Report) -> list[Result]:
    """Tokens per second to many clients; what a token costs the coordinator in CPU time; and
    whether it costs more when there are more streams."""
    walls: list[float] = []
    many: list[float] = []
    few: list[float] = []
    async with null_mesh(
        settings, requests_max=sizes.coordinator_streams, tokens_per_s=0.0, report=report
    ) as mesh:
        await _all(mesh, 16, 8)
        for _ in range(sizes.coordinator_turns):
            wall, cpu = await _rates(mesh, sizes.coordinator_streams, sizes.coordinator_tokens)
            walls.append(wall)
            many.append(cpu)
            few.append((await _rates(mesh, sizes.few_streams, sizes.coordinator_tokens))[1])
    note = f"{sizes.coordinator_streams} streams of {sizes.coordinator_tokens} tokens"
    unit = "tokens/CPU s"
    return [
        measured("coordinator_tokens", walls, unit="tokens/s", higher_is_better=True, note=note),
        measured(
            "coordinator_tokens_per_cpu_s",
            many,
            unit=unit,
            higher_is_better=True,
            note="the coordinator's own CPU time: what it could do if nobody else held it up",
        ),
        paired(
            "coordinator_linear",
            many,
            few,
            unit=unit,
            higher_is_better=True,
            note=f"{sizes.coordinator_streams} streams against {sizes.few_streams}: below 1, a "
            "token costs more where there are more streams",
        ),
    ]


async def _rates(mesh: NullMesh, streams: int, tokens: int) -> tuple[float, float]:
    """Tokens per second, and per second of the coordinator's CPU time."""
    began, cpu = time.perf_counter(), mesh.cpu_s()
    seen = await _all(mesh, streams, tokens)
    wall, busy, made = time.perf_counter() - began, mesh.cpu_s() - cpu, streams * tokens
    _checked(seen, tokens, behind=0)
    return made / wall, made / busy


async def latency(settings: Settings, sizes: Sizes, report: Report) -> list[Result]:
    """From sampling to the client, at half the promised load, while every stream decodes; and over
    all tokens, with every request beginning and ending at the same instant. One turn before those
    that count: a route first finds out how large its steps should be."""
    streams, tokens = sizes.coordinator_streams, sizes.coordinator_tokens
    decoding: list[float] = []
    worst: list[float] = []
    whole: list[float] = []
    async with null_mesh(
        settings, requests_max=streams, tokens_per_s=HALF_LOAD_TOKENS_PER_S, report=report
    ) as mesh:
        await _all(mesh, streams, tokens)
        for _ in range(sizes.coordinator_turns):
            seen = await _all(mesh, streams, tokens)
            whole.append(_p99_ms(_checked(seen, tokens, behind=FIRST_TOKENS)))
            steady = _while_all_decode(seen, tokens)
            decoding.append(_p99_ms(steady))
            worst.append(1000 * max(steady))
    load = f"{streams} streams, {HALF_LOAD_TOKENS_PER_S:.0f} tokens/s in all"
    return [
        measured(
            "coordinator_latency_p99",
            decoding,
            unit="ms",
            higher_is_better=False,
            note=f"{load}, from when all of them decode until the first ends",
        ),
        measured(
            "coordinator_latency_p99_whole",
            whole,
            unit="ms",
            higher_is_better=False,
            note=f"{load}; all begin at once and end at once, which is counted here",
        ),
        measured(
            "coordinator_latency_worst",
            worst,
            unit="ms",
            higher_is_better=False,
            note=f"{load}; what is rarer than one token in a hundred is seen here only",
        ),
    ]


def _while_all_decode(streams: Sequence[Stream], tokens: int) -> list[float]:
    """Latencies of the tokens that came while all streams decoded. Raises MeshError if they never
    did."""
    timed = [stream.timed(tokens) for stream in streams]
    first = max(one[FIRST_TOKENS][0] for one in timed)
    last = min(one[-1][0] for one in timed)
    found = [latency for one in timed for at_ns, latency in one if first <= at_ns < last]
    if not found:
        raise MeshError("the first stream had ended before all others decoded")
    return found


def _p99_ms(latencies: Sequence[float]) -> float:
    return 1000 * percentile(latencies, 99.0)


async def _p99(mesh: NullMesh, streams: int, tokens: int) -> float:
    """Milliseconds; without each stream's first tokens."""
    return _p99_ms(_checked(await _all(mesh, streams, tokens), tokens, behind=FIRST_TOKENS))


async def idle_streams(settings: Settings, sizes: Sizes, report: Report) -> list[Result]:
    """What a thousand open streams that get nothing cost those that do."""
    quiet: list[float] = []
    crowded: list[float] = []
    async with null_mesh(
        settings, requests_max=ACTIVE_STREAMS, tokens_per_s=ACTIVE_TOKENS_PER_S, report=report
    ) as mesh:
        await _all(mesh, ACTIVE_STREAMS, sizes.coordinator_tokens)
        for _ in range(sizes.coordinator_turns):
            quiet.append(await _p99(mesh, ACTIVE_STREAMS, sizes.coordinator_tokens))
            crowded.append(await _beside_idle(mesh, sizes))
    note = (
        f"p99 of {ACTIVE_STREAMS} active streams with {sizes.idle_streams} queued ones, and without"
    )
    return [
        paired("idle_streams_1000", crowded, quiet, unit="ms", higher_is_better=False, note=note)
    ]


async def _beside_idle(mesh: NullMesh, sizes: Sizes) -> float:
    """The active streams are admitted first and keep every place; the others wait behind them."""
    tokens = 4 * sizes.coordinator_tokens
    active = [
        asyncio.create_task(read(mesh.call(index), tokens)) for index in range(ACTIVE_STREAMS)
    ]
    await asyncio.sleep(ADMISSION_S)
    idle = [asyncio.create_task(read(mesh.call(index), 1)) for index in range(sizes.idle_streams)]
    try:
        with _cycles_left():
            await asyncio.wait(active, return_when=asyncio.FIRST_COMPLETED)
            waiting = sum(not task.done() for task in idle)
            seen = await asyncio.gather(*active)
    finally:
        for task in (*active, *idle):
            task.cancel()
        await asyncio.gather(*active, *idle, return_exceptions=True)
    if waiting < sizes.idle_streams:
        raise MeshError(f"only {waiting} of {sizes.idle_streams} streams were idle")
    # The last half: every idle stream has been opened by then.
    return _p99_ms(_checked(seen, tokens, behind=tokens // 2))
