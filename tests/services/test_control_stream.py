"""The worker's side of the control stream, against the real coordinator's side."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import pytest

from coordinator import events
from coordinator.instructions import MeetWorker
from services import certs
from services.control_stream import ControlStream
from services.credentials import TlsFiles
from services.server import MeshServer, ServerOptions
from services.worker_codec import worker_to_proto
from services.worker_service import WorkerService
from stagemesh.errors import EpochFenced
from stagemesh.topology import Span, WorkerInfo, WorkerName
from stagemesh.v1 import worker_service_pb2, worker_service_pb2_grpc

LIMIT_S = 30.0
NAME = WorkerName("stage-0")
Request = worker_service_pb2.ConnectRequest


def worker(instance: str = "one") -> WorkerInfo:
    return WorkerInfo(
        name=NAME,
        address="127.0.0.1:9",
        span=Span(0, 2),
        layer_count=4,
        fingerprint="ab" * 32,
        span_fingerprint="cd" * 32,
        dtype="f32",
        instance=instance,
    )


class Coordinator:
    """The coordinator's side; ``verdicts`` decides registrations, the last one for ever."""

    def __init__(self, *verdicts: bool) -> None:
        self.events: asyncio.Queue[events.Event] = asyncio.Queue()
        self.verdicts = list(verdicts or (True,))
        self.service = WorkerService(self._feed, address=lambda: "127.0.0.1:7")

    def _feed(self, event: events.Event) -> None:
        self.events.put_nowait(event)
        if isinstance(event, events.WorkerRegistered):
            admitted = self.verdicts.pop(0) if len(self.verdicts) > 1 else self.verdicts[0]
            self.service.meet(MeetWorker(event.worker, admitted, "" if admitted else "not now"))

    async def serve(self, address: str = "127.0.0.1:0", tls: TlsFiles | None = None) -> MeshServer:
        server = MeshServer(ServerOptions(address, tls))
        server.add(worker_service_pb2_grpc.add_WorkerServiceServicer_to_server, self.service)
        await server.start()
        return server

    async def next(self, kind: type[events.Event]) -> events.Event:
        event = await self.events.get()
        assert isinstance(event, kind), event
        return event


class Worker:
    """The worker's side, and what it was told."""

    def __init__(self, address: str, instance: str = "one", tls: TlsFiles | None = None) -> None:
        self.commands: asyncio.Queue[worker_service_pb2.ConnectResponse] = asyncio.Queue()
        self.lost = 0
        self.welcomed = asyncio.Event()
        self.stream = ControlStream(
            address,
            describe=lambda: worker_to_proto(worker(instance)),
            on_command=self.commands.put_nowait,
            on_welcome=self.welcomed.set,
            on_lost=self._count,
            tls=tls,
        )

    def _count(self) -> None:
        self.lost += 1
        self.welcomed.clear()


@contextlib.asynccontextmanager
async def running(one: Worker) -> AsyncIterator[Worker]:
    task = asyncio.create_task(one.stream.run())
    try:
        async with asyncio.timeout(LIMIT_S):
            yield one
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_welcomed_worker_gets_commands_and_is_heard() -> None:
    mesh = Coordinator()
    server = await mesh.serve()
    async with running(Worker(server.address)) as one:
        await mesh.next(events.WorkerRegistered)
        await one.welcomed.wait()
        mesh.service.fence([NAME], 7)
        assert (await one.commands.get()).fence.epoch == 7
        arrival = worker_service_pb2.BarrierArrival(name="open-route", epoch=8)
        assert one.stream.send(Request(arrival=arrival))
        assert (await mesh.next(events.BarrierArrived)).epoch == 8
    await server.drain(0)


async def test_of_reports_that_wait_only_the_newest_is_sent() -> None:
    mesh = Coordinator()
    server = await mesh.serve()
    async with running(Worker(server.address)) as one:
        await mesh.next(events.WorkerRegistered)
        await one.welcomed.wait()
        for step in range(100):  # No await: nothing is sent meanwhile.
            one.stream.report(worker_service_pb2.ProgressReport(computed_step=step))
        assert (await mesh.next(events.WorkerProgressed)).computed_step == 99
        assert mesh.events.empty()
    await server.drain(0)


async def test_nothing_is_kept_for_a_coordinator_that_is_not_there() -> None:
    one = Worker("127.0.0.1:1")
    async with running(one):
        assert not one.stream.send(Request(fault=worker_service_pb2.HopFault()))
        one.stream.report(worker_service_pb2.ProgressReport())
        assert one.stream.connected is False


async def test_a_coordinator_that_restarts_is_found_again() -> None:
    mesh = Coordinator()
    server = await mesh.serve()
    async with running(Worker(server.address)) as one:
        await mesh.next(events.WorkerRegistered)
        await one.welcomed.wait()
        await server.drain(0)
        await mesh.next(events.WorkerLost)
        again = Coordinator()
        other = await again.serve(server.address)
        await again.next(events.WorkerRegistered)
        await one.welcomed.wait()
        assert one.lost == 1
        await other.drain(0)


async def test_a_worker_sees_its_renewed_certificate_while_it_waits(tmp_path, caplog) -> None:
    mesh_files, own_files = tmp_path / "mesh", tmp_path / "own"
    certs.init(mesh_files)
    certs.init(own_files)  # of another CA: nobody lets it in
    mesh = Coordinator()
    server = await mesh.serve(tls=TlsFiles.in_directory(mesh_files, "coordinator"))
    one = Worker(server.address, tls=TlsFiles.in_directory(own_files, "stage"))
    async with running(one):
        while "cannot register" not in caplog.text:
            await asyncio.sleep(0)
        for name in ("ca.pem", "stage.pem", "stage.key"):
            (mesh_files / name).rename(own_files / name)
        await mesh.next(events.WorkerRegistered)
        await one.welcomed.wait()
    await server.drain(0)


async def test_a_worker_that_is_turned_away_tries_again() -> None:
    mesh = Coordinator(False, True)
    server = await mesh.serve()
    async with running(Worker(server.address)) as one:
        await mesh.next(events.WorkerRegistered)
        await mesh.next(events.WorkerLost)
        await mesh.next(events.WorkerRegistered)
        await one.welcomed.wait()
        assert one.lost == 0
    await server.drain(0)


async def test_a_replaced_worker_gives_up_for_good() -> None:
    mesh = Coordinator()
    server = await mesh.serve()
    first = Worker(server.address)
    task = asyncio.create_task(first.stream.run())
    async with asyncio.timeout(LIMIT_S):
        await first.welcomed.wait()
        async with running(Worker(server.address, "two")) as second:
            await second.welcomed.wait()
            with pytest.raises(EpochFenced):
                await task
    await server.drain(0)


async def test_bytes_that_are_no_command_end_the_stream_and_not_the_worker() -> None:
    """Without TLS a forged packet gets this far; the worker has to come back."""
    registered = worker_service_pb2.Registered(report_interval_ms=500)
    welcome = worker_service_pb2.ConnectResponse(registered=registered).SerializeToString()
    streams = 0

    async def connect(_requests: AsyncIterator[bytes], _context: object) -> AsyncIterator[bytes]:
        nonlocal streams
        streams += 1
        if streams > 1:
            yield welcome
        yield b"\xff\xff\xff\xff"
        await asyncio.Event().wait()

    handler = grpc.stream_stream_rpc_method_handler(connect)
    methods = {"Connect": handler}
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("stagemesh.v1.WorkerService", methods),)
    )
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with running(Worker(address)) as one:
        for _ in range(2):
            await one.welcomed.wait()
            while one.welcomed.is_set():
                await asyncio.sleep(0.001)
    assert one.lost >= 2
    assert streams >= 3
    assert one.commands.empty()
    await server.stop(None)
