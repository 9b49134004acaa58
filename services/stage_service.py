"""The receiving side of hops over gRPC: one servicer per process, one endpoint per route it
expects.

A predecessor dials in and opens a link; the endpoint says which step it expects; from then on every
frame is judged by ``HopReceiver``, answered, and delivered in order. The endpoint outlives the
connection: a reconnect is a new call for the same epoch, which replaces the older one at once,
since only one can be the live one and the newer is.

Backpressure is the transport's own: while ``queue_frames_max`` frames wait for delivery, nothing is
read, so HTTP/2's window fills and the predecessor's writes block. Meanwhile the last
acknowledgement is repeated now and then, as a sign of life; the predecessor can tell a busy
successor from a dead one.

Stage workers receive activations here, the coordinator tokens. Messages are handled as bytes and
parsed by ``codec`` alone, because a payload that gRPC's generated code parses is copied once more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol

import grpc

from services import codec
from services.codec import LinkOpening, LinkState
from services.finite import rows_are_finite
from services.grpc_types import RpcMethodHandler, ServicerContext
from services.hop_answers import HopAnswers
from stagemesh import PROTOCOL_VERSION
from stagemesh.errors import (
    ComputeFailed,
    EpochFenced,
    EpochNotOpen,
    FingerprintMismatch,
    FrameMalformed,
    HopMismatch,
    MeshError,
    OrderError,
)
from stagemesh.frame import StepFrame
from stagemesh.guards import Counters
from stagemesh.transport import (
    Boundary,
    HopFault,
    HopLimits,
    HopReceiver,
    Received,
)

SERVICE = "stagemesh.v1.StageService"
EXCHANGE = f"/{SERVICE}/Exchange"
INTEGRITY_US = "validation_us.integrity"
"""Counter of the microseconds that checking received frames has taken, of this thread's CPU
time."""
TIMED_EVERY = 8
"""Messages of which one is timed and counts for all: behind a forward, two looks at this thread's
CPU time would take a tenth of what is timed."""
QUEUE_FRAMES_MAX = 16
"""Frames that may wait for delivery before reading stops."""
SIGN_OF_LIFE_S = 0.1
"""How often a receiver that holds off repeats its last acknowledgement; well below
``hold_off_s``."""
RETIRED_EPOCHS_MAX = 1024
"""Epochs above the fence that are remembered as closed."""

Deliver = Callable[[StepFrame], Awaitable[None] | None]
"""Takes one frame. May return something to await: nothing more is delivered until it is done."""
OnFault = Callable[[HopFault], None]

_log = logging.getLogger(__name__)


class HandlerRegistry(Protocol):
    """What a server offers generated code."""

    def add_generic_rpc_handlers(self, handlers: tuple[grpc.GenericRpcHandler, ...]) -> None: ...
    def add_registered_method_handlers(
        self, service: str, handlers: dict[str, RpcMethodHandler]
    ) -> None: ...


class _Connection:
    """One Exchange call; ``end`` says why it was ended from this side."""

    __slots__ = ("end", "task", "worker")

    def __init__(self, worker: str) -> None:
        self.worker = worker
        self.task = asyncio.current_task()
        self.end: MeshError | None = None

    def finish(self, reason: MeshError) -> None:
        self.end = reason
        if self.task is not None:
            self.task.cancel()


class HopEndpoint:
    """The receiving end of one hop of one route in this process. Belongs to one event loop."""

    def __init__(
        self,
        receiver: HopReceiver,
        deliver: Deliver,
        *,
        queue_frames_max: int = QUEUE_FRAMES_MAX,
        on_fault: OnFault | None = None,
    ) -> None:
        self.receiver = receiver
        self.broken: MeshError | None = None
        """Set when ``deliver`` raised: frames would be lost, so nothing more is accepted."""
        self._deliver = deliver
        self._queue: deque[StepFrame] = deque()
        self._queue_frames_max = queue_frames_max
        self._on_fault = on_fault
        self._connection: _Connection | None = None
        self._pump: asyncio.Task[None] | None = None
        self._space = asyncio.Event()
        self._judged = 0
        """Messages that went through the receiver's checks."""

    @property
    def queued(self) -> int:
        """Frames accepted and not yet delivered."""
        return len(self._queue)

    async def serve(self, opening: LinkOpening, context: ServicerContext) -> None:
        """Carry one connection until the predecessor half-closes. Raises why it ended otherwise."""
        connection = _Connection(opening.worker)
        if self._connection is not None:
            self._connection.finish(OrderError("a newer connection took this link over"))
        self._connection = connection
        try:
            await self._carry(connection, context)
        except asyncio.CancelledError:
            if connection.end is None:
                raise
            raise connection.end from None
        finally:
            if self._connection is connection:
                self._connection = None

    def end(self, reason: MeshError) -> None:
        """Forget what is queued and end the connection with ``reason``."""
        self._queue.clear()
        if self._pump is not None:
            self._pump.cancel()
        if self._connection is not None:
            self._connection.finish(reason)

    # ---------------------------------------------------------------- inside

    async def _carry(self, connection: _Connection, context: ServicerContext) -> None:
        receiver = self.receiver
        state = LinkState(
            next_step=receiver.opened(),
            inflight_frames_max=receiver.limits.inflight_frames_max,
            inflight_bytes_max=receiver.limits.inflight_bytes_max,
        )
        await context.write(codec.encode_state(state))
        answers = HopAnswers(context, urgent_at=receiver.limits.inflight_frames_max // 4)
        writer = asyncio.create_task(answers.run())
        try:
            while True:
                data = await context.read()
                if data is grpc.aio.EOF:
                    await answers.flush()
                    return
                received = self._judge(data)
                for frame in received.frames:
                    self._push(frame)
                answers.put(received)
                if received.error is not None:
                    self._report(received.error, connection)
                if self.broken is not None:
                    raise self.broken
                if len(self._queue) >= self._queue_frames_max:
                    await self._hold_off(answers)
        finally:
            writer.cancel()

    def _judge(self, data: bytes) -> Received:
        try:
            message = codec.decode_request(data)
            if isinstance(message, LinkOpening):
                raise FrameMalformed("a link is opened once")
        except MeshError as error:
            return self.receiver.refuse(error)
        self._judged += 1
        if self._judged % TIMED_EVERY:
            return self.receiver.receive(message)
        began = time.thread_time_ns()
        received = self.receiver.receive(message)
        spent_us = (time.thread_time_ns() - began) * TIMED_EVERY // 1000
        self.receiver.counters.count(INTEGRITY_US, spent_us)
        return received

    async def _hold_off(self, answers: HopAnswers) -> None:
        """Until there is room again. The repeated acknowledgement says: alive, and busy."""
        while len(self._queue) >= self._queue_frames_max:
            self._space.clear()
            answers.repeat(self.receiver.acknowledgement())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SIGN_OF_LIFE_S):
                    await self._space.wait()
        if self.broken is not None:
            raise self.broken

    def _push(self, frame: StepFrame) -> None:
        """Deliver at once if nothing waits and the consumer is ready, else queue."""
        if self._pump is not None or self._queue:
            self._queue.append(frame)
            return
        waiting = self._hand_over(frame)
        if waiting is not None:
            self._pump = asyncio.create_task(self._drain(waiting))

    async def _drain(self, waiting: Awaitable[None] | None) -> None:
        """Deliver what queued up behind a delivery that takes time."""
        try:
            while True:
                if waiting is not None:
                    await waiting
                if not self._queue or self.broken is not None:
                    return
                waiting = self._hand_over(self._queue.popleft())
                self._space.set()
        except Exception as error:  # noqa: BLE001 - whatever the consumer raised ends this hop
            self._break(error)
        finally:
            self._pump = None
            self._space.set()

    def _hand_over(self, frame: StepFrame) -> Awaitable[None] | None:
        try:
            return self._deliver(frame)
        except Exception as error:  # noqa: BLE001 - whatever the consumer raised ends this hop
            self._break(error)
            return None

    def _break(self, error: Exception) -> None:
        _log.error("delivery failed on %s", self.receiver.hop, exc_info=error)
        broken = error if isinstance(error, MeshError) else ComputeFailed("delivery failed")
        self.broken = broken
        self._queue.clear()
        if self._connection is not None:
            self._report(broken, self._connection, fatal=True)
            self._connection.finish(broken)

    def _report(self, error: MeshError, connection: _Connection, *, fatal: bool = False) -> None:
        if self._on_fault is None:
            return
        receiver = self.receiver
        step = error.metadata.get("step", "")
        self._on_fault(
            HopFault(
                epoch=receiver.epoch,
                step=int(step) if step.isdecimal() else receiver.next_step,
                hop_from=receiver.hop_from,
                hop_to=receiver.hop_to,
                reason=error.reason,
                detail=str(error),
                fatal=fatal,
                peer=connection.worker,
            )
        )


class StageServicer:
    """Every hop that ends in this process. ``expect`` a route before its predecessor may dial
    in."""

    def __init__(
        self,
        *,
        limits: HopLimits | None = None,
        counters: Counters | None = None,
        on_fault: OnFault | None = None,
    ) -> None:
        self.counters = Counters() if counters is None else counters
        self._limits = limits or HopLimits()
        self._on_fault = on_fault
        self._endpoints: dict[int, HopEndpoint] = {}
        self._fenced = 0
        """Every epoch up to this one is refused for good."""
        self._retired: set[int] = set()

    def expect(
        self,
        epoch: int,
        hop_from: int,
        hop_to: int,
        fingerprint: bytes,
        deliver: Deliver,
        *,
        queue_frames_max: int = QUEUE_FRAMES_MAX,
        boundary: Boundary | None = None,
    ) -> HopEndpoint:
        """Accept links of this hop from now on. Raises EpochFenced for an epoch that has ended.

        ``deliver`` is called with each accepted frame, in order, once. Expecting an epoch again
        replaces the endpoint, and with it the step numbers begin again: a route is opened once.
        """
        if self._has_ended(epoch):
            raise EpochFenced("epoch has ended", epoch=epoch, current=self._fenced)
        self._end(epoch, EpochNotOpen("the route is being opened again", epoch=epoch))
        receiver = HopReceiver(
            epoch=epoch,
            hop_from=hop_from,
            hop_to=hop_to,
            fingerprint=fingerprint,
            limits=self._limits,
            boundary=boundary,
            finite=rows_are_finite,
            counters=self.counters,
        )
        endpoint = HopEndpoint(
            receiver, deliver, queue_frames_max=queue_frames_max, on_fault=self._on_fault
        )
        self._endpoints[epoch] = endpoint
        return endpoint

    def fence(self, epoch: int) -> None:
        """Refuse ``epoch`` and everything older for good, ending their links."""
        self._fenced = max(self._fenced, epoch)
        self._retired = {one for one in self._retired if one > self._fenced}
        for one in [one for one in self._endpoints if one <= epoch]:
            self._end(one, EpochFenced("epoch has ended", epoch=one, current=self._fenced))

    def retire(self, epoch: int) -> None:
        """Refuse only ``epoch`` for good. The coordinator ends one of several routes with this."""
        self._end(epoch, EpochFenced("epoch has ended", epoch=epoch))
        self._retired.add(epoch)
        while len(self._retired) > RETIRED_EPOCHS_MAX:
            self._retired.discard(min(self._retired))

    async def Exchange(self, requests: object, context: ServicerContext) -> None:  # noqa: N802
        """The RPC. Raises MeshErrors; the server's interceptor makes statuses of them."""
        data = await context.read()
        if data is grpc.aio.EOF:
            raise FrameMalformed("a link must begin with its opening")
        opening = codec.decode_request(data)
        if not isinstance(opening, LinkOpening):
            raise FrameMalformed("a link must begin with its opening")
        await self._endpoint_of(opening).serve(opening, context)

    def _endpoint_of(self, opening: LinkOpening) -> HopEndpoint:
        if opening.version != PROTOCOL_VERSION:
            facts = {"version": opening.version, "expected": PROTOCOL_VERSION}
            raise FrameMalformed("protocol version", **facts)
        if self._has_ended(opening.epoch):
            self.counters.count("frames_fenced")
            raise EpochFenced("epoch has ended", epoch=opening.epoch, current=self._fenced)
        endpoint = self._endpoints.get(opening.epoch)
        if endpoint is None:
            raise EpochNotOpen("no route is open at this epoch", epoch=opening.epoch)
        receiver = endpoint.receiver
        if (opening.hop_from, opening.hop_to) != (receiver.hop_from, receiver.hop_to):
            actual = f"{opening.hop_from}→{opening.hop_to}"
            raise HopMismatch("link of another hop", expected=receiver.hop, actual=actual)
        if opening.fingerprint != receiver.fingerprint:
            raise FingerprintMismatch(
                "link of another mesh or other weights",
                expected=receiver.fingerprint.hex(),
                actual=opening.fingerprint.hex(),
            )
        if endpoint.broken is not None:
            raise endpoint.broken
        return endpoint

    def _has_ended(self, epoch: int) -> bool:
        return epoch <= self._fenced or epoch in self._retired

    def _end(self, epoch: int, reason: MeshError) -> None:
        endpoint = self._endpoints.pop(epoch, None)
        if endpoint is not None:
            endpoint.end(reason)


def add_stage_servicer(servicer: StageServicer, server: HandlerRegistry) -> None:
    """Register the servicer as generated code would, but with bytes in and out."""
    handlers: dict[str, RpcMethodHandler] = {
        "Exchange": grpc.stream_stream_rpc_method_handler(servicer.Exchange, None, None)
    }
    generic = grpc.method_handlers_generic_handler(SERVICE, handlers)
    server.add_generic_rpc_handlers((generic,))
    server.add_registered_method_handlers(SERVICE, handlers)
