"""A whole mesh on one event loop, with a fault proxy on every hop of the pipeline.

Real coordinator, real workers, real gRPC on loopback: everything is as in separate processes but
the processes, so that a test can read every counter and count every computed step.

    coordinator ─▶ "first" ─▶ stage-0 ─▶ "middle" ─▶ stage-1 ─▶ "last" ─▶ coordinator

With ``full``, a full worker stands beside it. Each of them has telemetry and a metrics reader of
its own, as in its own process.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from coordinator.instructions import PublishEvent
from coordinator.settings import MeshPolicy
from services.channel import open_channel
from services.coordinator_process import CoordinatorOptions, CoordinatorProcess
from services.fault_proxy import FrameProxy
from services.lifecycle import StopSignal
from services.request_reader import EdgeLimits
from services.server import ServerOptions
from services.telemetry import Role, Telemetry, TraceStore
from services.tokenizer import load_served_model
from services.worker_options import WorkerOptions
from services.worker_process import WorkerProcess
from stage_worker.loading import DTypePolicy
from stagemesh.frame import StepFrame
from stagemesh.topology import Span, WorkerInfo
from stagemesh.v1 import generation_service_pb2 as pb
from stagemesh.v1 import generation_service_pb2_grpc as rpc

READY_S_MAX = 60.0
HOPS = ("first", "middle", "last")
NAMES = {"first": "-1→0", "middle": "0→1", "last": "1→-1"}


class OwnLoopMesh:
    """See the module."""

    def __init__(self, dtype: DTypePolicy) -> None:
        self.dtype = dtype
        self.proxies = {hop: FrameProxy("", seed=7) for hop in HOPS}
        self.published: list[PublishEvent] = []
        self.sent: list[StepFrame] = []
        """Every step that was sent into the pipeline."""
        self.workers: dict[str, WorkerProcess] = {}
        self.readers = {
            name: InMemoryMetricReader() for name in ("coordinator", "stage-0", "stage-1", "full")
        }
        self.coordinator: CoordinatorProcess
        self._changed = asyncio.Event()

    # -- standing up ------------------------------------------------------------------------

    async def start(
        self,
        stack: contextlib.AsyncExitStack,
        model: Path,
        spans: tuple[str, str],
        policy: MeshPolicy,
        *,
        full: bool,
    ) -> None:
        for proxy in self.proxies.values():
            await proxy.start()
            stack.push_async_callback(proxy.stop)
        served = load_served_model(model, "tiny")
        readers = [self.readers["coordinator"]]
        telemetry = Telemetry(Role("coordinator"), store=TraceStore(), readers=readers)
        options = CoordinatorOptions(
            server=ServerOptions("127.0.0.1:0"),
            limits=EdgeLimits(),
            policy=policy,
            advertise=self.proxies["last"].address,
            drain_s=0.0,
        )
        self.telemetry = telemetry
        self.coordinator = CoordinatorProcess(options, served, telemetry)
        self._listen()
        self._live(stack, self.coordinator.run)
        await self._until(lambda: not self.coordinator.server.address.endswith(":0"))
        self.proxies["last"].target = self.coordinator.server.address
        for index, span in enumerate(spans):
            self._worker(stack, f"stage-{index}", span, model, self.proxies[HOPS[index]])
        if full:
            self._worker(stack, "full", "all", model, None)
        await self._until(lambda: self._open_routes() == 1 + full)

    def _open_routes(self) -> int:
        routes = self.coordinator.mesh.state.routes.values()
        return sum(live.phase.value == "open" for live in routes)

    def _worker(
        self,
        stack: contextlib.AsyncExitStack,
        name: str,
        span: str,
        model: Path,
        proxy: FrameProxy | None,
    ) -> None:
        options = WorkerOptions(
            name=name,
            model=model,
            span=None if span == "all" else Span.parse(span),
            coordinator=self.coordinator.server.address,
            server=ServerOptions("127.0.0.1:0"),
            advertise=proxy.address if proxy is not None else "",
            dtype=self.dtype,
            drain_s=0.0,
        )

        telemetry = Telemetry(Role("stage-worker", worker=name), readers=[self.readers[name]])

        def ready(_: WorkerInfo) -> None:
            if proxy is not None:
                proxy.target = worker.server.address

        async def run(stop: StopSignal) -> None:
            nonlocal worker
            worker = self.workers[name] = WorkerProcess(
                options, stop, telemetry_of=telemetry, on_ready=ready
            )
            try:
                await worker.run()
            finally:
                await telemetry.drain()

        worker: WorkerProcess

        self._live(stack, run)

    def _live(self, stack: contextlib.AsyncExitStack, run: Any) -> StopSignal:
        stop = StopSignal()
        task = asyncio.create_task(run(stop))

        async def end() -> None:
            stop.orphaned = True
            stop.set("the test is over")
            await asyncio.gather(task, return_exceptions=True)

        stack.push_async_callback(end)
        return stop

    def _listen(self) -> None:
        """See every event and every step as they pass, and change neither."""
        hub, links = self.coordinator.events, self.coordinator.links
        publish, send = hub.publish, links.send

        def published(event: PublishEvent) -> None:
            self.published.append(event)
            publish(event)
            self._changed.set()

        def sent(frame: StepFrame) -> None:
            self.sent.append(frame)
            send(frame)

        hub.publish, links.send = published, sent  # type: ignore[method-assign]

    async def _until(self, holds: Any) -> None:
        async with asyncio.timeout(READY_S_MAX):
            while not holds():
                await asyncio.sleep(0.01)

    async def until(self, holds: Any) -> None:
        """Until something is published behind which ``holds``."""
        async with asyncio.timeout(READY_S_MAX):
            while not holds():
                self._changed.clear()
                await self._changed.wait()

    async def points(self, process: str, metric: str) -> dict[tuple[str, ...], Any]:
        """What a process's metrics say now: label values, in the order of the labels' names, →
        the point."""
        data = await asyncio.to_thread(self.readers[process].get_metrics_data)
        return {
            tuple(str(point.attributes[name]) for name in sorted(point.attributes)): point
            for of_resource in (data.resource_metrics if data else ())
            for of_scope in of_resource.scope_metrics
            for found in of_scope.metrics
            if found.name == metric
            for point in found.data.data_points
        }

    # -- use --------------------------------------------------------------------------------

    @property
    def live(self) -> Any:
        """The pipeline's route."""
        return next(iter(self.coordinator.mesh.state.routes.values()))

    @property
    def next_step(self) -> int:
        return self.live.scheduler.steps.next_step

    async def settled(self) -> int:
        """Once every step sent has come back: how many there were since the first route."""
        await self._until(lambda: self._is_settled())
        return len(self.sent)

    def _is_settled(self) -> bool:
        routes = self.coordinator.mesh.state.routes.values()
        still = [
            live.phase.value == "open" and not live.scheduler.steps.outstanding for live in routes
        ]
        return bool(still) and all(still)

    def steps_computed(self) -> dict[str, int]:
        """By worker, since it loaded its model."""
        return {
            name: worker.runner.stage.stage_counters["steps"]
            for name, worker in self.workers.items()
            if worker.runner.stage is not None
        }

    def counters_at(self, hop: str) -> dict[str, int]:
        """What the receiver of a hop has counted."""
        if hop == "last":
            return dict(self.coordinator.mesh.state.counters)
        return dict(self.workers[f"stage-{HOPS.index(hop)}"].servicer.counters)

    def counters_at_sender(self, hop: str) -> dict[str, int]:
        """What the sender of a hop has counted."""
        if hop == "first":
            return dict(self.coordinator.mesh.state.counters)
        return dict(self.workers[f"stage-{HOPS.index(hop) - 1}"].servicer.counters)

    def faults(self, since: int = 0) -> set[tuple[str, str]]:
        """(hop, reason) of every fault published since."""
        return {
            (event.attributes["hop"], event.attributes["reason"])
            for event in self.published[since:]
            if event.type == "HopFault"
        }

    async def generate(self, count: int = 12, **fields: Any) -> tuple[list[int], pb.Finish]:
        """One answer: its token ids and its end."""
        request = pb.GenerateRequest(max_tokens=count, ignore_eos=True, **fields)
        tokens: list[int] = []
        finish = pb.Finish()
        async with (
            asyncio.timeout(READY_S_MAX),
            open_channel(self.coordinator.server.address) as to,
        ):
            async for response in rpc.GenerationServiceStub(to).Generate(request):
                assert not response.tokens or response.position == len(tokens)
                tokens += [token.token_id for token in response.tokens]
                if response.HasField("finish"):
                    finish = response.finish
        return tokens, finish


@contextlib.asynccontextmanager
async def own_loop_mesh(
    model: Path,
    spans: tuple[str, str] = ("0-2", "2-4"),
    policy: MeshPolicy | None = None,
    dtype: DTypePolicy = DTypePolicy.AUTO,
    *,
    full: bool = False,
) -> AsyncIterator[OwnLoopMesh]:
    """A mesh that answers, until the block is left."""
    mesh = OwnLoopMesh(dtype)
    async with contextlib.AsyncExitStack() as stack:
        await mesh.start(stack, model, spans, policy or MeshPolicy(), full=full)
        yield mesh
