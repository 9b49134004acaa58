"""What happens around every call: telemetry, errors, drain, deadline, access, in this order from
the outside.

grpc.aio handlers come in four kinds (unary or streaming on either side) and two styles (a coroutine
that may use ``context.write``, or an async generator). ``_wrap`` puts one asynchronous context
manager around any of them, so each concern is written once. Nothing here attaches a telemetry
context across a yield.

Servicers raise MeshErrors and contain no translation. What is raised by mistake is logged with an
id, and the caller is told the id and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, NoReturn, Protocol

import grpc

from services.access import check_access
from services.credentials import identity_of
from services.grpc_types import RpcMethodHandler, ServicerContext
from services.rpc_errors import to_mesh_error, to_status
from stagemesh.errors import DeadlineExceeded, MeshError, StageDraining

__all__ = ["RpcObserver", "ServerInterceptor", "to_mesh_error", "to_status"]

UNARY_DEADLINE_S_MAX = 120.0
"""A unary call may not take longer, whatever deadline (or none) its client set."""

LONG_LIVED = (
    "/grpc.",
    "/stagemesh.v1.StageService/",
    "/stagemesh.v1.WorkerService/",
    "/stagemesh.v1.EventService/",
)
"""Calls that carry the mesh itself, or only watch it: a drain does not wait for them."""
ADMITTED_WHILE_DRAINING = (
    *LONG_LIVED,
    "/stagemesh.v1.AdminService/",
    "/stagemesh.v1.GenerationService/CancelGeneration",
    "/stagemesh.v1.GenerationService/ResumeGeneration",
)
"""What is about work that is already here; everything else is new work, and refused by a drain."""

_log = logging.getLogger(__name__)

Around = Callable[[ServicerContext], AbstractAsyncContextManager[None]]


class RpcObserver(Protocol):
    """Told about every call a server handles, for telemetry. Must not block or raise."""

    def rpc_started(self, method: str, metadata: dict[str, str], peer: str) -> object:
        """A call to ``/package.Service/Method`` begins; the result is handed to ``rpc_ended``."""

    def rpc_ended(self, call: object, code: str, error: BaseException | None) -> None:
        """It ended with a gRPC status name."""


def _wrap_behaviour(behaviour: Callable[..., Any], around: Around) -> Callable[..., Any]:
    if inspect.isasyncgenfunction(behaviour):

        async def generate(request: object, context: ServicerContext) -> AsyncIterator[Any]:
            async with around(context), contextlib.aclosing(behaviour(request, context)) as inner:
                async for response in inner:
                    yield response

        return generate

    async def run(request: object, context: ServicerContext) -> Any:
        async with around(context):
            result = behaviour(request, context)
            return await result if inspect.isawaitable(result) else result

    return run


def _wrap(handler: RpcMethodHandler, around: Around) -> RpcMethodHandler:
    make: dict[tuple[bool, bool], tuple[Callable[..., RpcMethodHandler], Any]] = {
        (False, False): (grpc.unary_unary_rpc_method_handler, handler.unary_unary),
        (False, True): (grpc.unary_stream_rpc_method_handler, handler.unary_stream),
        (True, False): (grpc.stream_unary_rpc_method_handler, handler.stream_unary),
        (True, True): (grpc.stream_stream_rpc_method_handler, handler.stream_stream),
    }
    factory, behaviour = make[bool(handler.request_streaming), bool(handler.response_streaming)]
    return factory(
        _wrap_behaviour(behaviour, around),
        handler.request_deserializer,
        handler.response_serializer,
    )


async def _abort(context: ServicerContext, error: MeshError) -> NoReturn:
    status = to_status(error)
    await context.abort(status.code, status.message, status.trailers)
    raise error  # Unreachable: abort raises.


class ServerInterceptor(grpc.aio.ServerInterceptor):
    """The mesh's one server interceptor."""

    def __init__(
        self,
        *,
        observer: RpcObserver | None = None,
        unary_deadline_s_max: float = UNARY_DEADLINE_S_MAX,
    ) -> None:
        self._observer = observer
        self._unary_deadline_s_max = unary_deadline_s_max
        self._running = 0
        self._draining = False
        self._idle = asyncio.Event()

    @property
    def running(self) -> int:
        """Calls being handled, long-lived ones not counted."""
        return self._running

    async def drain(self, grace_s: float) -> None:
        """Refuse new calls with StageDraining and wait, at most ``grace_s`` seconds, for running
        ones.
        """
        self._draining = True
        if self._running == 0:
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace_s)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> RpcMethodHandler | None:
        """Called by gRPC for every call; an unknown method stays unknown."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = handler_call_details.method
        pairs: Any = handler_call_details.invocation_metadata or ()
        metadata = {key: value for key, value in pairs if isinstance(value, str)}
        unary = not handler.request_streaming and not handler.response_streaming

        @contextlib.asynccontextmanager
        async def around(context: ServicerContext) -> AsyncIterator[None]:
            async with (
                self._observed(method, metadata, context),
                self._translated(method, context),
                self._counted(method),
                self._bounded(unary),
            ):
                check_access(method, identity_of(context.auth_context()))
                yield

        return _wrap(handler, around)

    @contextlib.asynccontextmanager
    async def _observed(
        self, method: str, metadata: dict[str, str], context: ServicerContext
    ) -> AsyncIterator[None]:
        if self._observer is None:
            yield
            return
        call = self._observer.rpc_started(method, metadata, context.peer())
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failure = error
            raise
        finally:
            self._observer.rpc_ended(call, _final_code(context, failure), failure)

    @contextlib.asynccontextmanager
    async def _translated(self, method: str, context: ServicerContext) -> AsyncIterator[None]:
        try:
            yield
        except grpc.aio.AbortError:
            raise
        except MeshError as error:
            await _abort(context, error)
        except Exception:  # noqa: BLE001 - the boundary: nothing internal may reach the caller
            if _final_code(context, None) == "UNIMPLEMENTED":  # Generated code says so, and raises.
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not served here")
            incident = uuid.uuid4().hex[:12]
            _log.exception("unexpected error in %s, incident %s", method, incident)
            await _abort(context, MeshError("internal error", incident=incident))

    @contextlib.asynccontextmanager
    async def _counted(self, method: str) -> AsyncIterator[None]:
        if self._draining and not method.startswith(ADMITTED_WHILE_DRAINING):
            raise StageDraining("this process is stopping; try another, or again later")
        if method.startswith(LONG_LIVED):
            yield
            return
        self._running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._running -= 1
            if self._running == 0:
                self._idle.set()

    @contextlib.asynccontextmanager
    async def _bounded(self, unary: bool) -> AsyncIterator[None]:
        if not unary:
            yield
            return
        try:
            async with asyncio.timeout(self._unary_deadline_s_max) as bound:
                yield
        except TimeoutError as error:
            if not bound.expired():
                raise
            raise DeadlineExceeded(
                "the server's own limit for this call has passed",
                limit_s=self._unary_deadline_s_max,
            ) from error


def _final_code(context: ServicerContext, failure: BaseException | None) -> str:
    """Status name a call ended with, as the caller sees it."""
    if isinstance(failure, asyncio.CancelledError | GeneratorExit):
        return "CANCELLED"
    code: Any = context.code()  # An enum member, or its number, or 0 while none is set.
    if isinstance(code, grpc.StatusCode):
        return code.name
    for known in grpc.StatusCode:
        if code and known.value[0] == code:
            return known.name
    return "UNKNOWN" if failure is not None else "OK"
