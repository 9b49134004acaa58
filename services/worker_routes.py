"""A worker's place on a route: from the order to join it to the frames that flow through.

    predecessor ──▶ StageServicer endpoint ──▶ compute thread ──▶ StageLink ──▶ successor

Joining fences everything older (links, endpoint, caches), opens the stage on the compute thread,
expects the predecessor, and dials the successor; only then does the worker arrive at the barrier,
so that a complete barrier means that every hop is up. A worker is on at most one route at a time.

Nothing here waits for the compute thread to compute: frames are handed over and come back by
``call_soon_threadsafe``. A full queue holds off the predecessor, never drops.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from services.channel import open_channel
from services.credentials import TlsFiles
from services.stage_link import StageLink
from services.stage_service import StageServicer
from stage_worker.runner import StageRunner
from stage_worker.step_account import StepTiming
from stagemesh.errors import EpochFenced, FingerprintMismatch, MeshError, StageUnreachable
from stagemesh.frame import StepFrame
from stagemesh.topology import COORDINATOR_HOP, Span
from stagemesh.transport import HopFault
from stagemesh.v1 import worker_service_pb2

ROOM_WAIT_S = 0.5
"""How long a thread waits for room in the compute queue before looking again whether the epoch
ended.
"""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HostedModel:
    """What a worker says of its model when it joins a route. Fingerprints are SHA-256 hex."""

    fingerprint: str
    span_fingerprint: str
    span: Span
    layer_count: int
    dtype: str


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """One computed step as it leaves. Seconds; ``finished`` on the monotonic clock."""

    frame: StepFrame
    finished: float
    queue_s: float
    compute_s: float
    bytes_in: int


@dataclass(frozen=True, slots=True)
class Held:
    """What the stage holds, as of its last step: positions, requests, and its own counters."""

    kv_tokens: int = 0
    requests: int = 0
    counters: Mapping[str, int] = field(default_factory=dict)


class WorkerRoutes:
    """See the module. Belongs to one event loop, except ``output``, which the compute thread
    calls.
    """

    def __init__(
        self,
        runner: StageRunner,
        servicer: StageServicer,
        *,
        name: str,
        instance: str,
        tls: TlsFiles | None,
        on_fault: Callable[[HopFault], None],
        on_step: Callable[[FinishedStep], None],
    ) -> None:
        self._runner = runner
        self._servicer = servicer
        self._name = name
        self._instance = instance
        self._tls = tls
        self._on_fault = on_fault
        self._on_step = on_step
        self._loop = asyncio.get_running_loop()
        self._link: StageLink | None = None
        self._accepted: dict[int, tuple[float, int]] = {}
        """Step → (when it was accepted, its bytes), until it has been computed."""
        self.held = Held()
        self._closing: set[asyncio.Task[None]] = set()
        self.epoch = 0
        """Of the route this worker is on; 0 if none."""
        self.fenced = 0
        """Everything up to this epoch is refused."""

    # -- joining and leaving --------------------------------------------------------------------

    async def join(self, order: worker_service_pb2.OpenRoute, model: HostedModel) -> dict[str, str]:
        """Take a place; returns the facts to bring to the barrier. Raises MeshError if it cannot be
        taken. The caller bounds the time."""
        if order.epoch <= max(self.fenced, self.epoch):
            raise EpochFenced("route is not newer", epoch=order.epoch, current=self.epoch)
        if order.fingerprint != model.fingerprint:
            raise FingerprintMismatch(
                "this worker has other weights",
                expected=order.fingerprint[:16],
                actual=model.fingerprint[:16],
            )
        self.fence(order.epoch - 1)
        self.epoch = order.epoch
        opening = self._runner.open(order.epoch, order.stage_index, order.stage_count)
        await asyncio.wrap_future(opening)
        fingerprint = bytes.fromhex(model.fingerprint)[:8]
        self._servicer.expect(
            order.epoch, order.stage_index - 1, order.stage_index, fingerprint, self._deliver
        )
        await self._dial(order, fingerprint)
        if self.epoch != order.epoch:
            raise EpochFenced("fenced while it was being opened", epoch=order.epoch)
        _log.info(
            "joined route epoch=%d as stage %d of %d; successor %s",
            order.epoch,
            order.stage_index,
            order.stage_count,
            order.successor_name,
        )
        return {
            "fingerprint": model.fingerprint,
            "span_fingerprint": model.span_fingerprint,
            "span": str(model.span),
            "layer_count": str(model.layer_count),
            "dtype": model.dtype,
            "instance": self._instance,
            "fenced": str(self.fenced),
        }

    async def _dial(self, order: worker_service_pb2.OpenRoute, fingerprint: bytes) -> None:
        last = order.stage_index == order.stage_count - 1
        up: asyncio.Future[None] = self._loop.create_future()

        def opened() -> None:
            if not up.done():
                up.set_result(None)

        def broken(error: MeshError) -> None:
            if not up.done():
                up.set_exception(error)

        link = StageLink(
            order.successor_address,
            lambda address: open_channel(address, tls=self._tls, peer=order.successor_name),
            epoch=order.epoch,
            hop_from=order.stage_index,
            hop_to=COORDINATOR_HOP if last else order.stage_index + 1,
            fingerprint=fingerprint,
            worker_name=self._name,
            peer=order.successor_name,
            counters=self._servicer.counters,
            on_fault=self._on_fault,
            on_opened=opened,
            on_broken=broken,
        )
        self._link = link
        link.open()
        await up

    def fence(self, epoch: int) -> None:
        """Refuse ``epoch`` and everything older from now on, and free what belongs to it."""
        self.fenced = max(self.fenced, epoch)
        self._servicer.fence(self.fenced)
        if self.epoch and self.epoch <= self.fenced:
            self.epoch = 0
            self._accepted.clear()
            self.held = Held(counters=self.held.counters)
            link, self._link = self._link, None
            if link is not None:
                self._later(link.close())
        freeing = self._runner.fence(self.fenced)
        freeing.add_done_callback(_log_failure)

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Leave the route and wait until its links are closed."""
        link, self._link = self._link, None
        self.epoch = 0
        if link is not None:
            await link.close()
        await asyncio.gather(*self._closing, return_exceptions=True)

    # -- frames ---------------------------------------------------------------------------------

    def _deliver(self, frame: StepFrame) -> Awaitable[None] | None:
        """From the predecessor to the compute thread; waits if that is full."""
        self._accepted[frame.step] = (time.monotonic(), frame.byte_count)
        try:
            self._runner.submit(frame)
        except queue.Full:
            return self._deliver_when_room(frame)
        return None

    async def _deliver_when_room(self, frame: StepFrame) -> None:
        while True:
            await asyncio.to_thread(self._runner.wait_for_room, ROOM_WAIT_S)
            if frame.epoch != self.epoch:
                return
            with contextlib.suppress(queue.Full):
                self._runner.submit(frame)
                return

    def output(self, frame: StepFrame, timing: StepTiming) -> None:
        """From the compute thread, on the compute thread."""
        finished, stage = time.monotonic(), self._runner.stage
        if stage is not None:
            self.held = Held(stage.kv_tokens, stage.requests, dict(stage.stage_counters))
        with contextlib.suppress(RuntimeError):  # The loop is closed: the process is ending.
            self._loop.call_soon_threadsafe(self._send, frame, finished, timing.total_ns / 1e9)

    def _send(self, frame: StepFrame, finished: float, compute_s: float) -> None:
        accepted, bytes_in = self._accepted.pop(frame.step, (finished - compute_s, 0))
        if frame.epoch != self.epoch or self._link is None:
            return
        try:
            self._link.send(frame)
        except MeshError as error:
            self._on_fault(self._fault_of(frame, error))
        queue_s = max(0.0, finished - compute_s - accepted)
        # Afterwards: the frame's way to the wire begins with the loop's next turn.
        self._loop.call_soon(
            self._on_step, FinishedStep(frame, finished, queue_s, compute_s, bytes_in)
        )

    def _fault_of(self, frame: StepFrame, error: MeshError) -> HopFault:
        return HopFault(
            epoch=frame.epoch,
            step=frame.step,
            hop_from=frame.hop_from,
            hop_to=frame.hop_to,
            reason=error.reason,
            detail=str(error),
            fatal=True,
            peer=self._name,
        )

    def report_crash(self, error: Exception) -> None:
        """Tell the coordinator that the compute thread gave up on a step."""
        known = error if isinstance(error, MeshError) else StageUnreachable(type(error).__name__)
        self._on_fault(
            HopFault(
                epoch=self.epoch,
                step=self._runner.computed_step + 1,
                hop_from=COORDINATOR_HOP,
                hop_to=COORDINATOR_HOP,
                reason="COMPUTE_FAILED",
                detail=str(known),
                fatal=True,
                peer=self._name,
            )
        )

    # -- numbers --------------------------------------------------------------------------------

    @property
    def acknowledged_step(self) -> int:
        """Highest step the successor acknowledged."""
        return self._link.acknowledged_step if self._link is not None else 0

    @property
    def acknowledge_s(self) -> float:
        """From sending a frame to its acknowledgement, smoothed, seconds; 0 if unknown."""
        return (self._link.sender.round_trip_s or 0.0) if self._link is not None else 0.0

    @property
    def unacknowledged(self) -> int:
        """Frames sent and not acknowledged."""
        return self._link.sender.unacknowledged if self._link is not None else 0


def _log_failure(future: Future[None]) -> None:
    """Freeing caches of a stage that is not loaded is no failure; anything else should be seen."""
    if future.cancelled():
        return
    error = future.exception()
    if error is not None and not isinstance(error, StageUnreachable):
        _log.error("freeing an epoch failed", exc_info=error)
