"""The two sides of a comparison, running: a private mesh and a process with bare mlx-lm.

Both are started once and stay for a whole run; while one side computes, the other waits. What a
client of the mesh sees is measured, in this process, over gRPC: tokens count when they arrive.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import grpc

from services import settings as settings_module
from services.bench.baseline import BaselineProcess
from services.mesh_report import environment_json
from services.settings import Settings
from services.tokenizer import load_served_model
from services.up import LocalMesh, Wishes, local_mesh
from stage_worker.machine import core_count
from stagemesh.errors import MeshError
from stagemesh.v1 import generation_service_pb2 as pb

STREAM_S_MAX = 300.0
"""The longest answer of a benchmark; beyond it the mesh hangs."""
PROMPT_SEED = 20_240_607

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. The quick sizes show that everything works, not how fast it is."""

    turns: int = 5
    batch_turns: int = 3
    decode_prompt_tokens: int = 32
    decode_tokens: int = 64
    prompt_tokens: tuple[int, ...] = (512, 1024)
    batch_prompt_tokens: tuple[int, int] = (16, 128)
    batch_answer_tokens: tuple[int, int] = (32, 64)
    admission_streams: int = 8
    admission_prompt_tokens: int = 1000
    admission_turns: int = 9
    """One pause in seven hundred is what counts of each: three of them were 1.75 and 2.06."""
    coordinator_streams: int = 256
    few_streams: int = 64
    coordinator_tokens: int = 128
    coordinator_turns: int = 5
    idle_streams: int = 1000
    failover_turns: int = 8
    """One less than a local mesh restarts a process that keeps dying."""
    counted_streams: int = 12
    switched_streams: int = 24
    switched_pairs: int = 192
    micro_seconds: float = 0.5
    memory_requests: int = 10_000

    @classmethod
    def quick(cls) -> Sizes:
        """Everything once or twice, as small as it can be and still run every path."""
        return cls(
            turns=2,
            batch_turns=1,
            decode_tokens=16,
            batch_prompt_tokens=(8, 24),
            batch_answer_tokens=(6, 12),
            admission_streams=4,
            admission_turns=1,
            coordinator_tokens=24,
            coordinator_turns=1,
            failover_turns=1,
            counted_streams=2,
            switched_streams=2,
            switched_pairs=12,
            micro_seconds=0.05,
            memory_requests=200,
        )


@dataclass(slots=True)
class Timeline:
    """One answer as its client saw it: when each token arrived, on this process's clock."""

    began: float
    arrivals: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finish: pb.Finish | None = None

    @property
    def ttft_s(self) -> float:
        """From the call to the first token."""
        return self.arrivals[0] - self.began

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens behind the first by the time since the first."""
        return (len(self.arrivals) - 1) / (self.arrivals[-1] - self.arrivals[0])

    def gaps(self, since: float = 0.0, until: float = float("inf")) -> list[float]:
        """Times between consecutive tokens of which the later arrived in ``[since, until]``."""
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        return [later - earlier for earlier, later in pairs if since <= later <= until]


@dataclass(slots=True)
class Sides:
    """A mesh and a baseline that are ready. ``vocab_size`` bounds the ids of made-up prompts."""

    mesh: LocalMesh
    baseline: BaselineProcess
    environment: dict[str, Any]
    vocab_size: int
    context_tokens: int
    first_tokens: dict[int, tuple[list[float], list[float]]] = field(default_factory=dict)
    """Times to first token by prompt length, both sides': two suites look at the same turns."""

    def prompt(self, length: int, seed: int = 0) -> list[int]:
        """Reproducible token ids. What they mean is the same to both sides' arithmetic: nothing."""
        return made_up_prompt(length, self.vocab_size, seed)

    def fits(self, tokens: int) -> bool:
        """Whether the model's context holds so many."""
        return tokens <= self.context_tokens

    def request(self, prompt: Sequence[int], max_tokens: int, **fields: Any) -> pb.GenerateRequest:
        """A greedy request that makes exactly ``max_tokens`` tokens."""
        return pb.GenerateRequest(
            tokens=pb.TokenPrompt(token_ids=prompt),
            max_tokens=max_tokens,
            ignore_eos=True,
            **fields,
        )

    async def generate(self, prompt: Sequence[int], max_tokens: int, **fields: Any) -> Timeline:
        """One answer through the verifying client."""
        timeline = Timeline(time.perf_counter())
        stream = self.mesh.client.generate(
            self.request(prompt, max_tokens, **fields), timeout_s=STREAM_S_MAX
        )
        async with aclosing(stream) as responses:
            async for response in responses:
                note(timeline, response)
        return timeline

    async def generate_many(
        self, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int]
    ) -> list[Timeline]:
        """All answers at once. Each client only reads: checking seals is the reader's business,
        and readers sit elsewhere."""
        requests = zip(prompts, max_tokens, strict=True)
        return list(await asyncio.gather(*(self.read(one, count) for one, count in requests)))

    async def read(self, prompt: Sequence[int], max_tokens: int) -> Timeline:
        """One answer through the bare stub. Raises MeshError if it fails or is cut short."""
        return await read_answer(self.mesh.client.generation, self.request(prompt, max_tokens))


def made_up_prompt(length: int, vocab_size: int, seed: int = 0) -> list[int]:
    """Reproducible token ids below ``vocab_size``."""
    draw = random.Random(PROMPT_SEED + seed)  # noqa: S311 - not for secrets
    low = min(256, vocab_size // 4)
    return [draw.randrange(low, vocab_size - 1) for _ in range(length)]


async def read_answer(stub: Any, request: pb.GenerateRequest) -> Timeline:
    """Read one answer to its end. Raises MeshError if it fails or is cut short."""
    timeline = Timeline(time.perf_counter())
    try:
        async for response in stub.Generate(request, timeout=STREAM_S_MAX):
            note(timeline, response)
    except grpc.aio.AioRpcError as error:
        raise MeshError(f"an answer failed: {error.details()}") from error
    if timeline.finish is None or len(timeline.tokens) != request.max_tokens:
        raise MeshError(
            f"an answer has {len(timeline.tokens)} of {request.max_tokens} tokens: "
            f"{timeline.finish}"
        )
    return timeline


def note(timeline: Timeline, response: pb.GenerateResponse) -> None:
    """Put what a response brings on the timeline."""
    now = time.perf_counter()
    for token in response.tokens:
        timeline.arrivals.append(now)
        timeline.tokens.append(token.token_id)
    if response.HasField("finish"):
        timeline.finish = response.finish


async def take_turns(
    count: int,
    ours: Callable[[int], Awaitable[float]],
    theirs: Callable[[int], Awaitable[float]],
) -> tuple[list[float], list[float]]:
    """A B A B …, after one turn of each that does not count. The turn that does not count has a
    number of its own, so that what follows is new to both sides."""
    await ours(count)
    await theirs(count)
    mine: list[float] = []
    others: list[float] = []
    for turn in range(count):
        mine.append(await ours(turn))
        others.append(await theirs(turn))
    return mine, others


@contextlib.asynccontextmanager
async def open_sides(
    settings: Settings, *, full_worker: bool = True, report: Report
) -> AsyncIterator[Sides]:
    """Start both sides, and end them with the block. Raises what `local_mesh` raises, or
    BaselineFailed."""
    threads = settings.process.threads or max(1, core_count() // stages_of(settings))
    settings = replace(settings, process=replace(settings.process, log_level="warning"))
    wishes = Wishes(settings, full_worker=full_worker, listen="127.0.0.1:0")
    async with contextlib.AsyncExitStack() as stack:
        mesh = await stack.enter_async_context(local_mesh(wishes, report=report))
        report("starting bare mlx-lm beside it")
        baseline = BaselineProcess(
            mesh.model.directory,
            threads=threads * len(mesh.spans),
            dtype=settings.mesh.dtype,
            deterministic=settings.mesh.deterministic,
        )
        await stack.enter_async_context(baseline)
        served = load_served_model(mesh.model.directory, mesh.model.name)
        status = await mesh.status()
        facts = environment_json(status) | {
            # What the weights became, whatever the settings asked for.
            "dtype": status.workers[0].worker.dtype,
            "cores": core_count(),
            "spans": [str(span) for span in mesh.spans],
            "threads_per_stage": threads,
            "threads_baseline": baseline.environment["threads"],
            "blas_baseline": baseline.environment["blas"],
            "full_worker": full_worker,
        }
        yield Sides(mesh, baseline, facts, served.vocab_size, served.context_length)


def stages_of(settings: Settings) -> int:
    """How many stages the mesh will have."""
    return len(settings.mesh.spans) or settings.mesh.stages


def default_settings(flags: dict[str, object]) -> Settings:
    """The settings of a benchmark's private mesh."""
    return settings_module.load(flags=flags)
