"""Performs what the machine decides. *Shell*: the only place where the core meets a clock and a
loop.

``feed`` hands one event to ``Mesh.handle`` and performs the instructions in order; what a port does
comes back as another event. Everything runs on one event loop, no task is created per token, and an
event that is fed while another is being performed waits its turn. What a client may see goes
through the journal first.

    for each event:                      handle → instructions
    for each instruction:                workers, links, topics at once; clients behind the journal
    WakeAt(when):                        one timer, which feeds TimePassed
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable

from coordinator import instructions as do
from coordinator.core import Mesh
from coordinator.events import (
    CancelRequested,
    Event,
    FrameReturned,
    GenerationRequested,
    TimePassed,
)
from coordinator.ports import (
    ClientInstruction,
    EventPublisher,
    Journal,
    RouteLinks,
    StepObserver,
    TokenSink,
    WorkerControl,
)
from coordinator.snapshot import MeshSnapshot
from stagemesh.errors import RequestConflict

_log = logging.getLogger(__name__)


class ImmediateJournal:
    """No durability: delivers at once."""

    def begin(self, request: GenerationRequested) -> None:
        """Nothing to keep."""

    def commit(
        self, instruction: ClientInstruction, deliver: Callable[[ClientInstruction], None]
    ) -> None:
        deliver(instruction)


class MeshDriver:
    """See the module. Use from one event loop only; ``clock`` gives monotonic seconds."""

    def __init__(
        self,
        mesh: Mesh,
        *,
        control: WorkerControl,
        links: RouteLinks,
        events: EventPublisher,
        observer: StepObserver | None = None,
        journal: Journal | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.mesh, self.clock = mesh, clock
        self._control, self._links, self._events = control, links, events
        self._observer = observer
        self._journal: Journal = journal or ImmediateJournal()
        self._sinks: dict[bytes, TokenSink] = {}
        self._waiting: deque[Event] = deque()
        self._busy = False
        self._timer: asyncio.TimerHandle | None = None
        self._sent_at: dict[tuple[int, int], float] = {}

    def submit(self, request: GenerationRequested, sink: TokenSink) -> None:
        """A new request; its results go to ``sink``. Raises RequestConflict if the id is taken."""
        if request.request in self._sinks or self.mesh.knows(request.request):
            raise RequestConflict("this request id is taken", request=request.request.hex())
        self._sinks[request.request] = sink
        self._journal.begin(request)
        self.feed(request)

    def attach(self, request: bytes, sink: TokenSink | None) -> None:
        """Send a live request's further results to another sink, or (None) to nobody."""
        if sink is not None:
            self._sinks[request] = sink
        else:
            self._sinks.pop(request, None)

    def feed(self, event: Event) -> None:
        """Something happened."""
        self._waiting.append(event)
        if self._busy:
            return
        self._busy = True
        try:
            while self._waiting:
                event, now = self._waiting.popleft(), self.clock()
                self._observe(event, now)
                for instruction in self.mesh.handle(event, now):
                    self._perform(instruction, now)
        finally:
            self._busy = False

    def snapshot(self) -> MeshSnapshot:
        """The mesh at this moment."""
        return self.mesh.snapshot(self.clock())

    def close(self) -> None:
        """Stop the timer. Events may still be fed; nothing will happen by itself."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _perform(self, instruction: do.Instruction, now: float) -> None:
        match instruction:
            case do.SendStep(frame=frame):
                if self._observer is not None:
                    self._sent_at[frame.epoch, frame.step] = now
                    self._observer.step_sent(frame, now)
                self._links.send(frame)
            case do.PublishEvent():
                self._events.publish(instruction)
            case (
                do.AcceptTokens()
                | do.AdvanceVerified()
                | do.CorrectTokens()
                | do.RecoveryEnded()
                | do.FinishRequest()
                | do.FailRequest()
            ):
                self._journal.commit(instruction, self._deliver)
            case do.WakeAt(when=when):
                self._wake_at(when)
            case do.OpenLink(route=route):
                self._links.open(route)
            case do.CloseLink(epoch=epoch):
                self._links.close(epoch)
                self._sent_at = {key: at for key, at in self._sent_at.items() if key[0] != epoch}
            case _:
                self._command(instruction)

    def _command(self, instruction: do.Instruction) -> None:
        """What goes to workers."""
        match instruction:
            case do.OpenRoute():
                self._control.open_route(instruction)
            case do.FenceEpoch(workers=workers, epoch=epoch):
                self._control.fence(workers, epoch)
            case do.AnnounceBarrier():
                self._control.announce_barrier(instruction)
            case do.MeetWorker():
                self._control.meet(instruction)
            case do.DrainWorker():
                self._control.drain(instruction)
            case do.ReinitialiseWorker(worker=worker, reason=reason, command_id=command_id):
                self._control.reinitialise(worker, reason, command_id)

    def _deliver(self, instruction: ClientInstruction) -> None:
        """To the client's sink. A sink that raises is a client that went away."""
        request = instruction.request
        ended = isinstance(instruction, do.FinishRequest | do.FailRequest)
        sink = self._sinks.pop(request, None) if ended else self._sinks.get(request)
        if sink is None:
            return
        try:
            match instruction:
                case do.AcceptTokens():
                    sink.accept(instruction)
                case do.AdvanceVerified():
                    sink.advance(instruction)
                case do.CorrectTokens():
                    sink.correct(instruction)
                case do.FinishRequest():
                    sink.finish(instruction)
                case do.FailRequest():
                    sink.fail(instruction)
        except Exception:  # noqa: BLE001 - one client must not stop the mesh; it is logged
            _log.exception(
                "the sink of a request failed; the request is cancelled",
                extra={"request": request},
            )
            self._sinks.pop(request, None)
            self.feed(CancelRequested(request, reason="sink failed"))

    def _observe(self, event: Event, now: float) -> None:
        if self._observer is not None and isinstance(event, FrameReturned):
            frame = event.frame
            sent_at = self._sent_at.pop((frame.epoch, frame.step), now)
            self._observer.step_returned(frame, now, now - sent_at)

    def _wake_at(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(when - self.clock(), 0.0), self._time_passed)

    def _time_passed(self) -> None:
        self._timer = None
        self.feed(TimePassed())
