"""A stage worker in memory: places on routes, hops, reports, commands.

Follows ``services.worker_process`` and ``worker_routes``: joining fences everything older, opens
the stage *behind what is queued for the compute thread*, expects the predecessor, dials the
successor, and only then arrives at the barrier. Frames go endpoint → compute thread
(``runner``) → link.

What a fault may do to it: kill, stop, continue (through its ``Process``), let it host other
weights, and whatever ``runner`` and its stage let be done to them: make it forget caches, slow it
down, let it tell lies.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator import instructions as do
from coordinator.events import BarrierArrived, CommandFinished, HopFaultSeen, WorkerProgressed
from coordinator.simulation.context import Context
from coordinator.simulation.endpoint import SimServicer
from coordinator.simulation.link import Opening, SimLink
from coordinator.simulation.runner import SimRunner
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
RELOAD_S = 0.5
LEAVE_S = 2.0
"""How long a worker that has drained waits for the coordinator to say so."""


@dataclass(slots=True)
class Joining:
    """A place that is being taken."""

    order: do.OpenRoute
    index: int
    timer: Timer | None = None
    done: bool = False


class SimWorker:
    """One process. A restarted worker is another object under the same name."""

    def __init__(self, context: Context, info: WorkerInfo) -> None:
        self.context = context
        self.info = info
        self.hosted = info.fingerprint
        """Fingerprint of the weights it really has."""
        self.process = Process(info.name, context.time)
        self.servicer = SimServicer(self.process, context.limits, self.report_fault, context.watch)
        self.runner = SimRunner(
            self.process, context, on_step=self._step_done, on_free=self._compute_free
        )
        self.link: SimLink | None = None
        self.epoch = 0
        self.fenced = 0
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
        # On the compute thread; then, on the loop, expect the predecessor and dial the successor.
        self.runner.open(
            self.info,
            order.route.epoch,
            joining.index,
            order.route.stage_count,
            lambda: self._expect_and_dial(joining),
        )

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

    def _expect_and_dial(self, joining: Joining) -> None:
        if joining.done:
            return
        route, index = joining.order.route, joining.index
        fingerprint = bytes.fromhex(self.wire_fingerprint())[:8]
        try:
            self.servicer.expect(route.epoch, index - 1, index, fingerprint, self.runner.submit)
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
        self.runner.fence(self.fenced)

    def _reinitialise(self, command_id: str) -> None:
        self.fence(max(self.epoch, self.fenced))
        finished = CommandFinished(self.info.name, command_id, True, info=self.info)
        self.runner.reload(RELOAD_S, lambda: self.control.send(finished))

    def _leave(self, order: do.DrainWorker, deadline: float) -> None:
        """Finish what is in flight, say so at the drain barrier, and end this process."""
        unacknowledged = self.link.sender.unacknowledged if self.link is not None else 0
        runner = self.runner
        busy = runner.queued or runner.computing_step or unacknowledged
        if busy and self.context.time.now < deadline:
            self.process.after(DRAINED_CHECK_S, lambda: self._leave(order, deadline))
            return
        self._arrived_to_leave = True
        facts = {
            "in_flight": str(unacknowledged + runner.queued + bool(runner.computing_step)),
            "kv_tokens": str(self._kv_tokens),
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

    def _step_done(self, frame: StepFrame, honest: StepFrame, told: StepFrame) -> None:
        self.context.watch.computed(self, frame, honest)
        self._send(told)

    def _compute_free(self, computed: bool) -> None:
        endpoint = self.servicer.endpoints.get(self.epoch)
        if endpoint is not None:
            endpoint.resume()
        if computed:
            self._report_soon(REPORT_S_MIN)

    @property
    def _kv_tokens(self) -> int:
        stage = self.runner.stage
        return stage.kv_tokens if stage is not None else 0

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
        self.runner.stage = None
        error = StageError("the compute thread crashed")
        self.report_fault(
            HopFault(
                self.epoch,
                self.runner.computed_step + 1,
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
        busy = bool(self.runner.queued or self.runner.computing_step)
        self._report_soon(REPORT_S_BUSY if busy else REPORT_S_IDLE)

    def progress(self) -> WorkerProgressed:
        """The compute thread's numbers as they are now."""
        runner = self.runner
        return WorkerProgressed(
            worker=self.info.name,
            instance=self.info.instance,
            epoch=self.epoch,
            accepted_step=runner.accepted_step,
            computed_step=runner.computed_step,
            acknowledged_step=self.link.sender.acked if self.link is not None else 0,
            queued=runner.queued,
            kv_tokens=self._kv_tokens,
            computing_step=runner.computing_step,
            computing_s=runner.computing_s,
        )
