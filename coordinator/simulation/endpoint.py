"""The receiving end of hops in memory: the real ``HopReceiver`` on simulated connections.

Follows ``services.stage_service``: an endpoint per expected epoch outlives its connections, a newer
connection replaces an older one, acknowledgements wait a moment for others to join them, a consumer
without room stops the reading, and while it does the last acknowledgement is repeated as a sign of
life.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from coordinator.simulation.link import LinkState, Opening
from coordinator.simulation.network import Connection
from coordinator.simulation.virtual import Process
from coordinator.simulation.watch import Watch
from coordinator.simulation.wire import Garbage
from stagemesh.errors import (
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
from stagemesh.tensor import Tensor
from stagemesh.transport import Ack, HopFault, HopLimits, HopReceiver, Nack, Received

ACK_DELAY_S = 0.002
"""How long an acknowledgement waits for others; the real one waits longer, on longer steps."""
SIGN_OF_LIFE_S = 0.1
QUEUE_FRAMES_MAX = 4
"""Frames that wait for the consumer before reading stops; small, so that it happens."""
NOT_A_NUMBER = 2**64 - 1
"""The value that stands for NaN in the integer activations of the simulated model."""

Deliver = Callable[[StepFrame], bool]
"""Takes a frame, or says False: no room now."""


def is_finite(frame: StepFrame) -> bool:
    """No activation holds the value that stands for NaN."""
    tensor: Tensor | None = frame.tensor
    if tensor is None:
        return True
    data = bytes(tensor.payload)
    bad = NOT_A_NUMBER.to_bytes(8, "little")
    return all(data[at : at + 8] != bad for at in range(0, len(data), 8)) if bad in data else True


class SimEndpoint:
    """One hop that ends here."""

    def __init__(
        self,
        process: Process,
        receiver: HopReceiver,
        deliver: Deliver,
        on_fault: Callable[[HopFault], None],
        passed: Callable[[StepFrame, int], None],
    ) -> None:
        """``passed`` hears of every frame that passed the receiver, with the hop it is for."""
        self.receiver = receiver
        self._passed = passed
        self.queue: deque[StepFrame] = deque()
        self.connection: Connection | None = None
        self.ended = False
        self._process = process
        self._deliver = deliver
        self._on_fault = on_fault
        self._worker = ""
        self._inbox: deque[Any] = deque()
        self._holding = False
        self._ack: Ack | None = None
        self._nacks: list[Nack] = []
        self._unanswered = 0
        self._flush_due = False

    def serve(self, opening: Opening, connection: Connection) -> None:
        """A predecessor has dialled; the newer connection is the live one."""
        if self.connection is not None:
            self.connection.cut(OrderError("a newer connection took this link over"), tell="client")
        self.connection, self._worker = connection, opening.worker
        self._inbox.clear()
        self._ack, self._nacks, self._unanswered = None, [], 0
        connection.up.deliver = lambda message: self._arrived(connection, message)
        connection.on_server_closed = lambda error: self._closed(connection)
        limits = self.receiver.limits
        state = LinkState(
            self.receiver.opened(), limits.inflight_frames_max, limits.inflight_bytes_max
        )
        connection.down.send(state)

    def end(self, reason: MeshError) -> None:
        """Forget what is queued and end the connection with ``reason``."""
        self.ended = True
        self.queue.clear()
        self._inbox.clear()
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.cut(reason, tell="client")

    def resume(self) -> None:
        """The consumer may have room again."""
        while self.queue and not self.ended and self._deliver(self.queue[0]):
            self.queue.popleft()
        if self._holding and len(self.queue) < QUEUE_FRAMES_MAX:
            self._holding = False
            self._read()

    # Inside

    def _closed(self, connection: Connection) -> None:
        if self.connection is connection:
            self.connection = None

    def _arrived(self, connection: Connection, message: Any) -> None:
        if self.connection is not connection or self.ended:
            return
        self._inbox.append(message)
        self._read()

    def _read(self) -> None:
        while self._inbox and not self._holding and not self.ended:
            received = self._judge(self._inbox.popleft())
            for frame in received.frames:
                self._push(frame)
            self._answer(received)
            if received.error is not None:
                self._report(received.error)
            if len(self.queue) >= QUEUE_FRAMES_MAX:
                self._holding = True
                self._sign_of_life()

    def _judge(self, message: Any) -> Received:
        if isinstance(message, Garbage):
            return self.receiver.refuse(FrameMalformed("message cannot be decoded"))
        return self.receiver.receive(message)

    def _push(self, frame: StepFrame) -> None:
        self._passed(frame, self.receiver.hop_from)
        if self.queue or not self._deliver(frame):
            self.queue.append(frame)

    def _sign_of_life(self) -> None:
        if not self._holding or self.ended:
            return
        self._ack = self.receiver.acknowledgement()
        self._flush()
        self._process.after(SIGN_OF_LIFE_S, self._sign_of_life)

    def _answer(self, received: Received) -> None:
        ack, nack = received.ack, received.nack
        if ack is not None:
            self._ack = ack
            self._unanswered += len(received.frames)
        if nack is not None:
            self._nacks.append(nack)
        urgent_at = max(1, self.receiver.limits.inflight_frames_max // 4)
        if nack or (ack and ack.duplicate) or self._unanswered >= urgent_at:
            self._flush()
        elif ack is not None and not self._flush_due:
            self._flush_due = True
            self._process.after(ACK_DELAY_S, self._flush_later)

    def _flush_later(self) -> None:
        self._flush_due = False
        self._flush()

    def _flush(self) -> None:
        ack, nacks, self._ack, self._nacks = self._ack, self._nacks, None, []
        self._unanswered = 0
        if self.connection is None:
            return
        if ack is not None:
            self.connection.down.send(ack)
        for nack in nacks:
            self.connection.down.send(nack)

    def _report(self, error: MeshError) -> None:
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
                peer=self._worker,
            )
        )


class SimServicer:
    """Every hop that ends in one process."""

    def __init__(
        self,
        process: Process,
        limits: HopLimits,
        on_fault: Callable[[HopFault], None],
        watch: Watch,
    ) -> None:
        self._watch = watch
        self.counters = Counters()
        self.endpoints: dict[int, SimEndpoint] = {}
        self.fenced = 0
        self._process = process
        self._limits = limits
        self._on_fault = on_fault
        self._retired: set[int] = set()

    def expect(
        self, epoch: int, hop_from: int, hop_to: int, fingerprint: bytes, deliver: Deliver
    ) -> SimEndpoint:
        """Accept links of this hop from now on."""
        if self._has_ended(epoch):
            raise EpochFenced("epoch has ended", epoch=epoch, current=self.fenced)
        self._end(epoch, EpochNotOpen("the route is being opened again", epoch=epoch))
        receiver = HopReceiver(
            epoch=epoch,
            hop_from=hop_from,
            hop_to=hop_to,
            fingerprint=fingerprint,
            limits=self._limits,
            finite=is_finite,
            counters=self.counters,
        )
        endpoint = SimEndpoint(self._process, receiver, deliver, self._on_fault, self._passed)
        self.endpoints[epoch] = endpoint
        return endpoint

    def _passed(self, frame: StepFrame, hop_from: int) -> None:
        self._watch.delivered(frame, hop_from, fenced=self.fenced)

    def fence(self, epoch: int) -> None:
        """Refuse ``epoch`` and everything older for good."""
        self.fenced = max(self.fenced, epoch)
        for one in [one for one in self.endpoints if one <= epoch]:
            self._end(one, EpochFenced("epoch has ended", epoch=one))

    def retire(self, epoch: int) -> None:
        """Refuse only ``epoch`` for good."""
        self._end(epoch, EpochFenced("epoch has ended", epoch=epoch))
        self._retired.add(epoch)

    def exchange(self, connection: Connection, opening: Opening) -> None:
        """A predecessor dials in: served, or refused with the reason."""
        try:
            endpoint = self._endpoint_of(opening)
        except MeshError as error:
            connection.cut(error, tell="client")
            return
        endpoint.serve(opening, connection)

    def _endpoint_of(self, opening: Opening) -> SimEndpoint:
        if self._has_ended(opening.epoch):
            self.counters.count("frames_fenced")
            raise EpochFenced("epoch has ended", epoch=opening.epoch, current=self.fenced)
        endpoint = self.endpoints.get(opening.epoch)
        if endpoint is None:
            raise EpochNotOpen("no route is open at this epoch", epoch=opening.epoch)
        receiver = endpoint.receiver
        if (opening.hop_from, opening.hop_to) != (receiver.hop_from, receiver.hop_to):
            raise HopMismatch("link of another hop", expected=receiver.hop)
        if opening.fingerprint != receiver.fingerprint:
            raise FingerprintMismatch("link of another mesh or other weights")
        return endpoint

    def _has_ended(self, epoch: int) -> bool:
        return epoch <= self.fenced or epoch in self._retired

    def _end(self, epoch: int, reason: MeshError) -> None:
        endpoint = self.endpoints.pop(epoch, None)
        if endpoint is not None:
            endpoint.end(reason)
