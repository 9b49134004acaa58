"""A client that believes nothing it has not checked, and does not lose its place.

`MeshClient.generate` yields an answer piece by piece. Every token's checksum, position and link in
the digest chain is verified on this side; what does not verify is a typed error, never text. When
the connection breaks, the client attaches again with ResumeGeneration at the position it had
reached, with bounded backoff, and drops what it has seen already. If the coordinator has forgotten
the generation, the same request (same id, same seed) is sent again and must repeat the tokens that
were delivered before.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from coordinator import backoff
from services.channel import open_channel
from services.credentials import TlsFiles
from services.rpc_errors import DETAILS_KEY, from_proto, to_mesh_error
from services.stream_checker import StreamChecker
from stagemesh.errors import MeshError, RequestUnknown, StageUnreachable
from stagemesh.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    event_service_pb2,
    event_service_pb2_grpc,
    generation_service_pb2_grpc,
)
from stagemesh.v1 import generation_service_pb2 as pb

UNARY_TIMEOUT_S = 30.0
RESUME_ATTEMPTS_MAX = 12
RESUME_TOTAL_S_MAX = 60.0
"""How long a client keeps trying to get back to a coordinator that is away."""
CONNECT_TOTAL_S_MAX = 3.0
"""How long it tries when it never heard from one: the address may be wrong."""

_Response = TypeVar("_Response")


class ConnectionLost(StageUnreachable):
    """The connection to the mesh broke, or could not be made; the answer itself may be well."""

    reason = "CONNECTION_LOST"


class MeshClient:
    """One connection to a mesh; an asynchronous context manager. Belongs to one event loop."""

    def __init__(self, address: str, *, tls: TlsFiles | None = None) -> None:
        self.address = address
        self._channel = open_channel(address, tls=tls)
        generation: Any = generation_service_pb2_grpc.GenerationServiceStub
        admin: Any = admin_service_pb2_grpc.AdminServiceStub
        events: Any = event_service_pb2_grpc.EventServiceStub
        self.generation = generation(self._channel)
        self.admin = admin(self._channel)
        self.events = events(self._channel)
        self.resumes = 0
        """Times a broken stream was attached to again."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; running streams end, and the mesh cancels what nobody reads."""
        await self._channel.close()

    # -- answers -----------------------------------------------------------------------------------

    async def generate(
        self,
        request: pb.GenerateRequest,
        *,
        timeout_s: float | None = None,
        resume: bool = True,
        checker: StreamChecker | None = None,
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """The answer, verified, up to and including the response with ``finish``.

        ``timeout_s`` is a deadline for the whole answer. Pass a ``checker`` (made for the
        request's id) to see what was verified. Raises the mesh's own MeshError when the generation
        fails, ConnectionLost when it cannot be reached again in time, TokenRejected or SequenceGap
        when something does not verify.
        """
        own = pb.GenerateRequest()
        own.CopyFrom(request)
        own.request_id = own.request_id or str(uuid.uuid4())
        checker = checker or StreamChecker(uuid.UUID(own.request_id).bytes)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        stream = self._first(own, deadline)
        while True:
            try:
                async with aclosing(stream):
                    async for response in stream:
                        checked = checker.check(response)
                        if checked is not None:
                            yield _raise_failure(checked)
                        if response.HasField("finish"):
                            return
                raise ConnectionLost("the stream ended without a finish")
            except ConnectionLost:
                if not resume:
                    raise
                stream = await self._attach_again(own, checker, deadline)
                self.resumes += 1

    def _first(
        self, request: pb.GenerateRequest, deadline: float | None
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        return _translated(self.generation.Generate(request, timeout=_left(deadline)))

    async def _attach_again(
        self, request: pb.GenerateRequest, checker: StreamChecker, deadline: float | None
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """A stream that goes on where the broken one stopped; tried until a bound is reached."""

        async def attach() -> AsyncGenerator[pb.GenerateResponse, None]:
            resume = pb.ResumeGenerationRequest(
                request_id=request.request_id, from_position=checker.position
            )
            stream = _unwrapped(self.generation.ResumeGeneration(resume, timeout=_left(deadline)))
            try:
                checker.attach(from_start=False)
                return _prefixed(await anext(stream), stream)
            except RequestUnknown:
                checker.attach(from_start=True)
                stream = self._first(request, deadline)
                return _prefixed(await anext(stream), stream)
            except StopAsyncIteration:
                raise ConnectionLost("the stream ended without a message") from None

        return await backoff.retry(
            attach,
            on=ConnectionLost,
            name="resume",
            attempts=RESUME_ATTEMPTS_MAX,
            total_s=RESUME_TOTAL_S_MAX if checker.position else CONNECT_TOTAL_S_MAX,
        )

    async def resume(
        self, request_id: str, from_position: int = 0
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Attach to a known generation; its chain is checked from the second token on."""
        checker = StreamChecker(uuid.UUID(request_id).bytes, first_index=from_position)
        message = pb.ResumeGenerationRequest(request_id=request_id, from_position=from_position)
        stream = _unwrapped(self.generation.ResumeGeneration(message))
        async with aclosing(stream):
            async for response in stream:
                checker.check(response)
                yield _raise_failure(response)

    async def cancel(self, request_id: str) -> bool:
        """Stop a generation; False if it had ended."""
        message = pb.CancelGenerationRequest(request_id=request_id)
        response = await self._call(self.generation.CancelGeneration, message)
        return bool(response.cancelled)

    async def models(self) -> list[pb.Model]:
        """What can be asked for."""
        response = await self._call(self.generation.ListModels, pb.ListModelsRequest())
        return list(response.models)

    async def tokenize(self, request: pb.GenerateRequest) -> list[int]:
        """The prompt of ``request`` as the mesh would tokenize it."""
        if request.WhichOneof("prompt") == "tokens":
            return list(request.tokens.token_ids)
        message = pb.TokenizeRequest(model=request.model)
        if request.WhichOneof("prompt") == "text":
            message.text = request.text
        else:
            message.chat.CopyFrom(request.chat)
        response = await self._call(self.generation.Tokenize, message)
        return list(response.token_ids)

    # -- operators ---------------------------------------------------------------------------------

    async def mesh(
        self, *, timeout_s: float = UNARY_TIMEOUT_S
    ) -> admin_service_pb2.GetMeshResponse:
        """Workers, routes and request counts."""
        message = admin_service_pb2.GetMeshRequest()
        response: admin_service_pb2.GetMeshResponse = await self._call(
            self.admin.GetMesh, message, timeout_s=timeout_s
        )
        return response

    async def trace(self, request_id: str) -> bytes:
        """``opentelemetry.proto.trace.v1.TracesData`` of one generation, serialized."""
        message = admin_service_pb2.GetTraceRequest(request_id=request_id)
        response = await self._call(self.admin.GetTrace, message)
        return bytes(response.traces)

    async def drain(self, worker: str, timeout_s: int = 0) -> Any:
        """Take a worker out of service; its ``WorkerStatus`` now."""
        message = admin_service_pb2.DrainWorkerRequest(worker=worker, timeout_s=timeout_s)
        response = await self._call(self.admin.DrainWorker, message)
        return response.worker

    async def diagnostics(self) -> Any:
        """Counters of every guard, barriers and health: ``GetDiagnosticsResponse``."""
        return await self._call(
            self.admin.GetDiagnostics, admin_service_pb2.GetDiagnosticsRequest()
        )

    async def follow(
        self, topics: Sequence[int] = (), from_offset: int = 0
    ) -> AsyncGenerator[event_service_pb2.SubscribeResponse, None]:
        """Events and gaps, live."""
        message = event_service_pb2.SubscribeRequest(
            from_offset=from_offset,
            topics=[event_service_pb2.Topic.Name(topic) for topic in topics],
        )
        stream = _translated(self.events.Subscribe(message))
        async with aclosing(stream):
            async for response in stream:
                yield response

    async def _call(
        self,
        method: Callable[..., Awaitable[Any]],
        message: object,
        *,
        timeout_s: float = UNARY_TIMEOUT_S,
    ) -> Any:
        try:
            return await method(message, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise _typed(error) from error


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.001, deadline - time.monotonic())


def _typed(error: grpc.aio.AioRpcError) -> MeshError:
    """The mesh's own error; a bare UNAVAILABLE came from the transport, not from the mesh."""
    if error.code() is grpc.StatusCode.UNAVAILABLE and not _has_details(error):
        return ConnectionLost(f"the mesh cannot be reached: {error.details() or 'unavailable'}")
    return to_mesh_error(error)


def _has_details(error: grpc.aio.AioRpcError) -> bool:
    trailers: Any = error.trailing_metadata() or ()
    return any(key == DETAILS_KEY for key, _value in trailers)


async def _translated(call: Any) -> AsyncGenerator[Any, None]:
    """A call's messages, with typed errors; leaving early cancels the call."""
    try:
        async for response in call:
            yield response
    except grpc.aio.AioRpcError as error:
        raise _typed(error) from error
    finally:
        call.cancel()


async def _unwrapped(call: Any) -> AsyncGenerator[pb.GenerateResponse, None]:
    async with aclosing(_translated(call)) as stream:
        async for message in stream:
            yield message.response


async def _prefixed(
    first: _Response, rest: AsyncGenerator[_Response, None]
) -> AsyncGenerator[_Response, None]:
    async with aclosing(rest):
        yield first
        async for item in rest:
            yield item


def _raise_failure(response: pb.GenerateResponse) -> pb.GenerateResponse:
    """Raise what a finish tells of a failed generation; any other response passes."""
    if response.HasField("finish") and response.finish.reason == pb.FINISH_REASON_ERROR:
        raise from_proto(response.finish.error)
    return response
