"""Errors, deadlines and observation around every kind of handler, over a real connection."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from services.access import ACCESS
from services.channel import open_channel
from services.interceptors import ServerInterceptor
from services.rpc_errors import (
    DETAILS_KEY,
    PUSHBACK_KEY,
    from_proto,
    to_mesh_error,
    to_proto,
    to_status,
)
from stagemesh import errors
from stagemesh.errors import MeshError

LIMIT_S = 20.0
SERVICE = "test.v1.TestService"
KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
WRITERS = ("unary_stream_writer", "stream_stream_writer")


class Observer:
    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.ended = asyncio.Event()

    def rpc_started(self, method: str, metadata: dict[str, str], peer: str) -> object:
        assert peer
        return method.rpartition("/")[2]

    def rpc_ended(self, call: object, code: str, error: BaseException | None) -> None:
        self.seen.append((str(call), code))
        self.ended.set()


Behaviour = Callable[[], object]


def handlers(behave: Behaviour) -> dict[str, grpc.RpcMethodHandler]:
    """One handler of every kind and style that answers b"ok" after calling ``behave``."""

    async def answer(request: object, context: grpc.aio.ServicerContext) -> bytes:
        outcome = behave()
        if asyncio.iscoroutine(outcome):
            await outcome
        return b"ok"

    async def stream(request: object, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        yield b"first"
        yield await answer(request, context)

    async def write(request: object, context: grpc.aio.ServicerContext) -> None:
        await context.write(b"first")
        await context.write(await answer(request, context))

    return {
        "unary_unary": grpc.unary_unary_rpc_method_handler(answer),
        "unary_stream": grpc.unary_stream_rpc_method_handler(stream),
        "stream_unary": grpc.stream_unary_rpc_method_handler(answer),
        "stream_stream": grpc.stream_stream_rpc_method_handler(stream),
        "unary_stream_writer": grpc.unary_stream_rpc_method_handler(write),
        "stream_stream_writer": grpc.stream_stream_rpc_method_handler(write),
    }


@pytest.fixture(autouse=True)
def admitted(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (*KINDS, *WRITERS):
        monkeypatch.setitem(ACCESS, f"/{SERVICE}/{kind}", frozenset())


async def call(channel: grpc.aio.Channel, kind: str, method: str) -> list[bytes]:
    stub = getattr(channel, kind.removesuffix("_writer"))(f"/{SERVICE}/{method}")
    request = iter([b"a"]) if kind.startswith("stream") else b"a"
    reply = stub(request)
    if "_stream" in kind:
        return [item async for item in reply]
    return [await reply]


def serve(
    behave: Behaviour,
    scenario: Callable[[grpc.aio.Channel], object],
    *,
    observer: Observer | None = None,
    unary_deadline_s_max: float = 60.0,
) -> None:
    async def bounded() -> None:
        interceptor = ServerInterceptor(
            observer=observer, unary_deadline_s_max=unary_deadline_s_max
        )
        server = grpc.aio.server(interceptors=[interceptor])
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, handlers(behave)),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with asyncio.timeout(LIMIT_S), open_channel(f"127.0.0.1:{port}") as channel:
            await scenario(channel)  # type: ignore[misc]
        await server.stop(0)

    asyncio.run(bounded())


def raising(error: Exception) -> Behaviour:
    def behave() -> object:
        raise error

    return behave


@pytest.mark.parametrize("kind", [*KINDS, *WRITERS])
def test_a_handler_of_any_kind_works_under_the_interceptor(kind: str) -> None:
    observer = Observer()

    async def scenario(channel: grpc.aio.Channel) -> None:
        expected = [b"first", b"ok"] if "_stream" in kind else [b"ok"]
        assert await call(channel, kind, kind) == expected

    serve(lambda: None, scenario, observer=observer)
    assert observer.seen == [(kind, "OK")]


@pytest.mark.parametrize("kind", [*KINDS, *WRITERS])
def test_a_mesh_error_keeps_its_type_message_and_facts_over_any_kind(kind: str) -> None:
    observer = Observer()

    async def scenario(channel: grpc.aio.Channel) -> None:
        with pytest.raises(grpc.RpcError) as failed:
            await call(channel, kind, kind)
        error = to_mesh_error(failed.value)
        assert type(error) is errors.CacheLost
        assert error.message == "no cache"
        assert error.metadata == {"worker": "stage-1", "position": "7"}

    serve(
        raising(errors.CacheLost("no cache", worker="stage-1", position=7)),
        scenario,
        observer=observer,
    )
    assert observer.seen == [(kind, "UNAVAILABLE")]


def test_an_overload_says_when_to_come_back_in_retry_info_and_in_the_pushback_trailer() -> None:
    async def scenario(channel: grpc.aio.Channel) -> None:
        with pytest.raises(grpc.RpcError) as failed:
            await call(channel, "unary_unary", "unary_unary")
        assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(failed.value.trailing_metadata())[PUSHBACK_KEY] == "2500"
        error = to_mesh_error(failed.value)
        assert isinstance(error, errors.Overloaded)
        assert error.retry_after_s == 2.5

    serve(raising(errors.Overloaded("queue is full", retry_after_s=2.5)), scenario)


def test_a_route_that_is_unavailable_may_be_tried_again_later() -> None:
    assert PUSHBACK_KEY in dict(to_status(errors.RouteUnavailable("no workers")).trailers)
    assert PUSHBACK_KEY not in dict(to_status(errors.InvalidRequest("no")).trailers)


def test_an_invalid_request_names_its_field_in_bad_request() -> None:
    status = to_proto(errors.InvalidRequest("top_p is out of range", field="top_p", value=2))
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in status.details)
    assert bad.field_violations[0].field == "top_p"


def test_an_unexpected_exception_shows_an_incident_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario(channel: grpc.aio.Channel) -> None:
        with pytest.raises(grpc.RpcError) as failed:
            await call(channel, "unary_stream", "unary_stream")
        assert failed.value.code() is grpc.StatusCode.INTERNAL
        error = to_mesh_error(failed.value)
        assert "secret" not in str(error) + str(failed.value.trailing_metadata())
        assert error.metadata["incident"] in caplog.text
        assert "secret detail" in caplog.text

    with caplog.at_level(logging.ERROR):
        serve(raising(ValueError("secret detail")), scenario)


def test_a_unary_call_without_a_deadline_gets_the_servers_own() -> None:
    async def scenario(channel: grpc.aio.Channel) -> None:
        with pytest.raises(grpc.RpcError) as failed:
            await call(channel, "unary_unary", "unary_unary")
        assert isinstance(to_mesh_error(failed.value), errors.DeadlineExceeded)

    serve(lambda: asyncio.Event().wait(), scenario, unary_deadline_s_max=0.05)


def test_a_handlers_own_timeout_is_not_taken_for_the_deadline() -> None:
    async def scenario(channel: grpc.aio.Channel) -> None:
        with pytest.raises(grpc.RpcError) as failed:
            await call(channel, "unary_unary", "unary_unary")
        assert failed.value.code() is grpc.StatusCode.INTERNAL

    serve(raising(TimeoutError()), scenario)


def test_a_cancelled_stream_is_observed_as_cancelled() -> None:
    observer = Observer()
    entered = asyncio.Event()

    async def wait_for_ever() -> None:
        entered.set()
        await asyncio.Event().wait()

    async def scenario(channel: grpc.aio.Channel) -> None:
        reply = channel.unary_stream(f"/{SERVICE}/unary_stream")(b"a")
        assert await reply.read() == b"first"
        await entered.wait()
        reply.cancel()
        await observer.ended.wait()

    serve(wait_for_ever, scenario, observer=observer)
    assert observer.seen == [("unary_stream", "CANCELLED")]


def test_an_unknown_method_stays_unimplemented() -> None:
    async def scenario(channel: grpc.aio.Channel) -> None:
        with pytest.raises(grpc.RpcError) as failed:
            await channel.unary_unary("/test.v1.TestService/Nothing")(b"")
        assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED

    serve(lambda: None, scenario)


def test_a_method_without_an_access_row_is_denied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ACCESS, f"/{SERVICE}/unary_unary")

    async def scenario(channel: grpc.aio.Channel) -> None:
        with pytest.raises(grpc.RpcError) as failed:
            await call(channel, "unary_unary", "unary_unary")
        assert isinstance(to_mesh_error(failed.value), errors.AccessDenied)

    serve(lambda: None, scenario)


@pytest.mark.parametrize("kind", sorted(errors.by_reason().values(), key=lambda kind: kind.reason))
def test_every_error_of_the_tree_survives_the_wire(kind: type[MeshError]) -> None:
    rebuilt = from_proto(
        status_pb2.Status.FromString(to_proto(kind("text", field="a")).SerializeToString())
    )
    assert type(rebuilt) is kind
    assert rebuilt.message == "text"
    assert rebuilt.metadata == {"field": "a"}


def test_a_status_stays_small_enough_for_headers_whatever_the_error_says() -> None:
    facts = {f"fact_{number}": "x" * 10_000 for number in range(100)}
    status = to_status(MeshError("y" * 10_000, **facts))
    assert len(dict(status.trailers)[DETAILS_KEY]) < 16_000


class ForeignError(grpc.RpcError):
    """A failed call of a server that is not of this mesh."""

    def __init__(self, code: grpc.StatusCode, trailers: tuple[tuple[str, bytes], ...] = ()) -> None:
        self._code, self._trailers = code, trailers

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "from elsewhere"

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return self._trailers


def foreign_details() -> bytes:
    info = error_details_pb2.ErrorInfo(reason="CACHE_LOST", domain="example.com")
    packed = any_pb2.Any()
    packed.Pack(info)
    return status_pb2.Status(code=13, message="m", details=[packed]).SerializeToString()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ForeignError(grpc.StatusCode.UNAVAILABLE), errors.StageUnreachable),
        (ForeignError(grpc.StatusCode.UNAUTHENTICATED), errors.AccessDenied),
        (ForeignError(grpc.StatusCode.UNKNOWN), MeshError),
        (ForeignError(grpc.StatusCode.CANCELLED, ((DETAILS_KEY, b"\xff\xff"),)), errors.Cancelled),
        (ForeignError(grpc.StatusCode.INTERNAL, ((DETAILS_KEY, foreign_details()),)), MeshError),
    ],
)
def test_a_status_of_somebody_else_becomes_an_error_by_its_code(
    error: ForeignError, kind: type[MeshError]
) -> None:
    assert type(to_mesh_error(error)) is kind
