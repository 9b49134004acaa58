"""Every error the mesh raises on purpose, in one tree.

    MeshError
    ├─ FrameError                 a hop delivered something that is not the frame that was sent
    │  ├─ FrameCorrupted          header or payload checksum does not match
    │  ├─ FrameTooLarge           over a named limit, refused before allocation
    │  ├─ FrameMalformed          shape, dtype, length or a field's range is wrong
    │  └─ NonFiniteActivation     NaN or infinity in an activation
    ├─ OrderError                 a true frame at the wrong time or place
    │  ├─ SequenceGap             a step was skipped
    │  ├─ DuplicateFrame          a step seen before
    │  ├─ EpochFenced             of an older route
    │  ├─ EpochNotOpen            of a route that is not (yet) open here
    │  ├─ HopMismatch             on a link between other stages
    │  ├─ FingerprintMismatch     from another mesh or other weights
    │  └─ PositionMismatch        the cache is not as long as the frame says
    ├─ TokenRejected              a token chunk's checksum, chain or marks do not verify
    ├─ StageError                 a worker cannot do its part
    │  ├─ StageUnreachable        process or connection gone, or silent past its deadline
    │  ├─ StageDraining           leaving on purpose
    │  ├─ CacheLost               the KV cache of a request is not there any more
    │  ├─ CacheExhausted          no KV memory left for this request
    │  └─ ComputeFailed           the forward pass raised
    ├─ BarrierBroken              a rendezvous ended without every participant
    ├─ RouteUnavailable           no set of workers can serve this request now
    ├─ RouteRefused               workers disagree on weights, cover or probe
    ├─ VerificationUnavailable    delivery was to wait for verification, and nothing can verify
    ├─ RequestError               the caller's fault
    │  ├─ InvalidRequest          a parameter is wrong
    │  ├─ ContextExceeded         prompt (plus answer) longer than the model's context
    │  ├─ ModelUnknown            no such model in this mesh
    │  ├─ RequestUnknown          no such request id
    │  ├─ WorkerUnknown           no worker of that name
    │  ├─ RequestConflict         the id is taken by a different request
    │  └─ AccessDenied            the caller's role may not make this call
    ├─ Overloaded                 a queue or budget is full; try again later
    ├─ DeadlineExceeded           the request's own deadline passed
    ├─ Cancelled                  the client asked, or went away
    ├─ JournalError               the journal cannot be written, or does not verify
    ├─ ModelError                 a model cannot be served
    │  ├─ ModelNotFound           source does not exist or cannot be reached
    │  ├─ ModelDamaged            a file is truncated or does not match its digest
    │  └─ ModelRefused            cannot be split (or hosted) safely; says why
    └─ InvalidConfiguration       a setting is unknown, unparsable or contradictory

Class attributes follow h2's example: ``code`` is the canonical gRPC status *name* (a plain string,
so that this room stays free of grpc), ``reason`` the constant for ``google.rpc.ErrorInfo``,
``retry`` what a caller may do, ``fault`` whose mistake it was (h11's Local/Remote). Instances carry
``metadata``, small strings that name hop, worker, request and position.
"""

from __future__ import annotations

import enum

DOMAIN = "stagemesh"
"""``ErrorInfo.domain`` of every error below."""


class Retry(enum.Enum):
    """What may be tried again after an error."""

    NEVER = "never"
    SAME_STAGE = "same_stage"
    NEW_ROUTE = "new_route"
    LATER = "later"


class Fault(enum.Enum):
    """Whose mistake it was."""

    LOCAL = "local"
    REMOTE = "remote"
    CALLER = "caller"


class MeshError(Exception):
    """Root of the tree; ``metadata`` values are strings safe to show to a client."""

    code = "INTERNAL"
    reason = "INTERNAL"
    retry = Retry.NEVER
    fault = Fault.LOCAL

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = {key: str(value) for key, value in metadata.items() if value is not None}

    @property
    def is_resumable(self) -> bool:
        """Whether a generation that ended with it may be gone on with: it was not the caller's
        doing."""
        return self.fault is not Fault.CALLER

    def __str__(self) -> str:
        if not self.metadata:
            return self.message
        facts = " ".join(f"{key}={value}" for key, value in sorted(self.metadata.items()))
        return f"{self.message} [{facts}]"


class FrameError(MeshError):
    code, reason, retry, fault = "DATA_LOSS", "FRAME_ERROR", Retry.SAME_STAGE, Fault.REMOTE


class FrameCorrupted(FrameError):
    reason = "CHECKSUM_MISMATCH"


class FrameTooLarge(FrameError):
    code, reason, retry = "RESOURCE_EXHAUSTED", "FRAME_TOO_LARGE", Retry.NEVER


class FrameMalformed(FrameError):
    code, reason = "INVALID_ARGUMENT", "FRAME_MALFORMED"


class NonFiniteActivation(FrameError):
    reason, retry = "NON_FINITE_ACTIVATION", Retry.NEW_ROUTE


class OrderError(MeshError):
    code, reason, retry, fault = (
        "FAILED_PRECONDITION",
        "ORDER_ERROR",
        Retry.SAME_STAGE,
        Fault.REMOTE,
    )


class SequenceGap(OrderError):
    reason = "SEQUENCE_GAP"


class DuplicateFrame(OrderError):
    code, reason, retry = "ALREADY_EXISTS", "DUPLICATE_FRAME", Retry.NEVER


class EpochFenced(OrderError):
    code, reason, retry = "ABORTED", "EPOCH_FENCED", Retry.NEVER


class EpochNotOpen(OrderError):
    reason = "EPOCH_NOT_OPEN"


class HopMismatch(OrderError):
    reason = "HOP_MISMATCH"


class FingerprintMismatch(OrderError):
    reason, retry = "FINGERPRINT_MISMATCH", Retry.NEVER


class PositionMismatch(OrderError):
    reason, retry = "POSITION_MISMATCH", Retry.NEW_ROUTE


class TokenRejected(MeshError):
    """``findings`` (of ``coordinator.token_validator``) say what is wrong and where, worst
    first."""

    code, reason, retry, fault = "DATA_LOSS", "TOKEN_REJECTED", Retry.NEW_ROUTE, Fault.REMOTE

    def __init__(
        self, message: str, *, findings: tuple[object, ...] = (), **metadata: object
    ) -> None:
        super().__init__(message, **metadata)
        self.findings = findings


class StageError(MeshError):
    code, reason, retry, fault = "UNAVAILABLE", "STAGE_ERROR", Retry.NEW_ROUTE, Fault.REMOTE


class StageUnreachable(StageError):
    reason = "STAGE_UNREACHABLE"


class StageDraining(StageError):
    reason = "STAGE_DRAINING"


class CacheLost(StageError):
    reason = "CACHE_LOST"


class CacheExhausted(StageError):
    code, reason, retry = "RESOURCE_EXHAUSTED", "CACHE_EXHAUSTED", Retry.LATER


class ComputeFailed(StageError):
    code, reason = "INTERNAL", "COMPUTE_FAILED"


class BarrierBroken(MeshError):
    code, reason, retry, fault = "ABORTED", "BARRIER_BROKEN", Retry.NEW_ROUTE, Fault.REMOTE


class RouteUnavailable(MeshError):
    code, reason, retry = "UNAVAILABLE", "ROUTE_UNAVAILABLE", Retry.LATER


class RouteRefused(MeshError):
    code, reason, retry, fault = "FAILED_PRECONDITION", "ROUTE_REFUSED", Retry.NEVER, Fault.REMOTE


class VerificationUnavailable(MeshError):
    """The answer may be delivered only when verified, and nothing can verify it."""

    code, reason, retry = "UNAVAILABLE", "VERIFICATION_UNAVAILABLE", Retry.LATER


class RequestError(MeshError):
    code, reason, fault = "INVALID_ARGUMENT", "REQUEST_ERROR", Fault.CALLER


class InvalidRequest(RequestError):
    """``metadata['field']`` names the offending parameter."""

    reason = "INVALID_REQUEST"


class ContextExceeded(RequestError):
    reason = "CONTEXT_EXCEEDED"


class ModelUnknown(RequestError):
    code, reason = "NOT_FOUND", "MODEL_UNKNOWN"


class RequestUnknown(RequestError):
    code, reason = "NOT_FOUND", "REQUEST_UNKNOWN"


class WorkerUnknown(RequestError):
    code, reason = "NOT_FOUND", "WORKER_UNKNOWN"


class RequestConflict(RequestError):
    code, reason = "ALREADY_EXISTS", "REQUEST_CONFLICT"


class AccessDenied(RequestError):
    code, reason = "PERMISSION_DENIED", "ACCESS_DENIED"


class Overloaded(MeshError):
    """``retry_after_s`` becomes ``google.rpc.RetryInfo``."""

    code, reason, retry = "RESOURCE_EXHAUSTED", "OVERLOADED", Retry.LATER

    def __init__(self, message: str, *, retry_after_s: float = 1.0, **metadata: object) -> None:
        super().__init__(message, **metadata)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(MeshError):
    code, reason, fault = "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", Fault.CALLER


class Cancelled(MeshError):
    code, reason, fault = "CANCELLED", "CANCELLED", Fault.CALLER


class JournalError(MeshError):
    code, reason = "DATA_LOSS", "JOURNAL_ERROR"


class ModelError(MeshError):
    code, reason, fault = "FAILED_PRECONDITION", "MODEL_ERROR", Fault.CALLER


class ModelNotFound(ModelError):
    code, reason = "NOT_FOUND", "MODEL_NOT_FOUND"


class ModelDamaged(ModelError):
    code, reason = "DATA_LOSS", "MODEL_DAMAGED"


class ModelRefused(ModelError):
    reason = "MODEL_REFUSED"


class InvalidConfiguration(MeshError):
    """``metadata['setting']`` names the offending key."""

    code, reason, fault = "INVALID_ARGUMENT", "INVALID_CONFIGURATION", Fault.CALLER


def by_reason() -> dict[str, type[MeshError]]:
    """Every error class keyed by its ``reason``, for rebuilding an error that crossed a wire."""
    found: dict[str, type[MeshError]] = {}
    pending: list[type[MeshError]] = [MeshError]
    while pending:
        kind = pending.pop()
        found[kind.reason] = kind
        pending.extend(kind.__subclasses__())
    return found
