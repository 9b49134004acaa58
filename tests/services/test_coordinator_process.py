"""What a coordinator as a process says of itself: events, status, health."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from coordinator.events import WorkerProgressed
from coordinator.failure_detector import DetectorPolicy
from coordinator.instructions import PublishEvent
from coordinator.settings import MeshPolicy
from coordinator.testing import corrupt_token
from services import collector, coordinator_process
from services.channel import open_channel
from services.client import MeshClient
from services.coordinator_process import CoordinatorOptions, CoordinatorProcess
from services.journal_contents import JournalLimits
from services.journal_store import JournalStore
from services.lifecycle import StopSignal
from services.request_reader import EdgeLimits
from services.server import ServerOptions
from services.telemetry import Role, TraceStore, start_telemetry
from services.tokenizer import ServedModel
from stagemesh import errors
from stagemesh.frame import StepFrame
from stagemesh.topology import COORDINATOR_HOP
from stagemesh.v1 import admin_service_pb2 as admin
from stagemesh.v1 import generation_service_pb2 as pb

LIMIT_S = 60.0
FULL = "the journal cannot be written: database or disk is full"


class Disk(JournalStore):
    """A store whose disk may be full."""

    full = False

    def write(self, writes: Any, *, wall_ns: int) -> None:
        if self.full:
            raise errors.JournalError(FULL)
        super().write(writes, wall_ns=wall_ns)


class Running:
    """A coordinator that serves, and every event that it published."""

    def __init__(self, process: CoordinatorProcess) -> None:
        self.process = process
        self.published: list[PublishEvent] = []
        publish = process.events.publish

        def published(event: PublishEvent) -> None:
            self.published.append(event)
            publish(event)

        process.events.publish = published  # type: ignore[method-assign]

    def events(self, *kinds: str) -> list[tuple[str, dict[str, str]]]:
        return [(one.type, dict(one.attributes)) for one in self.published if one.type in kinds]


@contextlib.asynccontextmanager
async def running(
    model: ServedModel, policy: MeshPolicy, journal: JournalStore | None = None
) -> AsyncIterator[tuple[Running, MeshClient]]:
    options = CoordinatorOptions(
        server=ServerOptions("127.0.0.1:0"), limits=EdgeLimits(), policy=policy, drain_s=0.0
    )
    telemetry = start_telemetry(Role("coordinator"), store=TraceStore(), environment={})
    one = Running(CoordinatorProcess(options, model, telemetry, journal=journal))
    stop = StopSignal()
    task = asyncio.create_task(one.process.run(stop))
    try:
        await until(lambda: not one.process.server.address.endswith(":0"))
        client = MeshClient(one.process.server.address)
        try:
            yield one, client
        finally:
            await client.close()
    finally:
        stop.orphaned = True
        stop.set("the test is over")
        await task


async def until(holds: Any) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not holds():
            await asyncio.sleep(0.001)


async def test_a_journal_that_fails_and_recovers_is_told_in_events_and_status(
    echo_model: ServedModel, tmp_path: Path
):
    disk = Disk.open(
        tmp_path / "journal.db", model="echo", wall_ns=time.time_ns(), limits=JournalLimits()
    )
    async with running(echo_model, MeshPolicy(route_wait_s_max=0.3), disk) as (one, client):

        async def ask() -> str:
            request = pb.GenerateRequest(text="hi", max_tokens=3)
            with pytest.raises(errors.MeshError) as caught:
                async for _ in client.generate(request):
                    pass
            return caught.value.reason

        async def state() -> str:
            response = await client.admin.GetMesh(admin.GetMeshRequest())
            return response.environment["journal_state"]

        kinds = ("JournalFailed", "JournalRecovered")
        assert (await state(), one.events(*kinds)) == ("ok", [])
        disk.full = True
        assert await ask() == "JOURNAL_ERROR"
        assert await ask() == "JOURNAL_ERROR"
        failed = ("JournalFailed", {"detail": FULL})
        assert (await state(), one.events(*kinds)) == (FULL, [failed])
        disk.full = False
        assert await ask() == "ROUTE_UNAVAILABLE"
        recovered = ("JournalRecovered", {})
        assert (await state(), one.events(*kinds)) == ("ok", [failed, recovered])


async def test_cycles_are_looked_for_when_no_request_is_there(
    echo_model: ServedModel, monkeypatch: pytest.MonkeyPatch
):
    looks = 0

    def look(generation: int = 2) -> int:
        nonlocal looks
        looks += 1
        return 0

    often = functools.partial(collector.collect_when_quiet, quiet_s=0.001)
    monkeypatch.setattr(coordinator_process, "collect_when_quiet", often)
    monkeypatch.setattr(collector, "LOOKS_BEFORE_OLDER", 0)
    monkeypatch.setattr(gc, "collect", look)
    async with running(echo_model, MeshPolicy(route_wait_s_max=60.0)) as (one, client):
        await until(lambda: looks > 3)
        answer = client.generate(pb.GenerateRequest(text="hi", max_tokens=3))
        waiting = asyncio.create_task(anext(answer))
        await until(lambda: one.process.mesh.state.sessions)
        before = looks
        await asyncio.sleep(0.05)
        assert looks == before
        waiting.cancel()
        await until(lambda: looks > before)


async def report_for_ever(ports: Any) -> None:
    """What the full worker's compute loop says of itself, also while a step hangs."""
    (info,) = ports.infos.values()
    while True:
        epoch, held = max(ports.routes, default=0), ports._held or []
        hanging = held[0].step if held else 0
        progress = WorkerProgressed(
            info.name, info.instance, epoch, ports.steps, ports.steps, ports.steps,
            len(held), 0, hanging, 0.1 if held else 0.0,
        )  # fmt: skip
        ports.driver.feed(progress)
        await asyncio.sleep(0.02)


def hang(ports: Any) -> None:
    ports.pause()


def answer_otherwise(ports: Any) -> None:
    forward = ports._forward

    def lie(frame: StepFrame) -> None:
        forward(corrupt_token(frame) if frame.hop_to == COORDINATOR_HOP else frame)

    ports._forward = lie


@pytest.mark.parametrize("fault", [hang, answer_otherwise])
async def test_an_idle_mesh_that_could_make_no_token_is_not_healthy(
    echo_model: ServedModel, echo_ports: Any, fault: Any
):
    """A full worker alone, whose reports go on: only its canary tells."""
    policy = MeshPolicy(
        canary_interval_s=0.1,
        check_interval_s=0.02,
        stall_s_min=0.2,
        detector=DetectorPolicy(token_deadline_s=0.3, stuck_ratio=2.0, stuck_floor_s=0.3),
        breaker_base_s=60.0,
        breaker_max_s=60.0,
    )
    ports = echo_ports()
    ports.infos = {"full-worker": ports.infos["full-worker"]}
    async with (
        running(echo_model, policy) as (one, _),
        open_channel(one.process.server.address) as channel,
    ):
        ports.driver = driver = one.process.driver
        driver._control, driver._links = ports, ports
        reports = asyncio.create_task(report_for_ever(ports))
        name = "stagemesh.v1.GenerationService"
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=name)
        )
        seen: list[int] = []

        async def until_it_is(status: int) -> None:
            async with asyncio.timeout(LIMIT_S):
                while not seen or seen[-1] != status:
                    seen.append((await watch.read()).status)

        ports.start()
        await until_it_is(health_pb2.HealthCheckResponse.SERVING)
        opened = ports.steps
        await until(lambda: ports.steps > opened)  # a canary, answered well
        assert not one.process.mesh.requests.why_not_ready()
        fault(ports)
        await until_it_is(health_pb2.HealthCheckResponse.NOT_SERVING)
        watch.cancel()
        reports.cancel()
