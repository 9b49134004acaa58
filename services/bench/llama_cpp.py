"""llama.cpp beside stagemesh: its own server and its own RPC split, built by whoever compares.

Four ways to run one GGUF file, plus bare mlx-lm: stagemesh over two stages and in one worker,
llama.cpp split over two of its RPC servers and in one process. Every way has as many compute
threads altogether as there are cores, and each is asked over the network by a client in this
process: ours over gRPC, theirs over HTTP with server-sent events. Prompts are token ids, so no
tokenizer takes part; answers are greedy, ignore the end of the text and have a fixed length; no
side may reuse a prompt it has seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from services.bench import neighbours
from services.bench.side_by_side import Rounds, Task
from services.bench.sides import Report, Sides, Sizes, open_sides, read_answer
from services.bench.streams import mixed_lengths
from services.local_mesh import ProcessSpec, free_port, is_free
from services.settings import Settings
from services.supervisor import Supervisor
from services.up import Wishes, local_mesh
from stage_worker.machine import core_count
from stagemesh.errors import RouteUnavailable, StageError

STREAMS = 16
START_S_MAX = 120.0
ANSWER_S_MAX = 300.0
CONTEXT_TOKENS = 1024
"""Positions of each of llama.cpp's slots: the longest prompt and its answer."""
PREFILL_TOKENS = 512

PREFILL = Task("prefill", f"prefill of {PREFILL_TOKENS}")
DECODE = Task("decode", "decode, one stream")
BATCH = Task("streams", f"{STREAMS} streams of mixed lengths")
TASKS = (PREFILL, DECODE, BATCH)

OURS_SPLIT, OURS_WHOLE = "stagemesh, 2 stages", "stagemesh, 1 worker"
THEIRS_SPLIT, THEIRS_WHOLE = "llama.cpp, RPC × 2", "llama.cpp"
BARE = "mlx-lm"


class LlamaServerFailed(StageError):
    """llama.cpp's server refused a request, or sent what cannot be used."""

    reason = "LLAMA_SERVER_FAILED"


@dataclass(frozen=True, slots=True)
class Programs:
    """llama.cpp's programs, as they were built. ``rpc`` None: no split side."""

    server: Path
    rpc: Path | None


@dataclass(frozen=True, slots=True)
class Seen:
    """One answer: seconds to the first token, from the first to the last, and its tokens."""

    first_s: float
    decode_s: float
    tokens: int

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens behind the first by the time since the first."""
        return (self.tokens - 1) / self.decode_s


@dataclass(frozen=True, slots=True)
class Side:
    """One way to run the model. ``many`` returns seconds until the last of all answers ended."""

    one: Callable[[Sequence[int], int], Awaitable[Seen]]
    many: Callable[[Sequence[Sequence[int]], Sequence[int]], Awaitable[float]]


# -- llama.cpp ------------------------------------------------------------------------------------


def server_arguments(
    gguf: Path, port: int, *, threads: int, rpc_ports: Sequence[int] = ()
) -> tuple[str, ...]:
    """The server's command line: every stream in a slot of its own, nothing kept of old prompts."""
    arguments = [
        *("--model", str(gguf), "--host", "127.0.0.1", "--port", str(port)),
        *("--threads", str(threads), "--threads-batch", str(threads)),
        *("--parallel", str(STREAMS), "--ctx-size", str(STREAMS * CONTEXT_TOKENS)),
        *("--no-cache-prompt", "--cache-ram", "0", "--fit", "off"),
    ]
    if rpc_ports:
        devices = ",".join(f"127.0.0.1:{one}" for one in rpc_ports)
        split = ",".join("1" for _ in rpc_ports)
        arguments += ["--rpc", devices, "--n-gpu-layers", "999", "--tensor-split", split]
    return tuple(arguments)


def request_body(prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
    """What `/completion` is sent: greedy, exactly ``max_tokens`` tokens, streamed."""
    return {
        "prompt": list(prompt),
        "n_predict": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "cache_prompt": False,
        "stream": True,
    }


def ask(port: int, prompt: Sequence[int], max_tokens: int) -> Seen:
    """One answer of a server. Raises LlamaServerFailed. Blocks: call it on a thread."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S_MAX)
    body = json.dumps(request_body(prompt, max_tokens))
    began, first, made = time.perf_counter(), 0.0, 0
    try:
        connection.request("POST", "/completion", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise LlamaServerFailed(f"status {response.status}: {response.read(500)!r}")
        for line in response:
            if line.startswith(b"data: "):
                first = first or time.perf_counter()
                event = json.loads(line[6:])
                made = event.get("tokens_predicted", made) if event.get("stop") else made
        ended = time.perf_counter()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise LlamaServerFailed(f"no answer: {error}") from error
    finally:
        connection.close()
    if made != max_tokens:
        raise LlamaServerFailed(f"{made} of {max_tokens} tokens came")
    return Seen(first - began, ended - first, made)


def llama_side(port: int, threads: ThreadPoolExecutor) -> Side:
    """A running server as a side."""

    def run(prompt: Sequence[int], max_tokens: int) -> asyncio.Future[Seen]:
        return asyncio.get_running_loop().run_in_executor(threads, ask, port, prompt, max_tokens)

    async def many(prompts: Sequence[Sequence[int]], counts: Sequence[int]) -> float:
        began = time.perf_counter()
        pairs = zip(prompts, counts, strict=True)
        await asyncio.gather(*(run(prompt, count) for prompt, count in pairs))
        return time.perf_counter() - began

    return Side(run, many)


def is_healthy(port: int) -> bool:
    """Whether the server on ``port`` has loaded its model."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2.0)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@contextlib.asynccontextmanager
async def llama_servers(
    programs: Programs, gguf: Path, folder: Path, report: Report
) -> AsyncIterator[dict[str, int]]:
    """The ports of llama.cpp's two sides, by side; ended with the block."""
    cores, supervisor = core_count(), Supervisor(folder)
    ports = {THEIRS_WHOLE: free_port()}
    specs = [
        _spec("llama", programs.server, server_arguments(gguf, ports[THEIRS_WHOLE], threads=cores))
    ]
    rpc_ports: tuple[int, ...] = ()
    if programs.rpc is not None:
        rpc_ports = (free_port(), free_port())
        for index, port in enumerate(rpc_ports):
            where = ("--host", "127.0.0.1", "--port", str(port))
            threads = ("--threads", str(max(1, cores // 2)))
            specs.append(_spec(f"rpc-{index}", programs.rpc, (*where, *threads)))
        ports[THEIRS_SPLIT] = free_port()
        flags = server_arguments(gguf, ports[THEIRS_SPLIT], threads=1, rpc_ports=rpc_ports)
        specs.append(_spec("llama-split", programs.server, flags))
    report(f"starting {', '.join(spec.name for spec in specs)}; logs in {folder}")
    try:
        # The split server, the last one, connects to its RPC servers as soon as it starts.
        await supervisor.start(specs[:-1])
        await _until(lambda: not any(is_free(f"127.0.0.1:{one}") for one in rpc_ports), supervisor)
        await supervisor.start(specs[-1:])
        await _until(lambda: all(is_healthy(one) for one in ports.values()), supervisor)
        yield ports
    finally:
        await supervisor.stop(2.0)


def _spec(name: str, program: Path, arguments: Sequence[str]) -> ProcessSpec:
    return ProcessSpec(name, tuple(arguments), program=(str(program),))


async def _until(reached: Callable[[], bool], supervisor: Supervisor) -> None:
    """Wait for it. Raises StartFailed if a process ended, RouteUnavailable if it takes too long."""
    deadline = time.monotonic() + START_S_MAX
    while time.monotonic() < deadline:
        failure = supervisor.failed_start()
        if failure is not None:
            raise failure
        if await asyncio.to_thread(reached):
            return
        await asyncio.sleep(0.2)
    raise RouteUnavailable(f"llama.cpp was not ready within {START_S_MAX:.0f} s")


def version_of(program: Path) -> str:
    """What a program of llama.cpp says it is."""
    shown = subprocess.run(  # noqa: S603 - the operator's own program
        [str(program), "--version"], capture_output=True, text=True, check=False, timeout=30
    )
    lines = (shown.stderr + shown.stdout).splitlines()
    found = next((line for line in lines if line.startswith("version")), "version unknown")
    return found.removeprefix("version:").strip()


# -- ours -----------------------------------------------------------------------------------------


def mesh_side(client: Any, sides: Sides) -> Side:
    """A running mesh as a side."""

    async def one(prompt: Sequence[int], max_tokens: int) -> Seen:
        seen = await read_answer(client.generation, sides.request(prompt, max_tokens))
        return Seen(seen.ttft_s, seen.arrivals[-1] - seen.arrivals[0], len(seen.tokens))

    async def many(prompts: Sequence[Sequence[int]], counts: Sequence[int]) -> float:
        began = time.perf_counter()
        requests = [sides.request(*pair) for pair in zip(prompts, counts, strict=True)]
        await asyncio.gather(*(read_answer(client.generation, one) for one in requests))
        return time.perf_counter() - began

    return Side(one, many)


def bare_side(sides: Sides) -> Side:
    """The process with bare mlx-lm as a side; nothing lies between it and the clock."""

    async def one(prompt: Sequence[int], max_tokens: int) -> Seen:
        seen = await sides.baseline.ask("single", prompt=list(prompt), max_tokens=max_tokens)
        return Seen(float(seen["ttft_s"]), float(seen["decode_s"]), len(seen["tokens"]))

    async def many(prompts: Sequence[Sequence[int]], counts: Sequence[int]) -> float:
        asked = {"prompts": [list(prompt) for prompt in prompts], "max_tokens": list(counts)}
        return float((await sides.baseline.ask("batch", **asked))["seconds"])

    return Side(one, many)


# -- the comparison -------------------------------------------------------------------------------


async def compare(
    settings: Settings, programs: Programs, gguf: Path, folder: Path, sizes: Sizes, report: Report
) -> dict[str, Any]:
    """The whole comparison, as a run that can be saved. ``settings.mesh.model`` should be made of
    ``gguf``."""
    whole = replace(settings, mesh=replace(settings.mesh, stages=1, spans=()))
    with ThreadPoolExecutor(STREAMS) as threads:
        async with contextlib.AsyncExitStack() as stack:
            ports = await stack.enter_async_context(
                llama_servers(programs, gguf, folder / "llama", report)
            )
            sides = await stack.enter_async_context(open_sides(settings, report=report))
            wishes = Wishes(whole, full_worker=False, listen="127.0.0.1:0")
            single = await stack.enter_async_context(local_mesh(wishes, report=report))
            ways = {
                OURS_SPLIT: mesh_side(sides.mesh.client, sides),
                OURS_WHOLE: mesh_side(single.client, sides),
                **{name: llama_side(port, threads) for name, port in sorted(ports.items())},
                BARE: bare_side(sides),
            }
            before = neighbours.read()
            rounds = await take_rounds(ways, sides, sizes, report)
            others = neighbours.others_share(before, neighbours.read(), psutil.cpu_count() or 1)
            facts = {
                "file": gguf.name,
                "llama.cpp": version_of(programs.server),
                "dtype of stagemesh and mlx-lm": sides.environment.get("dtype", ""),
                "rounds": sizes.turns,
                "CPU time others used meanwhile": f"{100 * (others or 0.0):.0f} %",
            }
            compared = rounds.document(gguf.stem, TASKS, facts)
            return {"results": [], "environment": sides.environment, "side_by_side": [compared]}


async def take_rounds(ways: dict[str, Side], sides: Sides, sizes: Sizes, report: Report) -> Rounds:
    """Every side does every task once a round, after one round that does not count."""
    pairs = {"stagemesh": (OURS_SPLIT, OURS_WHOLE), "llama.cpp": (THEIRS_SPLIT, THEIRS_WHOLE)}
    there = {name: pair for name, pair in pairs.items() if set(pair) <= set(ways)}
    rounds = Rounds(tuple(ways), there)
    prompts, answers = mixed_lengths(sides, sizes, STREAMS)
    for turn in range(-1, sizes.turns):
        for name, side in ways.items():
            first = await side.one(sides.prompt(PREFILL_TOKENS, 50 + turn), 1)
            decoded = await side.one(
                sides.prompt(sizes.decode_prompt_tokens, 50 + turn), sizes.decode_tokens
            )
            seconds = await side.many(prompts, answers)
            if turn < 0:
                continue
            rounds.add(PREFILL, name, PREFILL_TOKENS / first.first_s)
            rounds.add(DECODE, name, decoded.decode_tokens_per_s)
            rounds.add(BATCH, name, sum(answers) / seconds)
        report(f"round {turn + 1} of {sizes.turns} is done")
    return rounds
