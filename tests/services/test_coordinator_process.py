"""What a coordinator as a process says of itself: events, status, health."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.instructions import PublishEvent
from coordinator.settings import MeshPolicy
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
from stagemesh.v1 import admin_service_pb2 as admin
from stagemesh.v1 import generation_service_pb2 as pb

LIMIT_S = 20.0
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
