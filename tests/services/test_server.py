"""The server factory, seen through real channels on loopback: limits, TLS, health, reflection,
drain.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from services import certs, health
from services.channel import MESSAGE_BYTES_MAX, open_channel
from services.credentials import TlsFiles
from services.rpc_errors import to_mesh_error
from services.server import MeshServer, ServerOptions, is_loopback
from stagemesh import errors
from stagemesh.v1 import generation_service_pb2 as pb
from stagemesh.v1 import generation_service_pb2_grpc as rpc

LIMIT_S = 20.0


class Edge(rpc.GenerationServiceServicer):
    """Tokenizes by length, and streams until told to go on."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()

    async def Tokenize(  # noqa: N802
        self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.TokenizeResponse:
        return pb.TokenizeResponse(token_ids=[len(request.text)])

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(text="first")
        await self.go_on.wait()
        yield pb.GenerateResponse(text="last")


async def started(options: ServerOptions | None = None) -> tuple[MeshServer, Edge]:
    server, edge = MeshServer(options or ServerOptions("127.0.0.1:0")), Edge()
    server.add(rpc.add_GenerationServiceServicer_to_server, edge)
    await server.start()
    return server, edge


def run(coroutine: object) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(LIMIT_S):
            await coroutine  # type: ignore[misc]

    asyncio.run(bounded())


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:1", True),
        ("127.8.9.1:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("unix:socket", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("localhost.example:1", False),
        (":1", False),
    ],
)
def test_loopback_is_told_from_the_rest(address: str, local: bool) -> None:
    assert is_loopback(address) is local


def test_beyond_loopback_without_tls_is_refused_unless_insecure() -> None:
    with pytest.raises(errors.InvalidConfiguration, match="without TLS"):
        ServerOptions("0.0.0.0:0").check()
    ServerOptions("0.0.0.0:0", insecure=True).check()
    ServerOptions("0.0.0.0:0", tls=TlsFiles(Path("a"), Path("b"), Path("c"))).check()


@pytest.mark.parametrize("address", ["", "nowhere", "127.0.0.1:", "127.0.0.1:x"])
def test_an_address_that_is_not_host_and_port_is_refused(address: str) -> None:
    with pytest.raises(errors.InvalidConfiguration, match="HOST:PORT"):
        ServerOptions(address, insecure=True).check()


def test_a_port_in_use_is_a_clear_error() -> None:
    async def scenario() -> None:
        first, _ = await started()
        with pytest.raises(errors.InvalidConfiguration, match="in use"):
            await started(ServerOptions(first.address))
        await first.drain(0)

    run(scenario())


def test_a_service_with_a_method_that_has_no_access_row_is_not_served() -> None:
    async def scenario() -> None:
        server = MeshServer(ServerOptions("127.0.0.1:0"))
        handler = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
        with pytest.raises(errors.InvalidConfiguration, match=r"access\.py"):
            server.add_handlers("other.v1.Other", {"Call": handler})

    run(scenario())


def test_health_is_per_service_and_starts_as_not_serving() -> None:
    async def scenario() -> None:
        server, _ = await started()
        async with open_channel(server.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)

            async def state(name: str) -> int:
                reply = await stub.Check(health_pb2.HealthCheckRequest(service=name))
                return int(reply.status)

            assert await state("stagemesh.v1.GenerationService") == health.NOT_SERVING
            assert await state("") == health.NOT_SERVING
            server.set_serving(serving=True)
            assert await state("stagemesh.v1.GenerationService") == health.SERVING
            with pytest.raises(grpc.RpcError) as unknown:
                await state("nobody.v1.Nothing")
            assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        await server.drain(0)

    run(scenario())


def test_every_health_watcher_sees_every_state_even_after_another_left() -> None:
    async def scenario() -> None:
        server, _ = await started()
        async with open_channel(server.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service="stagemesh.v1.GenerationService")
            staying, leaving = stub.Watch(request), stub.Watch(request)
            assert (await staying.read()).status == health.NOT_SERVING
            assert (await leaving.read()).status == health.NOT_SERVING
            leaving.cancel()
            server.set_serving(serving=True)
            assert (await staying.read()).status == health.SERVING
            server.health.enter_graceful_shutdown()
            assert (await staying.read()).status == health.NOT_SERVING
            server.set_serving(serving=True)
            assert server.health.state("") == health.NOT_SERVING
        await server.drain(0)

    run(scenario())


def test_health_list_names_every_service() -> None:
    async def scenario() -> None:
        server, _ = await started()
        server.set_serving(serving=True)
        async with open_channel(server.address) as channel:
            call = channel.unary_unary(
                "/grpc.health.v1.Health/List",
                request_serializer=health.ListRequest.SerializeToString,
                response_deserializer=health.ListResponse.FromString,
            )
            reply = await call(health.ListRequest())
            states = {name: value.status for name, value in reply.statuses.items()}
            assert states["stagemesh.v1.GenerationService"] == health.SERVING
            assert {"", "grpc.health.v1.Health"} <= set(states)
        await server.drain(0)

    run(scenario())


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_answers_under_both_names(version: str) -> None:
    async def scenario() -> None:
        server, _ = await started()
        async with open_channel(server.address) as channel:
            call = channel.stream_stream(
                f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
                request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
                response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
            )
            requests: Iterable[reflection_pb2.ServerReflectionRequest] = [
                reflection_pb2.ServerReflectionRequest(list_services=""),
                reflection_pb2.ServerReflectionRequest(
                    file_containing_symbol="stagemesh.v1.GenerationService"
                ),
            ]
            listed, file = [reply async for reply in call(requests)]
            names = [item.name for item in listed.list_services_response.service]
            assert "stagemesh.v1.GenerationService" in names
            protos = [
                FileDescriptorProto.FromString(item)
                for item in file.file_descriptor_response.file_descriptor_proto
            ]
            assert any(item.package == "stagemesh.v1" for item in protos)
        await server.drain(0)

    run(scenario())


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_every_service_that_reflection_lists_can_be_described(version: str) -> None:
    request = reflection_pb2.ServerReflectionRequest

    async def scenario() -> None:
        server, _ = await started()
        async with open_channel(server.address) as channel:
            call = channel.stream_stream(
                f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
                request_serializer=request.SerializeToString,
                response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
            )
            (listed,) = [reply async for reply in call([request(list_services="")])]
            names = [item.name for item in listed.list_services_response.service]
            questions = [request(file_containing_symbol=name) for name in names]
            replies = [reply async for reply in call(questions)]
        for name, reply in zip(names, replies, strict=True):
            files = [
                FileDescriptorProto.FromString(item)
                for item in reply.file_descriptor_response.file_descriptor_proto
            ]
            found = {f"{file.package}.{one.name}" for file in files for one in file.service}
            assert name in found, reply.error_response
        assert f"grpc.reflection.{version}.ServerReflection" in names
        await server.drain(0)

    run(scenario())


def test_a_message_over_the_limit_is_refused_with_resource_exhausted() -> None:
    async def scenario() -> None:
        server, _ = await started()
        async with grpc.aio.insecure_channel(
            server.address, options=[("grpc.max_send_message_length", -1)]
        ) as channel:
            stub = rpc.GenerationServiceStub(channel)
            with pytest.raises(grpc.RpcError) as refused:
                await stub.Tokenize(pb.TokenizeRequest(text="x" * (MESSAGE_BYTES_MAX + 1)))
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            reply = await stub.Tokenize(pb.TokenizeRequest(text="x" * 5_000_000))
            assert list(reply.token_ids) == [5_000_000]
        await server.drain(0)

    run(scenario())


def test_more_calls_than_allowed_are_refused_at_the_door() -> None:
    async def scenario() -> None:
        server, edge = await started(ServerOptions("127.0.0.1:0", concurrent_rpcs_max=1))
        async with open_channel(server.address) as channel:
            stub = rpc.GenerationServiceStub(channel)
            running = stub.Generate(pb.GenerateRequest(text="a"))
            assert (await running.read()).text == "first"
            with pytest.raises(grpc.RpcError) as refused:
                await stub.Tokenize(pb.TokenizeRequest(text="b"))
            assert isinstance(to_mesh_error(refused.value), errors.Overloaded)
            edge.go_on.set()
            assert (await running.read()).text == "last"
        await server.drain(0)

    run(scenario())


def test_a_drain_lets_a_running_stream_finish_and_admits_nothing_new() -> None:
    async def scenario() -> None:
        server, edge = await started()
        async with open_channel(server.address) as channel:
            stub = rpc.GenerationServiceStub(channel)
            running = stub.Generate(pb.GenerateRequest(text="a"))
            assert (await running.read()).text == "first"
            drain = asyncio.ensure_future(server.drain(LIMIT_S))
            await asyncio.sleep(0)  # The drain begins before the next call is made.
            assert server.health.state("") == health.NOT_SERVING
            with pytest.raises(grpc.RpcError) as refused:
                await stub.Tokenize(pb.TokenizeRequest(text="b"))
            assert isinstance(to_mesh_error(refused.value), errors.StageDraining)
            with pytest.raises(grpc.RpcError) as admitted:  # About work that is already here.
                await stub.CancelGeneration(pb.CancelGenerationRequest())
            assert admitted.value.code() is grpc.StatusCode.UNIMPLEMENTED
            edge.go_on.set()
            assert (await running.read()).text == "last"
            await drain

    run(scenario())


def test_a_drain_ends_what_outlasts_its_grace() -> None:
    async def scenario() -> None:
        server, _ = await started()
        async with open_channel(server.address) as channel:
            running = rpc.GenerationServiceStub(channel).Generate(pb.GenerateRequest(text="a"))
            assert (await running.read()).text == "first"
            await server.drain(0.05)
            with pytest.raises(grpc.RpcError):
                await running.read()

    run(scenario())


def tls_options(directory: Path, role: str = "coordinator") -> ServerOptions:
    return ServerOptions("127.0.0.1:0", tls=TlsFiles.in_directory(directory, role))


def test_mutual_tls_admits_by_role_and_names_the_role_in_a_refusal(tmp_path: Path) -> None:
    certs.init(tmp_path)

    async def scenario() -> None:
        server, _ = await started(tls_options(tmp_path))
        for role, admitted in (("client", True), ("admin", True), ("stage", False)):
            tls = TlsFiles.in_directory(tmp_path, role)
            async with open_channel(server.address, tls=tls) as channel:
                call = rpc.GenerationServiceStub(channel).Tokenize(pb.TokenizeRequest(text="abc"))
                if admitted:
                    assert list((await call).token_ids) == [3]
                    continue
                with pytest.raises(grpc.RpcError) as refused:
                    await call
                error = to_mesh_error(refused.value)
                assert isinstance(error, errors.AccessDenied)
                assert error.metadata["role"] == "stage"
        await server.drain(0)

    run(scenario())


def test_strangers_get_no_connection_at_all(tmp_path: Path) -> None:
    certs.init(tmp_path / "ours")
    certs.init(tmp_path / "theirs")

    async def scenario() -> None:
        server, _ = await started(tls_options(tmp_path / "ours"))
        foreign = TlsFiles.in_directory(tmp_path / "theirs", "client")
        without = grpc.ssl_channel_credentials((tmp_path / "ours" / "ca.pem").read_bytes())
        named = (("grpc.ssl_target_name_override", "coordinator.stagemesh"),)
        channels = (
            open_channel(server.address),
            open_channel(server.address, tls=foreign),
            grpc.aio.secure_channel(server.address, without, options=named),
        )
        for channel in channels:
            async with channel:
                stub = rpc.GenerationServiceStub(channel)
                with pytest.raises(grpc.RpcError) as refused:
                    await stub.Tokenize(pb.TokenizeRequest(text="abc"), timeout=LIMIT_S)
                assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        await server.drain(0)

    run(scenario())


def test_a_stage_certificate_cannot_stand_in_for_the_coordinator(tmp_path: Path) -> None:
    certs.init(tmp_path)

    async def scenario() -> None:
        server, _ = await started(tls_options(tmp_path, "stage"))
        tls = TlsFiles.in_directory(tmp_path, "client")
        async with open_channel(server.address, tls=tls, peer="coordinator") as channel:
            stub = rpc.GenerationServiceStub(channel)
            with pytest.raises(grpc.RpcError) as refused:
                await stub.Tokenize(pb.TokenizeRequest(text="abc"))
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        async with open_channel(server.address, tls=tls, peer="stage-0") as channel:
            reply = await rpc.GenerationServiceStub(channel).Tokenize(
                pb.TokenizeRequest(text="abc")
            )
            assert list(reply.token_ids) == [3]
        await server.drain(0)

    run(scenario())


def replace_all(directory: Path) -> None:
    """A new CA, and new certificates of it."""
    for file in directory.iterdir():
        file.unlink()
    certs.init(directory)


def test_certificates_are_rotated_without_dropping_a_stream(tmp_path: Path) -> None:
    certs.init(tmp_path)

    async def scenario() -> None:
        server, edge = await started(tls_options(tmp_path))
        tls = TlsFiles.in_directory(tmp_path, "client")
        async with open_channel(server.address, tls=tls) as old:
            running = rpc.GenerationServiceStub(old).Generate(pb.GenerateRequest(text="a"))
            assert (await running.read()).text == "first"
            replace_all(tmp_path)
            async with open_channel(server.address, tls=tls) as new:
                stub = rpc.GenerationServiceStub(new)
                reply = await stub.Tokenize(pb.TokenizeRequest(text="abc"))
                assert list(reply.token_ids) == [3]
            edge.go_on.set()
            assert (await running.read()).text == "last"
        await server.drain(0)

    run(scenario())
