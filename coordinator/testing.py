"""A whole mesh in memory, on virtual time: the machine, honest workers, and faults on request.

``MemoryMesh`` plays the shell: it performs each instruction of ``Mesh`` on ``MemoryWorker``s, and
feeds what follows back as events, in the order of virtual time. Nothing sleeps; a minute of
mesh time takes milliseconds. Every frame is sealed and verified on every hop with the real
checksums. The same calls give the same run.

Faults: ``kill``, ``stop`` and ``resume`` (a stopped process), ``restart`` (optionally with other
weights), ``forget`` (a cache lost), and ``tamper``: a function that sees each frame on each hop and
returns it, another one, or None to drop it. ``check`` runs behind every event.

``transcript`` collects one line per instruction or event that a reader of a scenario wants to see.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from coordinator import instructions as do
from coordinator.core import Mesh
from coordinator.echo import EchoStage
from coordinator.events import (
    Event,
    FrameReturned,
    GenerationRequested,
    HopFaultSeen,
    LinkOpened,
    TimePassed,
    WorkerLost,
    WorkerRegistered,
)
from coordinator.memory_worker import MemoryWorker, worker_info
from coordinator.settings import MeshPolicy
from coordinator.transcript import describe
from stagemesh.errors import MeshError
from stagemesh.frame import StepFrame, verify
from stagemesh.sampling import SamplingSpec
from stagemesh.token import TokenChunk
from stagemesh.topology import COORDINATOR_HOP, WorkerName

CONTROL_S = 0.001
HOP_S = 0.0005
REPORT_S = 0.25
RELOAD_S = 0.5
"""Virtual time of a reinitialisation."""
EVENTS_MAX = 2_000_000
"""A run that needs more is not getting anywhere."""

Tamper = Callable[[StepFrame], StepFrame | None]


@dataclass(slots=True)
class Received:
    """What one client has seen."""

    tokens: list[int] = field(default_factory=list)
    chunks: list[TokenChunk] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    ends: list[do.FinishRequest | do.FailRequest] = field(default_factory=list)
    corrections: list[do.CorrectTokens] = field(default_factory=list)
    recoveries: list[do.RecoveryRecord] = field(default_factory=list)
    """Those that a journal would keep while it runs."""
    verified_through: int = 0
    seen: list[int] = field(default_factory=list)
    """Every token ever delivered, those withdrawn later included."""

    @property
    def finish(self) -> do.FinishRequest | None:
        end = self.ends[0] if self.ends else None
        return end if isinstance(end, do.FinishRequest) else None

    @property
    def error(self) -> MeshError | None:
        end = self.ends[0] if self.ends else None
        return end.error if isinstance(end, do.FailRequest) else None

    @property
    def summary(self) -> do.RequestSummary | None:
        return self.ends[0].summary if self.ends else None


class MemoryMesh:
    """See the module."""

    def __init__(self, policy: MeshPolicy | None = None, *, layer_count: int = 6) -> None:
        self.mesh = Mesh(policy or MeshPolicy(vocab_size=997))
        self.layer_count = layer_count
        self.now = 0.0
        self.workers: dict[str, MemoryWorker] = {}
        self.clients: dict[bytes, Received] = {}
        self.published: list[do.PublishEvent] = []
        self.transcript: list[str] = []
        self.tampers: list[Tamper] = []
        self.frames_sent = 0
        self.frames_dropped = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0
        self._events = 0
        self._wake_at: float | None = None
        self._links: set[int] = set()
        self._routes: dict[int, tuple[WorkerName, ...]] = {}

    # What a test does

    def join(self, name: str, span: str, **facts: Any) -> MemoryWorker:
        """A worker process starts and registers."""
        info = worker_info(name, span, layer_count=self.layer_count, **facts)
        worker = self.workers[name] = MemoryWorker(info)
        self._feed(WorkerRegistered(info))
        self._report_regularly(worker)
        return worker

    def request(
        self,
        number: int,
        prompt: tuple[int, ...],
        max_tokens: int,
        *,
        sampling: SamplingSpec | None = None,
        **more: Any,
    ) -> Received:
        """A client asks; what it receives is collected."""
        key = number.to_bytes(16, "big")
        self.clients[key] = Received()
        sampling = sampling or SamplingSpec()
        self._feed(GenerationRequested(key, prompt, sampling, max_tokens, **more))
        return self.clients[key]

    def feed(self, event: Event) -> None:
        """Anything else that may happen."""
        self._feed(event)

    def kill(self, name: str) -> None:
        """kill -9: everything it held is gone; its control stream ends."""
        worker = self.workers[name]
        worker.alive, worker.stage = False, None
        worker.waiting.clear()
        self._tell(WorkerLost(worker.info.name, worker.info.instance, "connection reset"))

    def stop(self, name: str) -> None:
        """SIGSTOP: nothing happens in it, its connections stay."""
        self.workers[name].stopped = True

    def resume(self, name: str) -> None:
        """SIGCONT: it goes on with what has arrived meanwhile."""
        worker = self.workers[name]
        worker.stopped = False
        pending, worker.waiting = worker.waiting, []
        for action in pending:
            self._later(0.0, action)

    def restart(self, name: str, *, instance: str, **facts: Any) -> MemoryWorker:
        """A new process under the same name."""
        before = self.workers[name].info
        return self.join(name, str(before.span), instance=instance, **facts)

    def forget(self, name: str, number: int) -> None:
        """A worker loses the cache of one request."""
        stage = self.workers[name].stage
        if stage is not None:
            stage.caches.pop(number.to_bytes(16, "big"), None)

    def run(self, seconds: float) -> None:
        """Let virtual time pass."""
        self.run_until(lambda: False, seconds=seconds)

    def run_until(self, condition: Callable[[], bool], *, seconds: float = 60.0) -> bool:
        """Let things happen until ``condition`` holds; False if it did not within virtual
        ``seconds``."""
        end = self.now + seconds
        while not condition():
            if not self._heap or self._heap[0][0] > end or self._events > EVENTS_MAX:
                self.now = max(self.now, end)
                return condition()
            self.now, _, action = heapq.heappop(self._heap)
            self._events += 1
            action()
        return True

    def run_to_end(self, *, seconds: float = 300.0) -> bool:
        """Until every client has its terminal instruction."""
        return self.run_until(lambda: all(c.ends for c in self.clients.values()), seconds=seconds)

    def events(self, kind: str) -> list[do.PublishEvent]:
        """Everything published under this type."""
        return [event for event in self.published if event.type == kind]

    def open_routes(self) -> list[tuple[str, ...]]:
        """Worker names of routes that serve, oldest first."""
        views = self.mesh.snapshot(self.now).routes
        return [view.workers for view in views if view.phase == "open"]

    # The shell

    def _feed(self, event: Event) -> None:
        for instruction in self.mesh.handle(event, self.now):
            self._perform(instruction)
        self.mesh.check()

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._heap, (self.now + seconds, self._order, action))

    def _tell(self, event: Event, seconds: float = CONTROL_S) -> None:
        """What a worker says reaches the coordinator a little later."""
        self._later(seconds, lambda: self._feed(event))

    def _perform(self, instruction: do.Instruction) -> None:
        self._narrate(instruction)
        match instruction:
            case do.SendStep(frame=frame):
                self._transmit(frame.sealed())
            case do.PublishEvent():
                self.published.append(instruction)
            case do.AcceptTokens():
                self._accept(instruction)
            case do.FinishRequest() | do.FailRequest():
                self.clients[instruction.request].ends.append(instruction)
            case do.AdvanceVerified(request=request, verified_through=count):
                self.clients[request].verified_through = count
            case do.WakeAt(when=when):
                self._wake_at = when
                self._later(max(when - self.now, 0.0), lambda: self._wake(when))
            case do.OpenLink(route=route):
                self._links.add(route.epoch)
                self._tell(LinkOpened(route.epoch))
            case do.CloseLink(epoch=epoch):
                self._links.discard(epoch)
            case _:
                self._perform_rarer(instruction)

    def _perform_rarer(self, instruction: do.Instruction) -> None:
        match instruction:
            case do.OpenRoute():
                self._open_route(instruction)
            case do.CorrectTokens():
                received = self.clients[instruction.request]
                received.corrections.append(instruction)
                del received.tokens[instruction.from_index :]
                del received.chunks[instruction.from_index :]
                del received.token_times[instruction.from_index :]
            case do.RecoveryEnded(request=request, record=record):
                self.clients[request].recoveries.append(record)
            case do.FenceEpoch(workers=names, epoch=epoch):
                for name in names:
                    self._command(name, lambda w: w.fence(epoch))
            case do.DrainWorker(worker=name):
                self._command(name, lambda w: self._tell(w.leave(instruction)))
            case do.ReinitialiseWorker(worker=name, command_id=command_id):
                self._command(name, lambda w: self._tell(w.reinitialise(command_id), RELOAD_S))
            case _:
                pass

    def _wake(self, when: float) -> None:
        if self._wake_at == when:
            self._wake_at = None
            self._feed(TimePassed())

    def _accept(self, instruction: do.AcceptTokens) -> None:
        received = self.clients[instruction.request]
        received.verified_through = max(received.verified_through, instruction.verified_through)
        if instruction.first_index != len(received.tokens):
            self.transcript.append(f"  GAP at {instruction.first_index}")
        for chunk in instruction.chunks:
            received.tokens.append(chunk.token_id)
            received.seen.append(chunk.token_id)
            received.chunks.append(chunk)
            received.token_times.append(self.now)

    def _command(self, name: str, action: Callable[[MemoryWorker], None]) -> None:
        """Something for one process, which reaches only that process."""
        worker = self.workers[name]
        self._later(CONTROL_S, lambda: self._when_running(worker, lambda: action(worker)))

    def _when_running(self, worker: MemoryWorker, action: Callable[[], None]) -> None:
        if not worker.alive:
            return
        if worker.stopped:
            worker.waiting.append(action)
        else:
            action()

    def _open_route(self, order: do.OpenRoute) -> None:
        names = order.route.names
        self._routes[order.route.epoch] = names
        for index, name in enumerate(names):
            self._command(name, partial(self._join, order=order, index=index))

    def _join(self, worker: MemoryWorker, order: do.OpenRoute, index: int) -> None:
        self._tell(worker.take_place(order, index))

    # Hops

    def _transmit(self, frame: StepFrame) -> None:
        """Put a sealed frame on its hop, through whatever tampers with it."""
        self.frames_sent += 1
        tampered: StepFrame | None = frame
        for tamper in self.tampers:
            tampered = tamper(tampered) if tampered is not None else None
        if tampered is None:
            self.frames_dropped += 1
            return
        delivered = tampered
        if delivered.hop_to == COORDINATOR_HOP:
            self._later(HOP_S, lambda: self._returned(delivered))
            return
        name = self._routes[delivered.epoch][delivered.hop_to]
        worker = self.workers[name]
        self._later(
            HOP_S, lambda: self._when_running(worker, lambda: self._arrived(worker, delivered))
        )

    def _returned(self, frame: StepFrame) -> None:
        if frame.epoch in self._links and self._verified(frame, ""):
            self._feed(FrameReturned(frame))

    def _verified(self, frame: StepFrame, receiver: str) -> bool:
        try:
            verify(frame, fingerprint=frame.fingerprint)
        except MeshError as error:
            name = self._routes[frame.epoch][max(frame.hop_from, 0)]
            fault = HopFaultSeen(
                WorkerName(receiver or name),
                frame.epoch,
                frame.step,
                frame.hop_from,
                frame.hop_to,
                error.reason,
                error.message,
                fatal=True,
            )
            self._feed(fault)
            return False
        return True

    def _arrived(self, worker: MemoryWorker, frame: StepFrame) -> None:
        """A stage receives a frame: fenced, or computed when its turn comes."""
        stage = worker.stage
        if stage is None or not worker.expects(frame):
            return
        if not self._verified(frame, worker.info.name):
            return
        done = worker.accept(frame, self.now)
        self._later(
            done, lambda: self._when_running(worker, lambda: self._computed(worker, stage, frame))
        )

    def _computed(self, worker: MemoryWorker, stage: EchoStage, frame: StepFrame) -> None:
        if worker.stage is not stage:
            return
        self._transmit(worker.compute(stage, frame))
        self._tell(worker.report())

    def _report_regularly(self, worker: MemoryWorker) -> None:
        if self.workers.get(worker.info.name) is not worker or not worker.alive:
            return
        if not worker.stopped:
            self._tell(worker.report())
        self._later(REPORT_S, lambda: self._report_regularly(worker))

    # Narration

    def _narrate(self, instruction: do.Instruction) -> None:
        line = describe(instruction)
        if line:
            self.transcript.append(f"{self.now:8.3f}  {line}")


def corrupt_token(frame: StepFrame, row_index: int = 0) -> StepFrame:
    """The frame with another token id in one row, sealed again: what a lying last stage would
    send."""
    row = frame.rows[row_index]
    if row.token is None:
        return frame
    token = replace(row.token, token_id=(row.token.token_id + 1) % 997).sealed()
    rows = list(frame.rows)
    rows[row_index] = replace(row, token=token)
    return replace(frame, rows=tuple(rows)).sealed()
