"""Stages that compute nothing: what is left to measure is the coordinator. *Benchmarks only.*

``python -m services.bench.null_stage --coordinator HOST:PORT --stages N`` registers N workers of a
model without weights and speaks the real protocol on every hop: sealed frames, acknowledgements,
marks, sealed tokens with their chain. Only the forward is missing: a step is answered at once, or,
with ``--tokens-per-s``, not faster than that. A request's tokens are a counter, so every answer can
be checked.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from services import codec
from services.collector import calm_collector
from services.control_stream import ControlStream
from services.lifecycle import StopSignal
from services.server import MeshServer, ServerOptions
from services.stage_service import StageServicer, add_stage_servicer
from services.worker_codec import worker_to_proto
from services.worker_routes import FinishedStep, HostedModel, WorkerRoutes
from stage_worker.step_account import StepTiming
from stagemesh.checksum import chain_next, history_digest
from stagemesh.errors import MeshError
from stagemesh.frame import FrameKind, StepFrame, StepRow
from stagemesh.token import StageMark, TokenChunk
from stagemesh.topology import COORDINATOR_HOP, Span, WorkerInfo, WorkerName
from stagemesh.transport import HopFault
from stagemesh.v1 import topology_pb2, worker_service_pb2

if TYPE_CHECKING:
    from stage_worker.runner import StageRunner

FINGERPRINT = hashlib.sha256(b"stagemesh benchmark without weights").hexdigest()
MARGIN = 1.0
TOKEN_IDS = 200
"""Tokens are 20 + position modulo this: ids that every vocabulary has."""
REPORT_INTERVAL_S = 0.25

Request = worker_service_pb2.ConnectRequest


def token_at(position: int) -> int:
    """What a null stage answers behind ``position`` tokens."""
    return 20 + position % TOKEN_IDS


@dataclass(slots=True)
class _Request:
    length: int
    digest: int
    prompt_length: int
    chain: bytes


class NullStage:
    """The part of `stage_worker.stage.Stage` that is not arithmetic."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stage_index = 0
        self.stage_count = 1
        self._requests: dict[bytes, _Request] = {}

    def open(self, stage_index: int, stage_count: int) -> None:
        """Another route: nothing is cached any more."""
        self._requests.clear()
        self.stage_index, self.stage_count = stage_index, stage_count

    def step(self, frame: StepFrame) -> StepFrame:
        """The frame for the next hop."""
        is_last = self.stage_index == self.stage_count - 1
        rows = tuple([self._row(frame, row, is_last=is_last) for row in frame.rows])
        return replace(
            frame,
            hop_from=self.stage_index,
            hop_to=COORDINATOR_HOP if is_last else self.stage_index + 1,
            rows=rows,
            payload_crc32c=0,
            header_crc32c=0,
        )

    def _row(self, frame: StepFrame, row: StepRow, *, is_last: bool) -> StepRow:
        if frame.kind is FrameKind.CLOSE:
            self._requests.pop(row.request, None)
            return replace(row, marks=(*row.marks, StageMark(0, 0, 0)))
        known = self._requests.get(row.request)
        if row.opening is not None or known is None:
            opening = row.opening
            prompt = opening.prompt_length if opening else row.token_count
            known = _Request(0, 0, prompt, opening.chain if opening else bytes(16))
            if frame.kind is not FrameKind.PROBE:
                self._requests[row.request] = known
        if frame.kind is FrameKind.REWIND:
            known.length = row.first_position
        known.length += row.token_count
        known.digest = history_digest(row.token_ids, known.digest)
        marks = (*row.marks, StageMark(known.length, known.digest, 0))
        token = self._token(frame, row, known, marks) if is_last and row.samples else None
        return replace(row, marks=marks, token=token)

    def _token(
        self, frame: StepFrame, row: StepRow, known: _Request, marks: tuple[StageMark, ...]
    ) -> TokenChunk:
        position = row.end_position
        token_id = token_at(position)
        known.chain = chain_next(known.chain, position, token_id)
        return TokenChunk(
            request=row.request,
            position=position,
            token_id=token_id,
            epoch=frame.epoch,
            step=frame.step,
            logprob=0.0,
            margin=MARGIN,
            sampled_at_unix_ns=time.time_ns(),
            source=self.name,
            chain=known.chain,
            marks=marks,
        ).sealed()


class NullRunner:
    """Stands in for `stage_worker.runner.StageRunner`, on the event loop itself.

    ``tokens_per_s``: no more rows than this leave per second; 0 answers at once.
    """

    def __init__(
        self,
        stage: NullStage,
        on_output: Callable[[StepFrame, StepTiming], None],
        *,
        tokens_per_s: float = 0.0,
    ) -> None:
        self.null = stage
        self.stage = None
        self.computed_step = 0
        self.accepted_step = 0
        self._on_output = on_output
        self._tokens_per_s = tokens_per_s
        self._free_at = 0.0
        self._loop = asyncio.get_running_loop()

    def open(self, epoch: int, stage_index: int, stage_count: int) -> Future[None]:
        """A new route begins."""
        self.null.open(stage_index, stage_count)
        self.computed_step = self.accepted_step = 0
        return _done()

    def fence(self, epoch: int) -> Future[None]:
        """Nothing is held that would have to be freed."""
        return _done()

    def wait_for_room(self, timeout_s: float) -> bool:
        """There always is."""
        return True

    def submit(self, frame: StepFrame) -> None:
        """Answer now, or when it is this frame's turn."""
        self.accepted_step = frame.step
        if not self._tokens_per_s:
            self._answer(frame)
            return
        now = self._loop.time()
        self._free_at = max(now, self._free_at) + len(frame.rows) / self._tokens_per_s
        self._loop.call_at(self._free_at, self._answer, frame)

    def _answer(self, frame: StepFrame) -> None:
        output = self.null.step(frame)
        self.computed_step = frame.step
        facts = (frame.epoch, frame.step, frame.kind, len(frame.rows), frame.token_count)
        self._on_output(output, StepTiming(*facts, 0, time.time_ns(), 0, 0, 0))


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future


class NullWorker:
    """One registered worker without a model."""

    def __init__(self, coordinator: str, index: int, stages: int, tokens_per_s: float) -> None:
        self.name = WorkerName(f"null-{index}")
        self._instance = uuid.uuid4().hex
        self._span = Span(index, index + 1)
        self._stages = stages
        self.server = MeshServer(ServerOptions("127.0.0.1:0"))
        self.servicer = StageServicer(on_fault=self._fault)
        self.server.add(add_stage_servicer, self.servicer)
        # Only a pipeline's last stage sets the pace.
        pace = tokens_per_s if index == stages - 1 else 0.0
        self.runner = NullRunner(
            NullStage(self.name),
            lambda frame, timing: self.routes.output(frame, timing),
            tokens_per_s=pace,
        )
        self.routes = WorkerRoutes(
            cast("StageRunner", self.runner),
            self.servicer,
            name=self.name,
            instance=self._instance,
            tls=None,
            on_fault=self._fault,
            on_step=self._step_done,
        )
        self.control = ControlStream(
            coordinator,
            describe=self._describe,
            on_command=self._command,
            on_welcome=lambda: None,
            on_lost=lambda: None,
        )
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until cancelled."""
        await self.server.start()
        self.server.set_serving(serving=True)
        reporting = asyncio.create_task(self._report())
        try:
            await self.control.run()
        finally:
            reporting.cancel()
            await self.routes.close()
            await self.server.drain(0)

    def _describe(self) -> topology_pb2.Worker:
        return worker_to_proto(
            WorkerInfo(
                name=self.name,
                address=self.server.address,
                span=self._span,
                layer_count=self._stages,
                fingerprint=FINGERPRINT,
                span_fingerprint=FINGERPRINT,
                dtype="f32",
                pid=0,
                instance=self._instance,
                kv_budget_tokens=0,
                memory_bytes=0,
                capabilities=frozenset({"batch", "trim"}),
            )
        )

    def _command(self, command: worker_service_pb2.ConnectResponse) -> None:
        kind = command.WhichOneof("message")
        if kind == "open_route":
            task = asyncio.create_task(self._open_route(command.open_route))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif kind == "fence":
            self.routes.fence(command.fence.epoch)

    async def _open_route(self, order: worker_service_pb2.OpenRoute) -> None:
        arrival = worker_service_pb2.BarrierArrival(
            name=order.barrier, epoch=order.epoch, generation=order.generation
        )
        model = HostedModel(FINGERPRINT, FINGERPRINT, self._span, self._stages, "f32")
        try:
            async with asyncio.timeout(order.timeout_ms / 1000.0):
                arrival.facts.update(await self.routes.join(order, model))
        except (TimeoutError, MeshError) as error:
            arrival.refusal = f"cannot join: {error}"
        self.control.send(Request(arrival=arrival))

    def _fault(self, fault: HopFault) -> None:
        self.control.send(Request(fault=codec.fault_to_pb(fault)))

    def _step_done(self, step: FinishedStep) -> None:
        """Progress is reported by the clock."""

    async def _report(self) -> None:
        while True:
            report = worker_service_pb2.ProgressReport(
                epoch=self.routes.epoch,
                accepted_step=self.runner.accepted_step,
                computed_step=self.runner.computed_step,
                acknowledged_step=self.routes.acknowledged_step,
            )
            self.control.report(report)
            await asyncio.sleep(REPORT_INTERVAL_S)


async def serve(coordinator: str, stages: int, tokens_per_s: float) -> None:
    """Every null worker, until cancelled."""
    async with asyncio.TaskGroup() as group:
        for index in range(stages):
            group.create_task(NullWorker(coordinator, index, stages, tokens_per_s).run())


async def _until_stopped(options: argparse.Namespace) -> None:
    stop = StopSignal()
    stop.listen_to_signals()
    stop.follow_parent(options.parent_pipe)
    serving = asyncio.create_task(serve(options.coordinator, options.stages, options.tokens_per_s))
    stopping = asyncio.create_task(stop.wait())
    done, _ = await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    for task in (serving, stopping):
        task.cancel()
    await asyncio.gather(serving, stopping, return_exceptions=True)
    if serving in done:
        serving.result()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run until a signal ends the process."""
    parser = argparse.ArgumentParser(prog="python -m services.bench.null_stage")
    parser.add_argument("--coordinator", required=True)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--tokens-per-s", type=float, default=0.0)
    parser.add_argument("--parent-pipe", type=int, default=-1)
    options = parser.parse_args(arguments)
    calm_collector()
    asyncio.run(_until_stopped(options))


if __name__ == "__main__":
    main()
