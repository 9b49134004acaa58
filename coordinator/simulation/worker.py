"""A stage worker in memory: places on routes, hops, a compute queue, reports, commands.

Follows ``services.worker_process`` and ``worker_routes``: joining fences everything older, opens
the stage *behind what is queued for the compute thread*, expects the predecessor, dials the
successor, and only then arrives at the barrier. Frames go endpoint → compute queue → link; a frame
of a fenced epoch is dropped by the compute thread. The model is ``EchoStage``.

What a fault may do to it: kill, stop, continue (through its ``Process``), make it forget caches,
slow it down, let it host other weights, and let it tell lies (``lies``: one-shot changes of a
result before it is sealed).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from coordinator import instructions as do
from coordinator.echo import EchoStage
from coordinator.events import BarrierArrived, CommandFinished, HopFaultSeen, WorkerProgressed
from coordinator.simulation.context import Context
from coordinator.simulation.endpoint import SimServicer
from coordinator.simulation.link import Opening, SimLink
from coordinator.simulation.seats import ControlStream
from coordinator.simulation.virtual import Process, Timer
from stagemesh.errors import EpochFenced, FingerprintMismatch, MeshError, StageError
from stagemesh.frame import StepFrame
from stagemesh.topology import COORDINATOR_HOP, WorkerInfo
from stagemesh.transport import HopFault

REPORT_S_MIN = 0.05
REPORT_S_BUSY = 0.25
REPORT_S_IDLE = 1.0
DRAINED_CHECK_S = 0.05
COMPUTE_FRAMES_MAX = 3
"""Frames that wait for the compute thread; small, so that backpressure happens."""
RELOAD_S = 0.5
LEAVE_S = 2.0
"""How long a worker that has drained waits for the coordinator to say so."""

Lie = Callable[[EchoStage, StepFrame], StepFrame]


@dataclass(slots=True)
class Joining:
    """A place that is being taken."""

    order: do.OpenRoute
    index: int
    timer: Timer | None = None
    done: bool = False


@dataclass(slots=True)
class Compute:
    """The compute thread: one item at a time, in order."""

    items: deque[StepFrame | Callable[[], float]] = field(default_factory=deque)
    """Frames, and actions that return how long they take."""
    frames: int = 0
    step: int = 0
    since: float = 0.0
    busy: bool = False


class SimWorker:
    """One process. A restarted worker is another object under the same name."""

    def __init__(self, context: Context, info: WorkerInfo) -> None:
        self.context = context
        self.info = info
        self.hosted = info.fingerprint
        """Fingerprint of the weights it really has."""
        self.process = Process(info.name, context.time)
        self.servicer = SimServicer(self.process, context.limits, self.report_fault, context.watch)
        self.stage: EchoStage | None = None
        self.link: SimLink | None = None
        self.epoch = 0
        self.fenced = 0
        self.accepted_step = 0
        self.computed_step = 0
        self.fenced_frames = 0
        self.slowness = 1.0
        self.lies: list[Lie] = []
        self.compute = Compute()
        self._joining: Joining | None = None
        self._arrived_to_leave = False
        self._reported_at = 0.0
        self._report_timer: Timer | None = None
        network = context.network
        network.listen(info.address, self.process, self.servicer.exchange)
        self.process.at_death.append(lambda: network.reset_all_of(self.process))
        self.control = ControlStream(
            self.process, network, context.prng.fork(), info, self._command, self._lost
        )
        self.control.dial()
        self._report_soon(0.0)

    # Commands

    def _command(self, command: object) -> None:
        match command:
            case do.OpenRoute():
                self._open_route(command)
            case do.FenceEpoch(epoch=epoch):
                self.fence(epoch)
            case do.DrainWorker(timeout_s=timeout_s):
                self._leave(command, self.context.time.now + timeout_s)
            case do.AnnounceBarrier(name="drain") if self._arrived_to_leave:
                self.process.kill()
            case do.ReinitialiseWorker(command_id=command_id):
                self._reinitialise(command_id)

    def _open_route(self, order: do.OpenRoute) -> None:
        if self._joining is not None:
            self._cancel_joining()
        joining = Joining(order, order.route.names.index(self.info.name))
        self._joining = joining
        late = "successor could not be reached in time"
        joining.timer = self.process.after(order.timeout_s, lambda: self._refuse(joining, late))
        try:
            self.check_order(order)
        except MeshError as error:
            self._refuse(joining, f"{error.reason}: {error}")
            return
        self.fence(order.route.epoch - 1)
        self.epoch = order.route.epoch
        self._call(lambda: self._open_stage(joining))

    def check_order(self, order: do.OpenRoute) -> None:
        """Raise unless this worker may take the place it is ordered to take."""
        epoch = order.route.epoch
        if epoch <= max(self.fenced, self.epoch):
            raise EpochFenced("route is not newer", epoch=epoch, current=self.epoch)
        if order.route.workers[0].fingerprint != self.hosted:
            raise FingerprintMismatch("this worker has other weights")

    def wire_fingerprint(self) -> str:
        """What its links and frames say of its weights."""
        return self.hosted

    def _open_stage(self, joining: Joining) -> float:
        """On the compute thread; then, on the loop, expect the predecessor and dial the
        successor."""
        route = joining.order.route
        if self.stage is None or route.epoch > self.stage.epoch:
            self.stage = EchoStage(self.info, route.epoch, joining.index, route.stage_count)
            self.accepted_step = self.computed_step = 0
        self.process.after(0.0, lambda: self._expect_and_dial(joining))
        return 0.0

    def _expect_and_dial(self, joining: Joining) -> None:
        if joining.done:
            return
        route, index = joining.order.route, joining.index
        fingerprint = bytes.fromhex(self.wire_fingerprint())[:8]
        try:
            self.servicer.expect(route.epoch, index - 1, index, fingerprint, self._deliver)
        except MeshError as error:
            self._refuse(joining, f"{error.reason}: {error}")
            return
        last = index == route.stage_count - 1
        context = self.context
        link = SimLink(
            self.process,
            context.network,
            context.hop_address if last else route.workers[index + 1].address,
            Opening(
                route.epoch, index, COORDINATOR_HOP if last else index + 1, fingerprint, self.name
            ),
            peer="coordinator" if last else route.names[index + 1],
            limits=context.limits,
            counters=self.servicer.counters,
            prng=context.prng.fork(),
            on_fault=self.report_fault,
            on_opened=lambda: self._joined(joining),
            on_broken=lambda error: self._refuse(joining, f"{error.reason}: {error}"),
            watch=context.watch,
        )
        self.link = link
        link.open()

    def _joined(self, joining: Joining) -> None:
        epoch = joining.order.route.epoch
        if joining.done:
            return
        if self.epoch != epoch:
            self._refuse(joining, "EPOCH_FENCED: fenced while it was being opened")
            return
        self._cancel_joining()
        info = self.info
        facts = {
            "fingerprint": self.hosted,
            "span_fingerprint": info.span_fingerprint,
            "span": str(info.span),
            "layer_count": str(info.layer_count),
            "dtype": info.dtype,
            "instance": info.instance,
        }
        self.context.watch.arrived(self, epoch)
        self._arrive(joining, facts, "")

    def _refuse(self, joining: Joining, reason: str) -> None:
        if joining.done:
            return
        if self._joining is joining:
            self._cancel_joining()
        joining.done = True
        self._arrive(joining, {}, reason)

    def _arrive(self, joining: Joining, facts: dict[str, str], refusal: str) -> None:
        order = joining.order
        self.control.send(
            BarrierArrived(
                self.info.name,
                "open-route",
                order.route.epoch,
                order.generation,
                facts,
                refusal=refusal,
            )
        )

    def _cancel_joining(self) -> None:
        joining, self._joining = self._joining, None
        if joining is not None:
            joining.done = True
            if joining.timer is not None:
                joining.timer.cancel()

    def fence(self, epoch: int) -> None:
        """Refuse ``epoch`` and everything older from now on, and free what belongs to it."""
        self.fenced = max(self.fenced, epoch)
        self.servicer.fence(self.fenced)
        if self.epoch and self.epoch <= self.fenced:
            self.epoch = 0
            link, self.link = self.link, None
            if link is not None:
                link.close()
        fenced = self.fenced
        self._call(lambda: self._fence_stage(fenced))

    def _fence_stage(self, epoch: int) -> float:
        if self.stage is not None and self.stage.epoch <= epoch:
            self.stage = None
        return 0.0

    def _reinitialise(self, command_id: str) -> None:
        self.fence(max(self.epoch, self.fenced))

        def reloaded() -> float:
            self.stage = None
            finished = CommandFinished(self.info.name, command_id, True, info=self.info)
            self.process.after(RELOAD_S, lambda: self.control.send(finished))
            return RELOAD_S

        self._call(reloaded)

    def _leave(self, order: do.DrainWorker, deadline: float) -> None:
        """Finish what is in flight, say so at the drain barrier, and end this process."""
        unacknowledged = self.link.sender.unacknowledged if self.link is not None else 0
        busy = self.compute.frames or self.compute.step or unacknowledged
        if busy and self.context.time.now < deadline:
            self.process.after(DRAINED_CHECK_S, lambda: self._leave(order, deadline))
            return
        self._arrived_to_leave = True
        facts = {
            "in_flight": str(unacknowledged + self.compute.frames + bool(self.compute.step)),
            "kv_tokens": str(self.stage.kv_tokens if self.stage is not None else 0),
        }
        self.control.send(
            BarrierArrived(self.info.name, "drain", order.epoch, order.generation, facts)
        )
        self.process.after(LEAVE_S, self.process.kill)

    def _lost(self) -> None:
        """The control stream is gone, and with it every route."""
        self._cancel_joining()
        if self.epoch:
            self.fence(self.epoch)

    # Frames

    @property
    def name(self) -> str:
        return self.info.name

    def _deliver(self, frame: StepFrame) -> bool:
        if self.compute.frames >= COMPUTE_FRAMES_MAX:
            return False
        self.compute.items.append(frame)
        self.compute.frames += 1
        self.accepted_step = frame.step
        self._turn()
        return True

    def _call(self, action: Callable[[], float]) -> None:
        self.compute.items.append(action)
        self._turn()

    def _turn(self) -> None:
        """The compute thread takes its next item, if it is free."""
        compute = self.compute
        while compute.items and not compute.busy:
            item = compute.items.popleft()
            if not isinstance(item, StepFrame):
                seconds = item()
                if seconds:
                    compute.busy = True
                    self.process.after(seconds, self._free)
                continue
            compute.frames -= 1
            compute.busy, compute.step, compute.since = True, item.step, self.context.time.now
            seconds = self.context.step_s + self.context.token_s * item.token_count
            self._compute(item, seconds * self.slowness)

    def _compute(self, frame: StepFrame, seconds: float) -> None:
        self.process.after(seconds, lambda: self._computed(frame))

    def _free(self) -> None:
        self.compute.busy = False
        self.compute.step = 0
        self._turn()
        endpoint = self.servicer.endpoints.get(self.epoch)
        if endpoint is not None:
            endpoint.resume()

    def _computed(self, frame: StepFrame) -> None:
        stage = self.stage
        if stage is None or not self.may_compute(stage, frame):
            self.fenced_frames += 1
            self._free()
            return
        result = stage.step(frame)
        self.context.watch.computed(self, frame, result)
        if self.lies and frame.kind.name in ("PREFILL", "DECODE"):
            result = self.lies.pop(0)(stage, result)
        self.computed_step = frame.step
        self._send(result)
        self._free()
        self._report_soon(REPORT_S_MIN)

    def may_compute(self, stage: EchoStage, frame: StepFrame) -> bool:
        """Whether the frame is of the route that the stage is on."""
        return stage.epoch == frame.epoch

    def _send(self, frame: StepFrame) -> None:
        if frame.epoch != self.epoch or self.link is None:
            return
        try:
            self.link.send(frame)
        except MeshError as error:
            fault = HopFault(
                frame.epoch,
                frame.step,
                frame.hop_from,
                frame.hop_to,
                error.reason,
                str(error),
                fatal=True,
                peer=self.name,
            )
            self.report_fault(fault)

    def report_fault(self, fault: HopFault) -> None:
        """To the coordinator, if there is one."""
        self.control.send(
            HopFaultSeen(
                self.info.name,
                fault.epoch,
                fault.step,
                fault.hop_from,
                fault.hop_to,
                fault.reason,
                fault.detail,
                fault.fatal,
            )
        )

    def crash(self) -> None:
        """The compute thread gives up on what it does."""
        self.stage = None
        error = StageError("the compute thread crashed")
        self.report_fault(
            HopFault(
                self.epoch,
                self.computed_step + 1,
                COORDINATOR_HOP,
                COORDINATOR_HOP,
                "COMPUTE_FAILED",
                str(error),
                fatal=True,
                peer=self.name,
            )
        )

    # Reports

    def _report_soon(self, seconds: float) -> None:
        """A report behind a finished step, at most one per ``REPORT_S_MIN``; else the regular
        one."""
        when = max(self.context.time.now + seconds, self._reported_at + REPORT_S_MIN)
        timer = self._report_timer
        if timer is not None:
            if timer.when <= when:
                return
            timer.cancel()
        self._report_timer = self.process.after(when - self.context.time.now, self._report)

    def _report(self) -> None:
        self._report_timer = None
        now = self.context.time.now
        self._reported_at = now
        self.control.send(self.progress())
        busy = bool(self.compute.frames or self.compute.step)
        self._report_soon(REPORT_S_BUSY if busy else REPORT_S_IDLE)

    def progress(self) -> WorkerProgressed:
        """The compute thread's numbers as they are now."""
        compute, now = self.compute, self.context.time.now
        return WorkerProgressed(
            worker=self.info.name,
            instance=self.info.instance,
            epoch=self.epoch,
            accepted_step=self.accepted_step,
            computed_step=self.computed_step,
            acknowledged_step=self.link.sender.acked if self.link is not None else 0,
            queued=compute.frames,
            kv_tokens=self.stage.kv_tokens if self.stage is not None else 0,
            computing_step=compute.step,
            computing_s=now - compute.since if compute.step else 0.0,
        )
