"""The coordinator's side of the control stream: who may register, who replaces whom, what is passed
on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc
import pytest

from coordinator import events
from coordinator.instructions import AnnounceBarrier, DrainWorker, MeetWorker, OpenRoute
from services import certs
from services.channel import open_channel
from services.credentials import TlsFiles
from services.rpc_errors import to_mesh_error
from services.server import MeshServer, ServerOptions
from services.worker_codec import worker_to_proto
from services.worker_service import COMMANDS_QUEUED_MAX, WorkerService
from stagemesh import errors
from stagemesh.topology import Epoch, Route, Span, WorkerInfo, WorkerName
from stagemesh.v1 import topology_pb2, worker_service_pb2, worker_service_pb2_grpc

LIMIT_S = 20.0
Request = worker_service_pb2.ConnectRequest


def worker(name: str = "stage-0", *, instance: str = "one", span: str = "0-2") -> WorkerInfo:
    return WorkerInfo(
        name=WorkerName(name),
        address="127.0.0.1:9",
        span=Span.parse(span),
        layer_count=4,
        fingerprint="ab" * 32,
        span_fingerprint="cd" * 32,
        dtype="f32",
        instance=instance,
        kv_budget_tokens=100,
        capabilities=frozenset({"batch"}),
    )


class Coordinator:
    """A server with a WorkerService, and the events that reach the core."""

    def __init__(self, service: WorkerService, server: MeshServer) -> None:
        self.service, self.server = service, server
        self.events: asyncio.Queue[events.Event] = asyncio.Queue()
        self.telemetry: list[tuple[str, int]] = []

    async def next(self, kind: type[events.Event]) -> events.Event:
        event = await self.events.get()
        assert isinstance(event, kind), event
        return event


@contextlib.asynccontextmanager
async def coordinator(tls: TlsFiles | None = None) -> AsyncIterator[Coordinator]:
    server = MeshServer(ServerOptions("127.0.0.1:0", tls=tls))
    service = WorkerService(
        lambda event: mesh.events.put_nowait(event),
        address=lambda: "127.0.0.1:7",
        on_telemetry=lambda name, batch: mesh.telemetry.append((name, batch.dropped)),
    )
    mesh = Coordinator(service, server)
    server.add(worker_service_pb2_grpc.add_WorkerServiceServicer_to_server, service)
    await server.start()
    try:
        yield mesh
    finally:
        await server.drain(0)


def run(scenario: Callable[[Coordinator, grpc.aio.Channel], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with (
            asyncio.timeout(LIMIT_S),
            coordinator() as mesh,
            open_channel(mesh.server.address) as channel,
        ):
            await scenario(mesh, channel)

    asyncio.run(bounded())


async def connect(
    channel: grpc.aio.Channel, info: WorkerInfo | topology_pb2.Worker
) -> grpc.aio.StreamStreamCall:
    call = worker_service_pb2_grpc.WorkerServiceStub(channel).Connect()
    proto = worker_to_proto(info, {"blas": "none"}) if isinstance(info, WorkerInfo) else info
    with contextlib.suppress(grpc.RpcError):  # A refusal may come first; reading shows it.
        await call.write(Request(register=proto))
    return call


async def refusal(call: grpc.aio.StreamStreamCall) -> errors.MeshError:
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.RpcError as refused:
        return to_mesh_error(refused)
    raise AssertionError("the stream ended without a refusal")


def test_a_registration_reaches_the_core_and_its_welcome_reaches_the_worker() -> None:
    async def scenario(mesh: Coordinator, channel: grpc.aio.Channel) -> None:
        call = await connect(channel, worker())
        assert await mesh.next(events.WorkerRegistered) == events.WorkerRegistered(worker())
        mesh.service.fence([], 41)
        mesh.service.meet(MeetWorker(worker(), admitted=True))
        assert (await call.read()).registered.epoch == 41
        described = mesh.service.descriptions()[WorkerName("stage-0")]
        assert described.environment == {"blas": "none"}
        assert mesh.service.proto_of(worker()).environment["blas"] == "none"

    run(scenario)


def test_a_worker_that_is_turned_away_learns_why() -> None:
    async def scenario(mesh: Coordinator, channel: grpc.aio.Channel) -> None:
        call = await connect(channel, worker())
        await mesh.next(events.WorkerRegistered)
        mesh.service.meet(MeetWorker(worker(), admitted=False, reason="other weights"))
        error = await refusal(call)
        assert isinstance(error, errors.RouteRefused)
        assert error.message == "other weights"

    run(scenario)


def test_everything_a_worker_says_becomes_an_event() -> None:
    async def scenario(mesh: Coordinator, channel: grpc.aio.Channel) -> None:
        call = await connect(channel, worker())
        await mesh.next(events.WorkerRegistered)
        report = worker_service_pb2.ProgressReport(
            epoch=3,
            accepted_step=9,
            computed_step=8,
            computing_ms=1500,
            starved_us=2_500_000,
            counters={"frames": 9},
        )
        await call.write(Request(progress=report))
        progressed = await mesh.next(events.WorkerProgressed)
        assert (progressed.computing_s, progressed.starved_s) == (1.5, 2.5)
        assert progressed.counters == {"frames": 9}
        assert mesh.service.descriptions()[WorkerName("stage-0")].report == report
        arrival = worker_service_pb2.BarrierArrival(
            name="open-route", epoch=3, generation=1, facts={"span": "0-2"}, refusal="no memory"
        )
        await call.write(Request(arrival=arrival))
        arrived = await mesh.next(events.BarrierArrived)
        assert (arrived.facts, arrived.refusal) == ({"span": "0-2"}, "no memory")
        fault = worker_service_pb2.HopFault(
            epoch=3, step=4, hop_from_plus_one=0, hop_to_plus_one=1, reason="CHECKSUM_MISMATCH"
        )
        await call.write(Request(fault=fault))
        seen = await mesh.next(events.HopFaultSeen)
        assert (seen.hop_from, seen.hop_to, seen.reason) == (-1, 0, "CHECKSUM_MISMATCH")
        result = worker_service_pb2.CommandResult(
            command_id="c1", ok=True, worker=worker_to_proto(worker())
        )
        await call.write(Request(result=result))
        assert (await mesh.next(events.CommandFinished)).info == worker()
        await call.write(Request(leave=worker_service_pb2.Leave(timeout_ms=1500)))
        assert await mesh.next(events.DrainRequested) == events.DrainRequested("stage-0", 1.5)
        batch = worker_service_pb2.TelemetryBatch(traces=b"t", dropped=2)
        await call.write(Request(telemetry=batch))
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert mesh.telemetry == [("stage-0", 2)]

    run(scenario)


def test_every_worker_of_a_route_is_told_its_own_place_and_successor() -> None:
    async def scenario(mesh: Coordinator, channel: grpc.aio.Channel) -> None:
        first, last = worker(), worker("stage-1", instance="two", span="2-4")
        calls = [await connect(channel, first), await connect(channel, last)]
        for _ in calls:
            await mesh.next(events.WorkerRegistered)
        route = Route(Epoch(5), (first, last))
        mesh.service.open_route(OpenRoute(route, generation=2, timeout_s=1.5))
        orders = [(await call.read()).open_route for call in calls]
        assert [order.stage_index for order in orders] == [0, 1]
        assert [order.successor_name for order in orders] == ["stage-1", "coordinator"]
        assert [order.successor_address for order in orders] == ["127.0.0.1:9", "127.0.0.1:7"]
        assert [(o.epoch, o.generation, o.timeout_ms) for o in orders] == [(5, 2, 1500)] * 2

    run(scenario)


def test_every_command_reaches_the_worker_it_is_for() -> None:
    async def scenario(mesh: Coordinator, channel: grpc.aio.Channel) -> None:
        call = await connect(channel, worker())
        await mesh.next(events.WorkerRegistered)
        name = WorkerName("stage-0")
        mesh.service.fence([name, WorkerName("absent")], 7)
        mesh.service.drain(DrainWorker(name, 2.0))
        mesh.service.reinitialise(name, "corrupt", "c9")
        outcome = AnnounceBarrier("open-route", 7, 1, (name,), complete=False, absent=(name,))
        mesh.service.announce_barrier(outcome)
        got = [await call.read() for _ in range(4)]
        assert got[0].fence.epoch == 7
        assert got[1].drain.timeout_ms == 2000
        assert got[2].reinitialise.command_id == "c9"
        assert list(got[3].barrier.absent) == ["stage-0"]

    run(scenario)


def test_a_worker_that_goes_away_is_reported_lost_once() -> None:
    async def scenario(mesh: Coordinator, channel: grpc.aio.Channel) -> None:
        call = await connect(channel, worker())
        await mesh.next(events.WorkerRegistered)
        call.cancel()
        lost = await mesh.next(events.WorkerLost)
        assert (lost.worker, lost.instance) == ("stage-0", "one")
        assert mesh.service.descriptions() == {}
        assert mesh.events.empty()

    run(scenario)


class Plaintext:
    """What ``Connect`` asks of its context."""

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}


@pytest.mark.parametrize("turns", range(8))
async def test_a_call_that_is_cancelled_while_it_ends_is_reported_lost_too(turns: int) -> None:
    """gRPC ends the requests of a call that its client has cancelled, and then cancels the call,
    some turns of the loop later: in the middle of whatever the end awaits."""
    heard: list[events.Event] = []
    service = WorkerService(heard.append, address=lambda: "127.0.0.1:7")
    hung_up = asyncio.Event()

    async def requests() -> AsyncIterator[Request]:
        yield Request(register=worker_to_proto(worker(), {}))
        await hung_up.wait()

    async def handle() -> None:
        async for _ in service.Connect(requests(), Plaintext()):  # type: ignore[arg-type]
            pass

    call = asyncio.create_task(handle())
    async with asyncio.timeout(LIMIT_S):
        while not heard:
            await asyncio.sleep(0)
        hung_up.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        while not isinstance(heard[-1], events.WorkerLost):
            await asyncio.sleep(0.01)
    assert [type(event) for event in heard] == [events.WorkerRegistered, events.WorkerLost]


def test_another_instance_replaces_the_first_which_is_never_let_in_again() -> None:
    async def scenario(mesh: Coordinator, channel: grpc.aio.Channel) -> None:
        stopped = await connect(channel, worker(instance="one"))
        await mesh.next(events.WorkerRegistered)
        successor = await connect(channel, worker(instance="two"))
        assert isinstance(await refusal(stopped), errors.EpochFenced)
        registered = await mesh.next(events.WorkerRegistered)
        assert registered.worker.instance == "two"
        continued = await connect(channel, worker(instance="one"))
        assert isinstance(await refusal(continued), errors.EpochFenced)
        mesh.service.meet(MeetWorker(worker(instance="two"), admitted=True))
        assert (await successor.read()).HasField("registered")
        assert mesh.events.empty()

    run(scenario)


def test_the_same_instance_may_take_its_own_seat_again() -> None:
    async def scenario(mesh: Coordinator, channel: grpc.aio.Channel) -> None:
        broken = await connect(channel, worker())
        await mesh.next(events.WorkerRegistered)
        again = await connect(channel, worker())
        assert isinstance(await refusal(broken), errors.EpochFenced)
        await mesh.next(events.WorkerRegistered)
        mesh.service.meet(MeetWorker(worker(), admitted=True))
        assert (await again.read()).HasField("registered")
        assert mesh.events.empty()

    run(scenario)


def test_a_worker_that_does_not_take_its_commands_loses_its_stream() -> None:
    async def scenario(mesh: Coordinator, channel: grpc.aio.Channel) -> None:
        call = await connect(channel, worker())
        await mesh.next(events.WorkerRegistered)
        for epoch in range(COMMANDS_QUEUED_MAX + 1):  # No await: nothing is taken meanwhile.
            mesh.service.fence([WorkerName("stage-0")], epoch)
        assert isinstance(await refusal(call), errors.Overloaded)
        await mesh.next(events.WorkerLost)

    run(scenario)


def changed(**fields: object) -> topology_pb2.Worker:
    proto = worker_to_proto(worker())
    for field, value in fields.items():
        setattr(proto, field, value)
    return proto


@pytest.mark.parametrize(
    "proto",
    [
        changed(name=""),
        changed(name="coordinator"),
        changed(name="../x"),
        changed(name="n" * 65),
        changed(address=""),
        changed(address="nowhere"),
        changed(instance=""),
        changed(fingerprint="ab"),
        changed(fingerprint="zz" * 32),
        changed(span_fingerprint=""),
        changed(span_first=2),
        changed(span_last=5),
        changed(protocol_version=99),
    ],
)
def test_a_worker_that_describes_itself_wrongly_is_refused_before_the_core_hears_of_it(
    proto: topology_pb2.Worker,
) -> None:
    async def scenario(mesh: Coordinator, channel: grpc.aio.Channel) -> None:
        error = await refusal(await connect(channel, proto))
        assert isinstance(error, errors.FrameMalformed)
        assert mesh.events.empty()

    run(scenario)


def test_a_stream_that_does_not_begin_with_a_registration_is_refused() -> None:
    async def scenario(mesh: Coordinator, channel: grpc.aio.Channel) -> None:
        call = worker_service_pb2_grpc.WorkerServiceStub(channel).Connect()
        await call.write(Request(progress=worker_service_pb2.ProgressReport()))
        assert isinstance(await refusal(call), errors.FrameMalformed)
        silent = worker_service_pb2_grpc.WorkerServiceStub(channel).Connect()
        await silent.done_writing()
        assert isinstance(await refusal(silent), errors.FrameMalformed)
        assert mesh.events.empty()

    run(scenario)


@pytest.mark.parametrize(
    "message",
    [
        Request(register=worker_to_proto(worker())),
        Request(),
        Request(
            result=worker_service_pb2.CommandResult(
                command_id="c", worker=worker_to_proto(worker("other"))
            )
        ),
    ],
)
def test_a_message_out_of_place_ends_the_stream_and_the_worker_is_lost(message: Request) -> None:
    async def scenario(mesh: Coordinator, channel: grpc.aio.Channel) -> None:
        call = await connect(channel, worker())
        await mesh.next(events.WorkerRegistered)
        await call.write(message)
        assert isinstance(await refusal(call), errors.FrameMalformed)
        await mesh.next(events.WorkerLost)

    run(scenario)


def test_a_client_certificate_cannot_register_a_worker(tmp_path: Path) -> None:
    certs.init(tmp_path)

    async def scenario() -> None:
        async with (
            asyncio.timeout(LIMIT_S),
            coordinator(TlsFiles.in_directory(tmp_path, "coordinator")) as mesh,
        ):
            for role, admitted in (("client", False), ("full", True)):
                tls = TlsFiles.in_directory(tmp_path, role)
                async with open_channel(mesh.server.address, tls=tls) as channel:
                    call = await connect(channel, worker())
                    if admitted:
                        await mesh.next(events.WorkerRegistered)
                    else:
                        assert isinstance(await refusal(call), errors.AccessDenied)

    asyncio.run(scenario())
