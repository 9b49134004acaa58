"""grpc.health.v1 with Check, Watch and List, for any number of watchers.

A service is SERVING only when it can do its work: a worker after its weights are loaded and its
probe has run, ``GenerationService`` while the mesh makes tokens. ``""`` stands for the process as a
whole. ``enter_graceful_shutdown`` turns everything to NOT_SERVING for good.

Written here because the runtime floor's health package has no List, and its watchers of one name
share a condition that the first to leave takes away.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_health.v1 import health_pb2

from services.grpc_types import RpcMethodHandler, ServicerContext

SERVICE_NAME = "grpc.health.v1.Health"
WATCHERS_MAX = 1024
"""Watch calls at a time; each holds a little memory for as long as its caller likes."""

_Status = health_pb2.HealthCheckResponse.ServingStatus
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


def _list_messages() -> tuple[Any, Any]:
    """(HealthListRequest, HealthListResponse), wire-identical to the published ones."""
    file = descriptor_pb2.FileDescriptorProto(
        name="stagemesh/health_list.proto", package="stagemesh.health", syntax="proto3"
    )
    field = descriptor_pb2.FieldDescriptorProto
    check = file.message_type.add(name="Check")
    check.field.add(name="status", number=1, type=field.TYPE_INT32, label=field.LABEL_OPTIONAL)
    file.message_type.add(name="ListRequest")
    response = file.message_type.add(name="ListResponse")
    entry = response.nested_type.add(name="StatusesEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    entry.field.add(
        name="value",
        number=2,
        type=field.TYPE_MESSAGE,
        label=field.LABEL_OPTIONAL,
        type_name=".stagemesh.health.Check",
    )
    response.field.add(
        name="statuses",
        number=1,
        type=field.TYPE_MESSAGE,
        label=field.LABEL_REPEATED,
        type_name=".stagemesh.health.ListResponse.StatusesEntry",
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = (
        pool.FindMessageTypeByName(f"stagemesh.health.{n}") for n in ("ListRequest", "ListResponse")
    )
    request_type, response_type = (message_factory.GetMessageClass(item) for item in found)
    return request_type, response_type


ListRequest, ListResponse = _list_messages()


class HealthService:
    """The servicer, and the switchboard its owner sets states on. Belongs to one event loop."""

    def __init__(self) -> None:
        self._states: dict[str, int] = {"": NOT_SERVING}
        self._changed = asyncio.Event()
        self._watchers = 0
        self._leaving = False

    def set(self, service: str, *, serving: bool) -> None:
        """State of one service name; ignored once a graceful shutdown has begun."""
        if not self._leaving:
            self._put(service, SERVING if serving else NOT_SERVING)

    def state(self, service: str) -> int | None:
        """Its state as ``ServingStatus``, or None if the name is unknown."""
        return self._states.get(service)

    def enter_graceful_shutdown(self) -> None:
        """Everything is NOT_SERVING from now on."""
        self._leaving = True
        for service in list(self._states):
            self._put(service, NOT_SERVING)

    def _put(self, service: str, state: int) -> None:
        if self._states.get(service) == state:
            return
        self._states[service] = state
        self._changed.set()
        self._changed = asyncio.Event()

    async def check(
        self, request: health_pb2.HealthCheckRequest, context: ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """One state; NOT_FOUND if the name is unknown."""
        state = self._states.get(request.service)
        if state is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return health_pb2.HealthCheckResponse(status=state)

    async def watch(
        self, request: health_pb2.HealthCheckRequest, context: ServicerContext
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The state now and at every change; an unknown name is SERVICE_UNKNOWN until it is
        known.
        """
        if self._watchers >= WATCHERS_MAX:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many health watchers")
        self._watchers += 1
        try:
            last = None
            while True:
                changed = self._changed
                state = self._states.get(request.service, SERVICE_UNKNOWN)
                if state != last:
                    last = state
                    yield health_pb2.HealthCheckResponse(status=state)
                await changed.wait()
        finally:
            self._watchers -= 1

    async def list(self, request: object, context: ServicerContext) -> object:
        """Every name and its state."""
        response = ListResponse()
        for service, state in sorted(self._states.items()):
            response.statuses[service].status = state
        return response

    def handlers(self) -> dict[str, RpcMethodHandler]:
        """Method handlers by method name."""
        request, response = health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
        return {
            "Check": grpc.unary_unary_rpc_method_handler(
                self.check, request.FromString, response.SerializeToString
            ),
            "Watch": grpc.unary_stream_rpc_method_handler(
                self.watch, request.FromString, response.SerializeToString
            ),
            "List": grpc.unary_unary_rpc_method_handler(
                self.list, ListRequest.FromString, ListResponse.SerializeToString
            ),
        }
