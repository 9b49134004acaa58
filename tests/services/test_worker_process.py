"""A worker in this process, with a tiny model, under the orders of a coordinator's real stream."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from coordinator import events
from coordinator.instructions import DrainWorker, MeetWorker, OpenRoute
from services import health
from services.device_stage import DeviceOptions
from services.lifecycle import StopSignal
from services.route_links import RouteLinks
from services.server import MeshServer, ServerOptions
from services.stage_service import StageServicer, add_stage_servicer
from services.worker_options import WorkerOptions
from services.worker_process import WorkerProcess
from services.worker_service import WorkerService
from stage_worker import machine
from stage_worker.loading import DTypePolicy
from stage_worker.row_forward import RowForward
from stage_worker.stage import Stage
from stage_worker.tiny_models import write_tiny_model
from stagemesh import errors
from stagemesh.frame import FrameKind, RowStatus, StepFrame, StepRow
from stagemesh.topology import Epoch, Route, Span, WorkerInfo, WorkerName
from stagemesh.v1 import worker_service_pb2_grpc

LIMIT_S = 60.0
DRAIN_S = 5.0
PROBE = StepRow(request=b"p" * 16, first_position=0, token_ids=(1, 2, 3), samples=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_tiny_model(directory, "llama", layers=4)
    return directory


class Coordinator:
    """Its streams and hops, and the events that would reach the core."""

    def __init__(self) -> None:
        self.events: list[events.Event] = []
        self._changed = asyncio.Event()
        self.server = MeshServer(ServerOptions("127.0.0.1:0"))
        servicer = StageServicer()
        self.links = RouteLinks(self.feed, servicer)
        self.workers = WorkerService(
            self.feed, address=lambda: self.server.address, on_route=self.links.expect
        )
        self.server.add(worker_service_pb2_grpc.add_WorkerServiceServicer_to_server, self.workers)
        self.server.add(add_stage_servicer, servicer)

    def feed(self, event: events.Event) -> None:
        self.events.append(event)
        self._changed.set()
        if isinstance(event, events.WorkerRegistered):
            self.workers.meet(MeetWorker(event.worker, admitted=True))

    async def wait_for(self, kind: type, fits: Callable[[Any], bool] = lambda event: True) -> Any:
        """The first such event, taken out."""
        while True:
            for event in self.events:
                if isinstance(event, kind) and fits(event):
                    self.events.remove(event)
                    return event
            self._changed.clear()
            await self._changed.wait()

    def open_route(self, epoch: int, *workers: WorkerInfo, timeout_s: float = 20.0) -> Route:
        route = Route(Epoch(epoch), workers)
        self.workers.open_route(OpenRoute(route, generation=1, timeout_s=timeout_s))
        return route

    async def standing(self, epoch: int, worker: WorkerInfo) -> Route:
        """A route of one worker, joined and linked."""
        route = self.open_route(epoch, worker)
        arrived = await self.wait_for(events.BarrierArrived, lambda event: event.epoch == epoch)
        assert arrived.refusal == ""
        self.links.open(route)
        await self.wait_for(events.LinkOpened)
        return route

    def probe(self, route: Route, step: int = 1) -> None:
        frame = StepFrame(FrameKind.PROBE, route.fingerprint8, route.epoch, step, -1, 0, (PROBE,))
        self.links.send(frame)


@contextlib.asynccontextmanager
async def mesh_of(
    model: Path,
    span: Span | None = None,
    devices: DeviceOptions | None = None,
    warms_up: bool | None = None,
) -> AsyncIterator[tuple[Coordinator, WorkerProcess, WorkerInfo]]:
    """A coordinator, and one worker that has registered with it."""
    coordinator = Coordinator()
    await coordinator.server.start()
    options = WorkerOptions(
        name="worker",
        model=model,
        span=span,
        coordinator=coordinator.server.address,
        server=ServerOptions("127.0.0.1:0"),
        dtype=DTypePolicy.F32,
        drain_s=DRAIN_S,
        devices=devices,
        warms_up=warms_up,
    )
    stop = StopSignal()
    worker = WorkerProcess(options, stop)
    task = asyncio.create_task(worker.run())
    try:
        async with asyncio.timeout(LIMIT_S):
            registered = await coordinator.wait_for(events.WorkerRegistered)
            yield coordinator, worker, registered.worker
    finally:
        stop.orphaned = True  # Nobody waits for a drain.
        stop.set("test is over")
        await asyncio.gather(task, return_exceptions=True)
        await coordinator.links.close_all()
        await coordinator.server.drain(0)


async def test_a_worker_says_what_it_hosts_and_serves_only_then(model: Path) -> None:
    async with mesh_of(model, Span(0, 2)) as (_, worker, info):
        assert (info.span, info.layer_count, info.dtype) == (Span(0, 2), 4, "f32")
        assert info.address == worker.server.address
        assert worker.server.health.state("stagemesh.v1.StageService") == health.SERVING


async def test_a_worker_told_to_warm_up_has_computed_every_kind_of_step_when_it_registers(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with mesh_of(model, Span(2, 4), warms_up=True) as (_, worker, _):
        order = [r.message for r in caplog.records if r.message.startswith(("warmed", "loaded"))]
        assert [message.split()[0] for message in order] == ["warmed", "loaded"]
        stage = worker.runner.stage
        assert isinstance(stage, Stage)
        assert (stage.kv_tokens, stage.requests, stage.stage_counters["steps"]) == (0, 0, 0)
        assert stage.epoch == 0  # not even the first epoch is used up


async def test_a_worker_that_cannot_warm_up_never_registers(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_kernel(*args: Any) -> None:
        raise RuntimeError("cannot compile kernel")

    monkeypatch.setattr(RowForward, "_forward_one", no_kernel)
    options = WorkerOptions("worker", model, None, "127.0.0.1:1", ServerOptions("127.0.0.1:0"))
    async with mesh_of(model):
        pass  # on a CPU nobody asks for it
    with pytest.raises(errors.ComputeFailed, match="cannot compile kernel"):
        async with asyncio.timeout(LIMIT_S):
            await WorkerProcess(replace(options, warms_up=True), StopSignal()).run()


async def test_a_worker_whose_coordinator_dies_while_it_is_to_be_drained_does_not_wait_for_it(
    model: Path,
) -> None:
    async with mesh_of(model) as (coordinator, worker, _):
        while not worker.control.connected:  # it is registered, and has yet to hear so
            await asyncio.sleep(0.001)
        worker._stop.set("SIGTERM")
        await coordinator.wait_for(events.DrainRequested)
        assert not worker._leaving.is_set()
        await coordinator.server.drain(0)
        async with asyncio.timeout(DRAIN_S / 2):
            await worker._leaving.wait()


async def test_a_joined_route_carries_a_step_there_and_back(model: Path) -> None:
    async with mesh_of(model) as (coordinator, worker, info):
        route = await coordinator.standing(5, info)
        coordinator.probe(route)
        row = (await coordinator.wait_for(events.FrameReturned)).frame.rows[0]
        assert row.status is RowStatus.OK
        assert row.token is not None
        moved = await coordinator.wait_for(
            events.WorkerProgressed, lambda event: event.computed_step == 1
        )
        assert (moved.epoch, moved.accepted_step, moved.instance) == (5, 1, info.instance)
        assert worker.routes.epoch == 5


async def test_a_fenced_epoch_is_not_joined_again(model: Path) -> None:
    async with mesh_of(model) as (coordinator, worker, info):
        await coordinator.standing(5, info)
        coordinator.workers.fence([info.name], 5)
        coordinator.open_route(5, info)
        arrived = await coordinator.wait_for(events.BarrierArrived)
        assert arrived.refusal.startswith("EPOCH_FENCED")
        assert worker.routes.epoch == 0
        await coordinator.standing(6, info)


async def test_an_order_for_other_weights_or_another_place_is_refused(model: Path) -> None:
    async with mesh_of(model, Span(0, 2)) as (coordinator, _, info):
        coordinator.open_route(5, replace(info, fingerprint="ab" * 32))
        arrived = await coordinator.wait_for(events.BarrierArrived)
        assert arrived.refusal.startswith("FINGERPRINT_MISMATCH")
        coordinator.open_route(6, info)  # Half of the layers cannot be a route of its own.
        arrived = await coordinator.wait_for(events.BarrierArrived)
        assert arrived.refusal.startswith("ROUTE_REFUSED")


async def test_a_successor_that_is_not_there_is_named_in_the_refusal(model: Path) -> None:
    async with mesh_of(model, Span(0, 2)) as (coordinator, _, info):
        absent = replace(info, name=WorkerName("absent"), address="127.0.0.1:1", span=Span(2, 4))
        coordinator.open_route(5, info, absent, timeout_s=0.5)
        arrived = await coordinator.wait_for(events.BarrierArrived)
        assert "absent" in arrived.refusal


async def test_a_step_that_raises_is_reported_and_the_stage_reloads_by_itself(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, armed = Stage.step, [True]

    def fail_once(stage: Stage, frame: StepFrame) -> StepFrame:
        if armed.pop() if armed else False:
            raise RuntimeError("the device fell off")
        return real(stage, frame)

    async with mesh_of(model) as (coordinator, _, info):
        route = await coordinator.standing(5, info)
        monkeypatch.setattr(Stage, "step", fail_once)
        coordinator.probe(route)
        fault = await coordinator.wait_for(events.HopFaultSeen, lambda event: event.fatal)
        assert (fault.worker, fault.reason, fault.epoch) == (info.name, "COMPUTE_FAILED", 5)
        coordinator.workers.fence([info.name], 5)
        coordinator.links.close(5)
        await coordinator.standing(6, info)  # The order waits for the reload.


async def test_a_device_that_dies_ends_the_group_and_the_worker_starts_another(model: Path) -> None:
    devices = DeviceOptions(2, collective_s_max=5.0, threads=1)
    async with mesh_of(model, devices=devices) as (coordinator, worker, info):
        before = worker.runner.stage.group.pids
        route = await coordinator.standing(5, info)
        os.kill(before[1], signal.SIGKILL)
        coordinator.probe(route)
        fault = await coordinator.wait_for(events.HopFaultSeen, lambda event: event.fatal)
        assert (fault.worker, fault.reason) == (info.name, "COMPUTE_FAILED")
        assert "member 1: ended with status -9" in fault.detail
        assert worker.servicer.counters["device_groups_broken"] == 1
        coordinator.workers.fence([info.name], 5)
        coordinator.links.close(5)
        route = await coordinator.standing(6, info)
        coordinator.probe(route)
        await coordinator.wait_for(events.FrameReturned)
        after = worker.runner.stage.group.pids
        assert len(after) == 2
        assert not any(psutil.pid_exists(pid) for pid in before)
    assert not any(psutil.pid_exists(pid) for pid in after)


async def test_a_divided_worker_promises_what_fits_and_counts_its_devices_memory(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda: 5_000_000)
    devices = DeviceOptions(2, collective_s_max=5.0, threads=1)
    async with mesh_of(model, devices=devices) as (_, worker, info):
        each = worker.runner.stage.model.kv_bytes_per_position
        assert info.kv_budget_tokens == machine.kv_tokens_that_fit(each, 5_000_000) < 65_536
        members = sum(psutil.Process(pid).memory_info().rss for pid in worker.runner.stage.pids)
        assert worker.reports.progress().rss_bytes > members > 0


async def test_a_reinitialised_worker_describes_itself_again(model: Path) -> None:
    async with mesh_of(model) as (coordinator, worker, info):
        await coordinator.standing(5, info)
        coordinator.workers.reinitialise(info.name, "corrupt frames", "c1")
        done = await coordinator.wait_for(events.CommandFinished)
        assert (done.command_id, done.ok, done.info) == ("c1", True, info)
        assert worker.routes.epoch == 0
        assert worker.server.health.state("") == health.SERVING
        await coordinator.standing(6, info)


def damage(directory: Path) -> None:
    """One bit of one weight."""
    for file in directory.glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-100] ^= 0x01
        file.write_bytes(content)


async def test_a_worker_whose_weights_have_changed_on_disk_stays_out_of_service(
    tmp_path: Path,
) -> None:
    write_tiny_model(tmp_path, "llama", layers=4)
    async with mesh_of(tmp_path) as (coordinator, worker, info):
        damage(tmp_path)
        coordinator.workers.reinitialise(info.name, "corrupt frames", "c1")
        done = await coordinator.wait_for(events.CommandFinished)
        assert (done.ok, worker.server.health.state("")) == (False, health.NOT_SERVING)
        assert "MODEL" in done.detail
        coordinator.open_route(6, info)
        assert (await coordinator.wait_for(events.BarrierArrived)).refusal


async def test_a_drained_worker_ends_and_a_lost_coordinator_fences_its_route(model: Path) -> None:
    async with mesh_of(model) as (coordinator, worker, info):
        await coordinator.standing(5, info)
        coordinator.workers.drain(DrainWorker(info.name, 5.0))
        await coordinator.wait_for(events.WorkerLost)
        assert worker.routes.epoch == 0


async def test_a_name_that_is_no_name_is_refused_at_once(model: Path) -> None:
    options = WorkerOptions("coordinator", model, None, "127.0.0.1:1", ServerOptions("127.0.0.1:0"))
    with pytest.raises(errors.MeshError, match="worker name"):
        WorkerProcess(options, StopSignal())


async def test_a_worker_promises_no_more_cache_than_its_machine_has_memory_for(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []

    def little(bytes_per_token: int) -> int:
        asked.append(bytes_per_token)
        return 321

    monkeypatch.setattr("services.span_host.machine.kv_tokens_that_fit", little)
    async with asyncio.timeout(LIMIT_S), mesh_of(model) as (_, worker, info):
        assert info.kv_budget_tokens == 321
        stage = worker.runner.stage
        assert isinstance(stage, Stage)
        assert stage._held.sessions.kv_budget_tokens == 321
    assert len(asked) == 1
    assert asked[0] > 0
    assert "memory for 321 cached positions of the 65536 allowed" in caplog.text
