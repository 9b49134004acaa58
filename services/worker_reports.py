"""What a worker tells the coordinator without being asked: progress, faults, finished spans.

Progress is read from the compute thread's numbers, so that a hung forward shows as a step that has
been computing for ever. A report follows every finished step (coalesced), comes at least every
``REPORT_INTERVAL_S_BUSY`` while there is work, moving or not, and otherwise as often as the
coordinator asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

import psutil

from services import codec, telemetry
from services.control_stream import ControlStream, Request
from services.device_stage import DeviceStage
from services.worker_routes import FinishedStep, WorkerRoutes
from stage_worker.core_wait import CoreClock
from stage_worker.runner import StageRunner
from stagemesh.guards import Counters
from stagemesh.transport import HopFault
from stagemesh.v1 import worker_service_pb2

REPORT_INTERVAL_S_MIN = 0.05
"""Reports after finished steps are coalesced to one per this."""
REPORT_INTERVAL_S_BUSY = 0.25
"""At least this often while there is work; also how soon work that came to an idle worker shows."""
CORES_READ_EVERY_S = 0.2
"""How often the threads' times are read (see ``core_wait``): in every report that comes without
progress, and not in each of many a second."""


class WorkerReports:
    """See the module. Belongs to one event loop; ``run`` reports until it is cancelled."""

    def __init__(
        self,
        runner: StageRunner,
        counters: Counters,
        *,
        telemetry_of: telemetry.Telemetry | None = None,
    ) -> None:
        self._runner = runner
        self._counters = counters
        self._telemetry = telemetry_of
        self._loop = asyncio.get_running_loop()
        self._wanted = asyncio.Event()
        self._memory = psutil.Process()
        self._cores = CoreClock()
        self._core_times = self._cores.read()
        self._cores_read_at = time.monotonic()
        self._starved_s = 0.0
        """How long this process was held up for want of a core, as of the last look."""
        self._routes: WorkerRoutes | None = None
        self._control: ControlStream | None = None

    def attach(self, routes: WorkerRoutes, control: ControlStream) -> None:
        """What there is to report about, and where to."""
        self._routes, self._control = routes, control

    # -- progress -------------------------------------------------------------------------------

    async def run(self) -> None:
        """Report for ever."""
        reported = 0.0
        while True:
            if self._is_busy() or self._wanted.is_set() or self._loop.time() >= reported:
                self._wanted.clear()
                if self._control is not None:
                    self._control.report(self.progress())
                    reported = self._loop.time() + self._control.report_interval_s
                await asyncio.sleep(REPORT_INTERVAL_S_MIN)
            try:
                async with asyncio.timeout(REPORT_INTERVAL_S_BUSY - REPORT_INTERVAL_S_MIN):
                    await self._wanted.wait()
            except TimeoutError:
                continue

    def _is_busy(self) -> bool:
        return bool(self._runner.queued or self._runner.computing_step)

    def progress(self) -> worker_service_pb2.ProgressReport:
        """The compute thread's numbers as they are now."""
        self._look_at_cores()
        runner, since = self._runner, self._runner.computing_since
        report = worker_service_pb2.ProgressReport(
            accepted_step=runner.accepted_step,
            computed_step=runner.computed_step,
            queued=runner.queued,
            computing_step=runner.computing_step,
            computing_ms=0 if since is None else int((time.monotonic() - since) * 1000),
            compute_us=int(runner.busy_seconds * 1e6),
            rss_bytes=self._resident_bytes(),
            counters=dict(self._counters),
            starved_us=int(self._starved_s * 1e6),
        )
        if self._routes is not None:
            held = self._routes.held
            report.epoch = self._routes.epoch
            report.acknowledged_step = self._routes.acknowledged_step
            report.kv_tokens = held.kv_tokens
            report.requests = held.requests
            for name, count in held.counters.items():
                report.counters[name] += count
        return report

    def _resident_bytes(self) -> int:
        """Of this process and of those that a divided stage computes in."""
        total, stage = self._memory.memory_info().rss, self._runner.stage
        for pid in stage.pids if isinstance(stage, DeviceStage) else ():
            with contextlib.suppress(psutil.Error):  # it has just ended
                total += psutil.Process(pid).memory_info().rss
        return total

    def _look_at_cores(self) -> None:
        """Now and then: add to what this process lacked, and tell who chooses the threads of a
        step."""
        now = time.monotonic()
        elapsed_s = now - self._cores_read_at
        if elapsed_s < CORES_READ_EVERY_S:
            return
        times = self._cores.read()
        added = times.since(self._core_times)
        self._core_times, self._cores_read_at = times, now
        self._starved_s += added.starved_s(elapsed_s)
        if self._runner.cores is not None:
            self._runner.cores.notice(added, elapsed_s, now)

    # -- what happens ---------------------------------------------------------------------------

    def step_done(self, step: FinishedStep) -> None:
        """A step has left this stage."""
        self._wanted.set()
        if self._telemetry is not None and self._routes is not None:
            self._telemetry.stage.observe(
                step.frame,
                telemetry.StepTiming(
                    finished=step.finished,
                    compute_s=step.compute_s,
                    queue_s=step.queue_s,
                    transfer_s=self._routes.acknowledge_s,
                    bytes_in=step.bytes_in,
                    bytes_out=step.frame.byte_count,
                ),
            )

    def fault_seen(self, fault: HopFault) -> None:
        """One end of a hop in this process saw a fault."""
        if self._control is not None:
            self._control.send(Request(fault=codec.fault_to_pb(fault)))

    def welcomed(self) -> None:
        """The control stream is up: finished spans may go."""
        if self._telemetry is not None:
            self._telemetry.forward_to(self._forward)

    def lost(self) -> None:
        """The control stream is down: finished spans wait."""
        if self._telemetry is not None:
            self._telemetry.forward_to(None)

    def fenced(self, epoch: int) -> None:
        """An epoch and everything older has ended here."""
        if self._telemetry is not None:
            self._telemetry.stage.fenced(epoch)

    def _forward(self, traces: bytes, dropped: int) -> bool:
        """On an exporter's thread: hand finished spans to the control stream."""
        control = self._control
        if control is None or not control.connected:
            return False
        batch = worker_service_pb2.TelemetryBatch(traces=traces, dropped=dropped)
        try:
            self._loop.call_soon_threadsafe(control.send, Request(telemetry=batch))
        except RuntimeError:  # The loop is closed: the process is ending.
            return False
        return True
