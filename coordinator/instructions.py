"""Everything the decisions can ask the shell to do, as data. Performed in order; results return as
events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from stagemesh.errors import MeshError
from stagemesh.frame import StepFrame
from stagemesh.token import TokenChunk
from stagemesh.topology import Route, WorkerInfo, WorkerName


@dataclass(frozen=True, slots=True)
class Instruction:
    """Base of all instructions."""


@dataclass(frozen=True, slots=True)
class OpenRoute(Instruction):
    """Tell every worker of ``route`` its place; each arrives at barrier ``open-route`` (or
    refuses)."""

    route: Route
    generation: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class OpenLink(Instruction):
    """Dial stage 0 of a route whose barrier is complete."""

    route: Route


@dataclass(frozen=True, slots=True)
class CloseLink(Instruction):
    """Forget the coordinator's link and receiver of an epoch."""

    epoch: int


@dataclass(frozen=True, slots=True)
class FenceEpoch(Instruction):
    """Tell these workers to refuse this epoch and everything older, and to free its caches."""

    workers: tuple[WorkerName, ...]
    epoch: int


@dataclass(frozen=True, slots=True)
class SendStep(Instruction):
    """Put a (not yet sealed) frame on the route's first hop."""

    frame: StepFrame


@dataclass(frozen=True, slots=True)
class AcceptTokens(Instruction):
    """Commit, then emit. ``first_index`` is the answer index of the first chunk; chunks are
    consecutive."""

    request: bytes
    first_index: int
    chunks: tuple[TokenChunk, ...]
    verified_through: int = 0


@dataclass(frozen=True, slots=True)
class AdvanceVerified(Instruction):
    """The verified watermark of a request moved: its first ``verified_through`` answer tokens are
    confirmed."""

    request: bytes
    verified_through: int


@dataclass(frozen=True, slots=True)
class CorrectTokens(Instruction):
    """Withdraw answer tokens from ``from_index`` on; replacements follow in AcceptTokens."""

    request: bytes
    from_index: int
    reason: str


@dataclass(frozen=True, slots=True)
class RecoveryRecord:
    """One recovery as every surface reports it. ``seconds`` is None until the next token is
    accepted."""

    cause: str
    action: str
    worker: str
    from_route: tuple[WorkerName, ...]
    to_route: tuple[WorkerName, ...]
    epoch: int
    kept: int
    replayed: int
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class RecoveryEnded(Instruction):
    """A recovery of a running request is over, or was overtaken by another. The journal keeps it
    for the summary of an end that a later coordinator may come to; a client hears of it there."""

    request: bytes
    record: RecoveryRecord


@dataclass(frozen=True, slots=True)
class RequestSummary:
    """How a request was made. ``weights``: the ``ModelIdentity.label`` of what it was placed on.
    ``tokens_before``: answer tokens that an earlier life of it had made; the times are this one's.
    """

    prompt_tokens: int
    completion_tokens: int
    route: tuple[WorkerName, ...] = ()
    recoveries: tuple[RecoveryRecord, ...] = ()
    queue_s: float = 0.0
    time_to_first_token_s: float = 0.0
    total_s: float = 0.0
    chain: bytes = b""
    matched_stop: str = ""
    checks: dict[str, int] = field(default_factory=dict)
    weights: str = ""
    tokens_before: int = 0


@dataclass(frozen=True, slots=True)
class FinishRequest(Instruction):
    """Exactly one terminal instruction per request: this or FailRequest. reason:
    stop|length|cancelled."""

    request: bytes
    reason: str
    summary: RequestSummary


@dataclass(frozen=True, slots=True)
class FailRequest(Instruction):
    """The request cannot go on; ``summary.completion_tokens`` is where a client may resume."""

    request: bytes
    error: MeshError
    summary: RequestSummary


@dataclass(frozen=True, slots=True)
class DrainWorker(Instruction):
    """Tell a worker to leave once its work has moved. It arrives at barrier ``drain`` (epoch,
    generation) with empty hands, and goes when that is complete."""

    worker: WorkerName
    timeout_s: float
    epoch: int = 0
    generation: int = 0


@dataclass(frozen=True, slots=True)
class ReinitialiseWorker(Instruction):
    """Tell a quarantined worker to reload, verify and probe itself."""

    worker: WorkerName
    reason: str
    command_id: str


@dataclass(frozen=True, slots=True)
class AnnounceBarrier(Instruction):
    """Tell participants how a barrier ended."""

    name: str
    epoch: int
    generation: int
    participants: tuple[WorkerName, ...]
    complete: bool
    absent: tuple[WorkerName, ...] = ()


@dataclass(frozen=True, slots=True)
class PublishEvent(Instruction):
    """Put a fact on a topic: membership, generation, integrity, recovery, barrier, diagnostics."""

    topic: str
    type: str
    request: bytes = b""
    worker: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WakeAt(Instruction):
    """Feed TimePassed no later than ``when``."""

    when: float


@dataclass(frozen=True, slots=True)
class MeetWorker(Instruction):
    """A worker was admitted to the mesh (``admitted``) or turned away with ``reason``."""

    worker: WorkerInfo
    admitted: bool
    reason: str = ""
