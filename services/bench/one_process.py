"""A whole mesh on one event loop: coordinator, stages and client in one process. *Benchmarks only.*

Everything is what separate processes run (servers, links and frames over loopback, one compute
thread a stage), but the processes: so that a benchmark can look at one step from all sides.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.settings import MeshPolicy
from services.bench.sides import Timeline, read_answer
from services.channel import open_channel
from services.coordinator_process import CoordinatorOptions, CoordinatorProcess
from services.lifecycle import StopSignal
from services.request_reader import EdgeLimits
from services.server import ServerOptions
from services.telemetry import Role, TraceStore, start_telemetry
from services.tokenizer import load_served_model
from services.worker_options import WorkerOptions, dtype_policy
from services.worker_process import WorkerProcess
from stage_worker.stage import Stage
from stagemesh.errors import RouteUnavailable
from stagemesh.topology import Span
from stagemesh.v1 import generation_service_pb2 as pb
from stagemesh.v1 import generation_service_pb2_grpc

READY_S_MAX = 120.0
POLL_S = 0.02
ANY_PORT = "127.0.0.1:0"


@dataclass(slots=True)
class OneProcessMesh:
    """A mesh that answers."""

    coordinator: CoordinatorProcess
    workers: list[WorkerProcess]
    stub: Any

    @property
    def stages(self) -> list[Stage]:
        """The stages, in order of the route."""
        found = [worker.runner.stage for worker in self.workers]
        return [stage for stage in found if isinstance(stage, Stage)]

    @property
    def rows_judged(self) -> int:
        """By the coordinator's own count."""
        counters = self.coordinator.mesh.state.counters
        return counters["tokens_checked"] + counters["marks_checked"]

    async def settled(self) -> None:
        """Until everything that was sent has come back."""
        routes = self.coordinator.mesh.state.routes.values()
        while any(live.scheduler.steps.outstanding for live in routes):
            await asyncio.sleep(POLL_S)

    async def generate(self, prompt: Sequence[int], max_tokens: int) -> Timeline:
        """One greedy answer of exactly so many tokens. Raises MeshError."""
        request = pb.GenerateRequest(
            tokens=pb.TokenPrompt(token_ids=prompt), max_tokens=max_tokens, ignore_eos=True
        )
        return await read_answer(self.stub, request)


@contextlib.asynccontextmanager
async def one_process_mesh(
    directory: Path, spans: Sequence[Span], *, dtype: str
) -> AsyncIterator[OneProcessMesh]:
    """A mesh over these spans of a model, ended with the block. Raises RouteUnavailable."""
    model = await asyncio.to_thread(load_served_model, directory, "benchmark")
    telemetry = start_telemetry(Role("coordinator"), store=TraceStore(), environment={})
    # No audits: there is no full worker that could make any.
    options = CoordinatorOptions(
        server=ServerOptions(ANY_PORT), limits=EdgeLimits(), policy=MeshPolicy(), drain_s=0.0
    )
    coordinator = CoordinatorProcess(options, model, telemetry)
    async with contextlib.AsyncExitStack() as stack:
        stop = StopSignal()
        _live(stack, coordinator.run(stop), stop)
        await _until(lambda: not coordinator.server.address.endswith(":0"))
        address = coordinator.server.address
        workers: list[WorkerProcess] = []
        for index, span in enumerate(spans):
            own = WorkerOptions(
                name=f"stage-{index}",
                model=directory,
                span=span,
                coordinator=address,
                server=ServerOptions(ANY_PORT),
                dtype=dtype_policy(dtype),
                drain_s=0.0,
            )
            stop = StopSignal()
            workers.append(WorkerProcess(own, stop))
            _live(stack, workers[-1].run(), stop)
        await _until(lambda: not coordinator.mesh.requests.why_not_ready())
        channel = await stack.enter_async_context(open_channel(address))
        stub: Any = generation_service_pb2_grpc.GenerationServiceStub
        yield OneProcessMesh(coordinator, workers, stub(channel))


def _live(
    stack: contextlib.AsyncExitStack, life: Coroutine[Any, Any, None], stop: StopSignal
) -> None:
    """Run one part of the mesh until the stack is unwound."""
    task = asyncio.create_task(life)

    async def end() -> None:
        stop.orphaned = True  # nothing is left that would have to be finished
        stop.set("the benchmark is over")
        await asyncio.gather(task, return_exceptions=True)

    stack.push_async_callback(end)


async def _until(holds: Callable[[], bool]) -> None:
    try:
        async with asyncio.timeout(READY_S_MAX):
            while not holds():
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise RouteUnavailable(f"no route was open within {READY_S_MAX:.0f} s") from None
