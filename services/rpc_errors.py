"""Errors across a gRPC boundary: a MeshError to a rich status, and a failed call back to a
MeshError.

Every error carries ``google.rpc.Status`` with ``ErrorInfo`` (domain ``stagemesh``, the class's
reason, its metadata). What may be tried again later also carries ``RetryInfo``, and the trailer
``grpc-retry-pushback-ms`` for clients whose library retries by itself; what is wrong with a request
names the field in ``BadRequest``. On the other side the reason picks the class, so that an error
keeps its type over any number of hops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import any_pb2, message
from google.rpc import error_details_pb2, status_pb2

from stagemesh import errors
from stagemesh.errors import DOMAIN, InvalidRequest, MeshError, Overloaded, Retry

DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
TEXT_CHARACTERS_MAX = 512
"""Of a status message or one metadata value: status travels in HTTP/2 headers, which are small."""
FACTS_MAX = 16
"""Entries of ErrorInfo.metadata."""
RETRY_AFTER_S = 1.0
"""For errors that may be tried again later and do not say when."""
RETRY_AFTER_S_MAX = 3600.0

_CODES = {code.name: code for code in grpc.StatusCode}


@dataclass(frozen=True, slots=True)
class RichStatus:
    """What ``context.abort`` takes."""

    code: grpc.StatusCode
    message: str
    trailers: tuple[tuple[str, str | bytes], ...]


def _retry_after_s(error: MeshError) -> float | None:
    if isinstance(error, Overloaded):
        return error.retry_after_s
    return RETRY_AFTER_S if error.retry is Retry.LATER else None


def to_proto(error: MeshError) -> status_pb2.Status:
    """``google.rpc.Status`` of an error, as it also travels in ``Finish.error``."""
    facts = dict(list(error.metadata.items())[:FACTS_MAX])
    info = error_details_pb2.ErrorInfo(
        reason=error.reason,
        domain=DOMAIN,
        metadata={key: value[:TEXT_CHARACTERS_MAX] for key, value in facts.items()},
    )
    details: list[message.Message] = [info]
    after = _retry_after_s(error)
    if after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(int(after * 1000))
        details.append(retry)
    if isinstance(error, InvalidRequest):
        bad = error_details_pb2.BadRequest()
        bad.field_violations.add(
            field=error.metadata.get("field", ""),
            description=error.message[:TEXT_CHARACTERS_MAX],
            reason=error.reason,
        )
        details.append(bad)
    status = status_pb2.Status(
        code=_CODES[error.code].value[0], message=error.message[:TEXT_CHARACTERS_MAX]
    )
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def to_status(error: MeshError) -> RichStatus:
    """Code, message and trailers that tell a caller about ``error``."""
    proto = to_proto(error)
    trailers: list[tuple[str, str | bytes]] = [(DETAILS_KEY, proto.SerializeToString())]
    after = _retry_after_s(error)
    if after is not None:
        trailers.append((PUSHBACK_KEY, str(int(after * 1000))))
    return RichStatus(_CODES[error.code], proto.message, tuple(trailers))


_BY_CODE: dict[str, type[MeshError]] = {
    "CANCELLED": errors.Cancelled,
    "INVALID_ARGUMENT": errors.InvalidRequest,
    "DEADLINE_EXCEEDED": errors.DeadlineExceeded,
    "NOT_FOUND": errors.RequestUnknown,
    "ALREADY_EXISTS": errors.RequestConflict,
    "PERMISSION_DENIED": errors.AccessDenied,
    "UNAUTHENTICATED": errors.AccessDenied,
    "RESOURCE_EXHAUSTED": errors.Overloaded,
    "FAILED_PRECONDITION": errors.OrderError,
    "ABORTED": errors.OrderError,
    "UNAVAILABLE": errors.StageUnreachable,
    "DATA_LOSS": errors.FrameError,
}
"""For statuses that did not come from a mesh (a proxy, the transport, gRPC itself)."""


def from_proto(status: status_pb2.Status) -> MeshError:
    """The error a ``google.rpc.Status`` tells of; by code when its reason is not of this mesh."""
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    for detail in status.details:
        try:
            detail.Unpack(info)
            detail.Unpack(retry)
        except message.DecodeError:
            continue
    known = errors.by_reason()
    by_number = {code.value[0]: code.name for code in grpc.StatusCode}
    kind = _BY_CODE.get(by_number.get(status.code, "UNKNOWN"), MeshError)
    if info.domain == DOMAIN and info.reason in known:
        kind = known[info.reason]
    facts: dict[str, object] = {
        key: value
        for key, value in info.metadata.items()
        if key not in ("message", "retry_after_s")
    }
    text = status.message or kind.reason
    if issubclass(kind, Overloaded):
        delay = retry.retry_delay.ToMilliseconds() / 1000 or RETRY_AFTER_S
        return kind(text, retry_after_s=min(delay, RETRY_AFTER_S_MAX), **facts)
    return kind(text, **facts)


def to_mesh_error(error: grpc.RpcError) -> MeshError:
    """The typed error behind a failed call, rebuilt from its trailers, else from its status
    code.
    """
    code = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    text = error.details() if hasattr(error, "details") else str(error)
    trailers: Any = error.trailing_metadata() if hasattr(error, "trailing_metadata") else ()
    status = status_pb2.Status(code=code.value[0], message=text or "")
    for key, value in trailers or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                status = status_pb2.Status.FromString(value)
            except message.DecodeError:
                break
    return from_proto(status)
