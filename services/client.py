"""A client that believes nothing it has not checked, and does not lose its place.

`MeshClient.generate` yields an answer piece by piece. Every token's checksum, position and link in
the digest chain is verified on this side; what does not verify is a typed error, never text. When
the connection breaks, the client attaches again with ResumeGeneration at the position it had
reached, with bounded backoff, and drops what it has seen already. If the coordinator has forgotten
the generation, the same request (same id, same seed) is sent again and must repeat the tokens that
were delivered before. A caller that leaves an answer before its end cancels it, unless the request
said ``detach``.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from coordinator import backoff
from services.channel import open_channel
from services.credentials import TlsFiles
from services.event_checker import EventChecker
from services.request_ids import request_key
from services.rpc_errors import DETAILS_KEY, from_proto, to_mesh_error
from services.stream_checker import StreamChecker
from stagemesh.errors import InvalidRequest, MeshError, RequestUnknown, StageUnreachable
from stagemesh.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    event_service_pb2,
    event_service_pb2_grpc,
    generation_service_pb2_grpc,
)
from stagemesh.v1 import generation_service_pb2 as pb

UNARY_TIMEOUT_S = 30.0
RESUME_ATTEMPTS_MAX = 10_000
RESUME_TOTAL_S_MAX = 60.0
"""How long a client keeps trying to get back to a coordinator that is away."""
RESUME_WAIT_S_MAX = 1.0
"""Longest pause between two tries: a coordinator that is back is found within this."""
CONNECT_TOTAL_S_MAX = 3.0
"""How long it tries when it never heard from one: the address may be wrong."""
DEADLINE_S_MAX = 365 * 86_400.0
"""gRPC takes much longer ones for ones that have passed."""
POSITION_MAX = 2**32 - 1
CANCEL_TIMEOUT_S = 2.0
"""A caller that leaves is not kept longer."""

_OF_THE_TRANSPORT = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
)
_TLS_HINT = "; with TLS, a mesh hangs up on whoever shows no certificate of its CA"

_Response = TypeVar("_Response")


class ConnectionLost(StageUnreachable):
    """The connection to the mesh broke, or could not be made; the answer itself may be well."""

    reason = "CONNECTION_LOST"


@dataclass(slots=True)
class _Reading:
    """One answer being read. ``request``: what to send again should the mesh not know the
    generation; None: it is somebody else's to begin. ``known``: the mesh has taken it."""

    request_id: str
    checker: StreamChecker
    deadline: float | None
    request: pb.GenerateRequest | None = None
    known: bool = False
    taken: int = 0
    """Streams that the mesh has opened for this reader."""


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
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        reading = _Reading(
            own.request_id,
            checker or StreamChecker(request_key(own.request_id)),
            deadline,
            request=own,
        )
        ended = False
        try:
            async with aclosing(self._read(self._first(reading), reading, again=resume)) as stream:
                async for response in stream:
                    ended = response.HasField("finish")
                    yield _raise_failure(response)
        except (GeneratorExit, asyncio.CancelledError):
            if not (ended or own.detach):
                await self._leave(own.request_id)
            raise

    async def resume(
        self, request_id: str, from_position: int = 0, *, timeout_s: float | None = None
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Attach to a known generation; its chain is checked from the second token on.

        Goes on after a broken connection as ``generate`` does, and raises what it does; leaving it
        early cancels nothing that somebody else reads.
        """
        if not 0 <= from_position <= POSITION_MAX:
            raise InvalidRequest(
                f"from_position is {from_position}, outside 0 to {POSITION_MAX}",
                field="from_position",
                value=from_position,
            )
        checker = StreamChecker(request_key(request_id), first_index=from_position)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        reading = _Reading(request_id, checker, deadline)
        async with aclosing(self._read(self._resumed(reading), reading, again=True)) as stream:
            async for response in stream:
                yield _raise_failure(response)

    async def _read(
        self,
        stream: AsyncGenerator[pb.GenerateResponse, None],
        reading: _Reading,
        *,
        again: bool,
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """What has not been seen yet, verified, over as many streams as it takes."""
        while True:
            try:
                async with aclosing(stream):
                    async for response in stream:
                        checked = reading.checker.check(response)
                        if checked is not None:
                            yield checked
                        if response.HasField("finish"):
                            return
                raise ConnectionLost("the stream ended without a finish")
            except ConnectionLost:
                if not again:
                    raise
                stream = await self._attach_again(reading)
                self.resumes += 1

    def _first(self, reading: _Reading) -> AsyncGenerator[pb.GenerateResponse, None]:
        call = self.generation.Generate(reading.request, timeout=_left(reading.deadline))
        return _noting(call, reading, _translated(call))

    def _resumed(self, reading: _Reading) -> AsyncGenerator[pb.GenerateResponse, None]:
        message = pb.ResumeGenerationRequest(
            request_id=reading.request_id,
            from_position=reading.checker.position,
            chain=reading.checker.link,
        )
        call = self.generation.ResumeGeneration(message, timeout=_left(reading.deadline))
        return _noting(call, reading, _unwrapped(call))

    async def _attach_again(self, reading: _Reading) -> AsyncGenerator[pb.GenerateResponse, None]:
        """A stream that goes on where the broken one stopped; tried until a bound is reached."""

        async def attach() -> AsyncGenerator[pb.GenerateResponse, None]:
            stream = self._resumed(reading)
            try:
                reading.checker.attach(from_start=False)
                return _prefixed(await anext(stream), stream)
            except RequestUnknown:
                if reading.request is None:
                    raise
                reading.checker.attach(from_start=True)
                stream = self._first(reading)
                return _prefixed(await anext(stream), stream)
            except StopAsyncIteration:
                raise ConnectionLost("the stream ended without a message") from None

        while True:
            taken = reading.taken
            patience_s = RESUME_TOTAL_S_MAX if reading.known else CONNECT_TOTAL_S_MAX
            left_s = _left(reading.deadline)
            try:
                return await backoff.retry(
                    attach,
                    on=ConnectionLost,
                    name="resume",
                    attempts=RESUME_ATTEMPTS_MAX,
                    total_s=patience_s if left_s is None else min(patience_s, left_s),
                    wait_s_max=RESUME_WAIT_S_MAX,
                )
            except ConnectionLost:
                # A mesh that took us back was there. Its next token may be long in coming, and a
                # connection that breaks meanwhile is a new one lost, not the old one still away.
                if reading.taken == taken:
                    raise

    async def _leave(self, request_id: str) -> None:
        """Nobody will read this answer: stop it now, not when the mesh has waited for a reader."""
        message = pb.CancelGenerationRequest(request_id=request_id, unless_read=True)
        # UsageError: the connection was closed first, which ends the stream as well.
        with contextlib.suppress(MeshError, grpc.aio.UsageError):
            await self._call(self.generation.CancelGeneration, message, timeout_s=CANCEL_TIMEOUT_S)

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

    async def generation_of(self, request_id: str) -> admin_service_pb2.Generation:
        """One generation as operators see it. Raises RequestUnknown."""
        message = admin_service_pb2.GetGenerationRequest(request_id=request_id)
        response = await self._call(self.admin.GetGeneration, message)
        found: admin_service_pb2.Generation = response.generation
        return found

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
        """Events and gaps, live, each checked and given once. Raises FrameCorrupted for an event
        that does not verify, SequenceGap if one is missing of which no gap record says so."""
        message = event_service_pb2.SubscribeRequest(
            from_offset=from_offset,
            topics=[event_service_pb2.Topic.Name(topic) for topic in topics],
        )
        checker = EventChecker(from_offset)
        stream = _translated(self.events.Subscribe(message))
        async with aclosing(stream):
            async for response in stream:
                fresh = checker.check(response)
                if fresh is not None:
                    yield fresh

    async def _call(
        self,
        method: Callable[..., Awaitable[Any]],
        message: object,
        *,
        timeout_s: float = UNARY_TIMEOUT_S,
    ) -> Any:
        try:
            return _readable(await method(message, timeout=timeout_s))
        except grpc.aio.AioRpcError as error:
            raise _typed(error) from error


def _left(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    return min(max(0.001, deadline - time.monotonic()), DEADLINE_S_MAX)


def _typed(error: grpc.aio.AioRpcError) -> MeshError:
    """The mesh's own error. The mesh always gives details: a bare status of these codes came from
    the transport, whose connection broke or carried what is no HTTP/2."""
    if error.code() in _OF_THE_TRANSPORT and not _has_details(error):
        details = error.details() or "unavailable"
        hint = _TLS_HINT if "Socket closed" in details else ""
        return ConnectionLost(f"the mesh cannot be reached: {details}{hint}")
    return to_mesh_error(error)


def _has_details(error: grpc.aio.AioRpcError) -> bool:
    trailers: Any = error.trailing_metadata() or ()
    return any(key == DETAILS_KEY for key, _value in trailers)


async def _translated(call: Any) -> AsyncGenerator[Any, None]:
    """A call's messages, with typed errors; leaving early cancels the call."""
    try:
        async for response in call:
            yield _readable(response)
    except grpc.aio.AioRpcError as error:
        raise _typed(error) from error
    finally:
        call.cancel()


def _readable(response: Any) -> Any:
    """gRPC gives None for bytes that are no message. Raises ConnectionLost: what was said is not
    known, and may be asked for again."""
    if response is None:
        raise ConnectionLost("a message arrived that cannot be read")
    return response


async def _noting(
    call: Any, reading: _Reading, stream: AsyncGenerator[pb.GenerateResponse, None]
) -> AsyncGenerator[pb.GenerateResponse, None]:
    """``stream`` of ``call``; the mesh sends its metadata once it has taken the request."""
    async with aclosing(stream):
        await call.initial_metadata()
        if not call.done():
            reading.known = True
            reading.taken += 1
        async for response in stream:
            reading.known = True
            yield response


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
