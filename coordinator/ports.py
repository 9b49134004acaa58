"""What the driver needs from the outside, as protocols. ``services/`` implements them over gRPC,
the simulator in memory. All methods return at once (they enqueue); results come back as events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from coordinator.events import GenerationRequested
from coordinator.instructions import (
    AcceptTokens,
    AdvanceVerified,
    AnnounceBarrier,
    CorrectTokens,
    DrainWorker,
    FailRequest,
    FinishRequest,
    MeetWorker,
    OpenRoute,
    PublishEvent,
    RecoveryEnded,
)
from stagemesh.frame import StepFrame
from stagemesh.topology import Route, WorkerName

ClientInstruction = (
    AcceptTokens | AdvanceVerified | CorrectTokens | RecoveryEnded | FinishRequest | FailRequest
)
"""Everything a client may come to see of its request, now or with its end."""


class WorkerControl(Protocol):
    """Commands to workers over the stream they dialled."""

    def open_route(self, instruction: OpenRoute) -> None: ...
    def fence(self, workers: Sequence[WorkerName], epoch: int) -> None: ...
    def drain(self, order: DrainWorker) -> None: ...
    def reinitialise(self, worker: WorkerName, reason: str, command_id: str) -> None: ...
    def announce_barrier(self, outcome: AnnounceBarrier) -> None: ...
    def meet(self, verdict: MeetWorker) -> None: ...


class RouteLinks(Protocol):
    """The coordinator's own hops: predecessor of stage 0, successor of the last stage."""

    def open(self, route: Route) -> None:
        """Dial stage 0; LinkOpened or LinkBroken follows."""

    def send(self, frame: StepFrame) -> None:
        """Seal, ledger and transmit; the link retransmits by itself."""

    def close(self, epoch: int) -> None: ...


class TokenSink(Protocol):
    """Where one request's results go."""

    def accept(self, instruction: AcceptTokens) -> None: ...
    def advance(self, instruction: AdvanceVerified) -> None: ...
    def correct(self, instruction: CorrectTokens) -> None: ...
    def finish(self, instruction: FinishRequest) -> None: ...
    def fail(self, instruction: FailRequest) -> None: ...


class Journal(Protocol):
    """Where accepted tokens are made durable before a client sees them.

    ``deliver`` is called exactly once per instruction, in the order of the calls, when everything
    up to and including that instruction is durable: at once, or later from the event loop (group
    commit). A journal that cannot write fails the requests concerned itself; it never delivers what
    it did not keep.
    """

    def begin(self, request: GenerationRequested) -> None:
        """A request was submitted: its prompt and parameters come before any of its tokens."""

    def commit(
        self, instruction: ClientInstruction, deliver: Callable[[ClientInstruction], None]
    ) -> None: ...


class EventPublisher(Protocol):
    """Where facts go."""

    def publish(self, event: PublishEvent) -> None: ...


class StepObserver(Protocol):
    """Told about every step and request, for telemetry. Must not block or raise."""

    def step_sent(self, frame: StepFrame, now: float) -> None: ...
    def step_returned(self, frame: StepFrame, now: float, seconds: float) -> None: ...
