"""Everything that may happen to the mesh, as data. ``Mesh.handle(event, now)`` is the only door.

Requests are 16-byte keys (UUIDs). ``position`` in this room is absolute (0 = first prompt token);
the edge converts to answer indices. Times are seconds on one monotonic clock, passed as ``now``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from coordinator.instructions import RecoveryRecord
from stagemesh.errors import MeshError
from stagemesh.frame import StepFrame
from stagemesh.sampling import SamplingSpec
from stagemesh.topology import WorkerInfo, WorkerName


class Verification(enum.IntEnum):
    """How much is checked beyond what is always on (see docs/architecture.md)."""

    TRANSPORT = 1
    NUMERIC = 2
    SHADOW = 3


class Delivery(enum.Enum):
    """IMMEDIATE streams accepted tokens; VERIFIED holds them behind the verified watermark."""

    IMMEDIATE = "immediate"
    VERIFIED = "verified"


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events."""


@dataclass(frozen=True, slots=True)
class GenerationRequested(Event):
    """A validated request. What was admitted before is ``recovered``: its ``accepted`` tokens
    stand, and it goes on only with the weights that made them (``fingerprint``, a
    ``ModelIdentity.label``). A journal brings it back after a restart, or its client because it had
    failed (``resumed_after``, the reason) with these ``recoveries`` behind it; the first
    ``verified`` tokens were confirmed. ``context`` is the edge's own, kept with the request and
    never looked into here."""

    request: bytes
    prompt: tuple[int, ...]
    sampling: SamplingSpec
    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    deadline: float | None = None
    verification: Verification = Verification.NUMERIC
    delivery: Delivery = Delivery.IMMEDIATE
    traceparent: str = ""
    accepted: tuple[int, ...] = ()
    recovered: bool = False
    fingerprint: str = ""
    context: bytes = b""
    resumed_after: str = ""
    recoveries: tuple[RecoveryRecord, ...] = ()
    verified: int = 0


@dataclass(frozen=True, slots=True)
class CancelRequested(Event):
    """The client asked, or went away."""

    request: bytes
    reason: str = "client"


@dataclass(frozen=True, slots=True)
class RequestFailed(Event):
    """Something outside the mesh (the journal) cannot serve the request any further."""

    request: bytes
    error: MeshError


@dataclass(frozen=True, slots=True)
class StopMatched(Event):
    """The edge found a stop string: the answer ends with its first ``kept`` tokens. ``chain``: the
    link of the last of them, by which tokens that have been withdrawn since are known."""

    request: bytes
    kept: int
    matched: str
    chain: bytes = b""


@dataclass(frozen=True, slots=True)
class WorkerRegistered(Event):
    """A worker dialled in (again, if the name is known: then its instance decides)."""

    worker: WorkerInfo


@dataclass(frozen=True, slots=True)
class WorkerLost(Event):
    """Its control stream ended, or its process is known to be gone."""

    worker: WorkerName
    instance: str
    reason: str


@dataclass(frozen=True, slots=True)
class WorkerProgressed(Event):
    """Numbers from a worker's compute loop. ``starved_s``: how long the want of a core has held it
    up since its process began, seconds."""

    worker: WorkerName
    instance: str
    epoch: int
    accepted_step: int
    computed_step: int
    acknowledged_step: int
    queued: int
    kv_tokens: int
    computing_step: int
    computing_s: float
    starved_s: float = 0.0
    counters: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BarrierArrived(Event):
    """A worker is at a barrier, or says why it never will be (``refusal``)."""

    worker: WorkerName
    name: str
    epoch: int
    generation: int
    facts: dict[str, str] = field(default_factory=dict)
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class LinkOpened(Event):
    """The coordinator's own link to stage 0 of a route is up."""

    epoch: int


@dataclass(frozen=True, slots=True)
class LinkBroken(Event):
    """The coordinator's own link to stage 0 gave up (its retry budget is spent)."""

    epoch: int
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class HopFaultSeen(Event):
    """A worker, or the coordinator's own receiver, saw a fault on a hop (stage indices; -1
    coordinator)."""

    worker: WorkerName
    epoch: int
    step: int
    hop_from: int
    hop_to: int
    reason: str
    detail: str = ""
    fatal: bool = False


@dataclass(frozen=True, slots=True)
class FrameReturned(Event):
    """The last stage's answer to a step; transport checks have passed."""

    frame: StepFrame


@dataclass(frozen=True, slots=True)
class CommandFinished(Event):
    """A worker carried out (or refused) a command."""

    worker: WorkerName
    command_id: str
    ok: bool
    detail: str = ""
    info: WorkerInfo | None = None


@dataclass(frozen=True, slots=True)
class DrainRequested(Event):
    """An operator wants a worker out of service."""

    worker: WorkerName
    timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class DrainAllRequested(Event):
    """The coordinator is stopping: admit nothing, finish what is running."""

    timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class TimePassed(Event):
    """A wake-up that an instruction asked for, or a regular tick."""
