"""Server reflection under v1 and v1alpha, so that tools old and new can look a mesh up.

Both are the same messages on the wire. The runtime floor ships the descriptors of v1alpha only, and
a tool that walks every service a server lists would stop at the one that cannot describe itself, so
v1's are derived from them here, in a pool of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection, reflection_pb2

_ALPHA, _V1 = "grpc.reflection.v1alpha", "grpc.reflection.v1"
NAMES = (f"{_V1}.ServerReflection", f"{_ALPHA}.ServerReflection")
"""The services a client may ask."""


def _v1_descriptors() -> descriptor_pool.DescriptorPool:
    file = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    file.ClearField("options")
    file.name, file.package = "grpc/reflection/v1/reflection.proto", _V1
    for message in file.message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = field.type_name.replace(_ALPHA, _V1)
    for method in file.service[0].method:
        method.input_type = method.input_type.replace(_ALPHA, _V1)
        method.output_type = method.output_type.replace(_ALPHA, _V1)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return pool


class _TwoPools:
    """Looks in the process's own descriptors, then in v1's. Every look-up raises KeyError."""

    def __init__(self) -> None:
        self._first, self._second = descriptor_pool.Default(), _v1_descriptors()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def find(*arguments: Any) -> Any:
            try:
                return getattr(self._first, name)(*arguments)
            except KeyError:
                return getattr(self._second, name)(*arguments)

        return find


def handlers(services: Iterable[str]) -> tuple[grpc.GenericRpcHandler, ...]:
    """What a server has to add so that ``services``, and reflection, can be described."""
    servicer = reflection.aio.ReflectionServicer((*services, *NAMES), pool=_TwoPools())
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return tuple(
        grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": handler})
        for name in NAMES
    )
