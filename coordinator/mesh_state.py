"""What the parts of the mesh machine share: who is there, what runs, and the instructions of this
event.

``MeshState`` has no rules. ``Membership``, ``RouteBook`` and ``RequestDesk`` each own one kind of
record in it and its rules; ``Mesh`` (in ``core``) calls them in order. ``out`` is emptied at the
beginning of each event and returned at its end.
"""

from __future__ import annotations

import enum
import heapq
from collections import Counter, deque
from dataclasses import dataclass, field

from coordinator.barrier import Barrier, BarrierState
from coordinator.barrier_book import BarrierBook
from coordinator.events import WorkerProgressed
from coordinator.failure_detector import FailureDetector
from coordinator.fallback import FallbackCoordinator
from coordinator.instructions import Instruction, PublishEvent
from coordinator.recovery import RecoveryManager
from coordinator.route import LiveRoute
from coordinator.session import Session
from coordinator.settings import ROUNDING, MeshPolicy
from coordinator.token_facts import TokenFacts
from stagemesh.guards import Counters
from stagemesh.token import TokenChunk
from stagemesh.topology import EXACT, WorkerInfo, WorkerName

MEMBERSHIP, GENERATION, INTEGRITY, RECOVERY, BARRIER, DIAGNOSTICS = (
    "membership",
    "generation",
    "integrity",
    "recovery",
    "barrier",
    "diagnostics",
)
"""Topics."""

_BARRIER_EVENTS = {
    BarrierState.FORMING: "BarrierFormed",
    BarrierState.COMPLETE: "BarrierCompleted",
    BarrierState.BROKEN: "BarrierBroken",
}


class WorkerState(enum.Enum):
    """What the coordinator thinks of a worker."""

    JOINING = "joining"
    """Registered, back or reloaded; has not served on a verified route since. May be planned onto
    one."""
    READY = "ready"
    SUSPECT = "suspect"
    FAILED = "failed"
    """Gone or silent; comes back by registering, or by reporting again."""
    QUARANTINED = "quarantined"
    DRAINING = "draining"


@dataclass(slots=True)
class WorkerRecord:
    """One worker name. ``epoch`` is the route it is on, 0 if none."""

    info: WorkerInfo
    joined_at: float
    state: WorkerState = WorkerState.JOINING
    epoch: int = 0
    connected: bool = True
    """Its control stream is up, as far as is known."""
    evidence: str = ""
    has_served: bool = False
    """A route of it has been open since it last was JOINING: what it is when no longer suspect."""
    progress: WorkerProgressed | None = None
    heard_at: float = 0.0
    drain_deadline: float | None = None
    left: bool = False
    """Drained: it was told to leave and must not be planned again."""
    distrusted: str = ""
    """Why it must reload before it may serve; being away for a while does not change that."""
    command_id: str = ""
    command_deadline: float = 0.0
    reinitialisations: int = 0

    @property
    def name(self) -> WorkerName:
        return self.info.name

    @property
    def may_be_planned(self) -> bool:
        return self.connected and self.state in (WorkerState.JOINING, WorkerState.READY)


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What every worker of the mesh must agree on."""

    fingerprint: str
    dtype: str
    layer_count: int

    @property
    def label(self) -> str:
        """What tells whether two meshes make the same tokens."""
        return f"{self.fingerprint}:{self.dtype}"

    @classmethod
    def of(cls, info: WorkerInfo) -> ModelIdentity:
        return cls(info.fingerprint, info.dtype, info.layer_count)


@dataclass(slots=True)
class MeshState:
    """See the module. ``sessions`` holds live requests only; ``ended`` the most recent others."""

    policy: MeshPolicy
    next_epoch: int = 1
    workers: dict[WorkerName, WorkerRecord] = field(default_factory=dict)
    routes: dict[int, LiveRoute] = field(default_factory=dict)
    sessions: dict[bytes, Session] = field(default_factory=dict)
    queue: deque[Session] = field(default_factory=deque)
    settling: dict[bytes, Session] = field(default_factory=dict)
    """Live requests whose answer is complete and waits to be verified."""
    ended: dict[bytes, Session] = field(default_factory=dict)
    model: ModelIdentity | None = None
    first_worker_at: float | None = None
    """When the first worker of all registered."""
    had_pipeline: bool = False
    """Whether one was ever open."""
    counters: Counters = field(default_factory=Counters)
    out: list[Instruction] = field(default_factory=list)
    is_draining: bool = False
    work_changed: set[int] = field(default_factory=set)
    """Epochs of routes whose scheduler may have steps to send."""
    placement_changed: bool = False
    """Waiting requests may find a route now."""
    plan_changed: bool = False
    """Free workers may form a route now."""
    timers: list[float] = field(default_factory=list)
    barriers: BarrierBook = field(init=False)
    detector: FailureDetector = field(init=False)
    recovery: RecoveryManager = field(init=False)
    fallback: FallbackCoordinator = field(init=False)

    def __post_init__(self) -> None:
        self.barriers = BarrierBook(counters=self.counters)
        self.detector = FailureDetector(self.policy.detector, counters=self.counters)
        self.recovery = RecoveryManager(self.policy)
        self.fallback = FallbackCoordinator(self.policy)

    def emit(self, instruction: Instruction) -> None:
        self.out.append(instruction)

    def publish(
        self, topic: str, kind: str, /, *, request: bytes = b"", worker: str = "", **facts: object
    ) -> None:
        """Put a fact on a topic; ``facts`` become its attributes."""
        attributes = {name: str(value) for name, value in facts.items()}
        self.out.append(PublishEvent(topic, kind, request, worker, attributes))

    def publish_token(
        self, topic: str, kind: str, chunk: TokenChunk, *, index: int, verified_through: int
    ) -> None:
        """``publish`` for the one event per token."""
        facts = TokenFacts(chunk, index, verified_through)
        self.out.append(PublishEvent(topic, kind, chunk.request, chunk.source, facts))

    def publish_barrier(self, barrier: Barrier, *, request: bytes = b"") -> None:
        """Put how a barrier stands (formed, completed, broken) on its topic."""
        outcome = barrier.outcome()
        self.publish(
            BARRIER,
            _BARRIER_EVENTS[outcome.state],
            request=request,
            worker=outcome.culprits[0] if outcome.culprits else "",
            name=outcome.name,
            epoch=outcome.epoch,
            generation=outcome.generation,
            participants=" ".join(outcome.participants),
            absent=" ".join(outcome.absent),
            cause=outcome.cause.value if outcome.cause and not outcome.complete else "",
            detail=outcome.detail,
        )

    def count(self, name: str, by: int = 1) -> None:
        self.counters.count(name, by)

    def wake(self, when: float) -> None:
        """Something must be looked at by then."""
        heapq.heappush(self.timers, when)

    def let_sleep(self, gone: Counter[float]) -> None:
        """Nothing is to be looked at any more at these times, each as often as it was asked for."""
        kept = []
        for when in self.timers:
            if gone[when] > 0:
                gone[when] -= 1
            else:
                kept.append(when)
        heapq.heapify(kept)
        self.timers = kept

    def route_of(self, record: WorkerRecord) -> LiveRoute | None:
        return self.routes.get(record.epoch) if record.epoch else None

    @property
    def has_stages(self) -> bool:
        """Whether the mesh has (or had) workers that host less than the whole model."""
        return any(not record.info.is_full for record in self.workers.values())

    @property
    def is_exact(self) -> bool:
        """Whether every worker of the mesh has bit-exact kernels. All of them: an answer may have
        come over any."""
        return all(EXACT in record.info.capabilities for record in self.workers.values())

    @property
    def rounding(self) -> float:
        """By how much tolerances in logits widen: for the worker with the shortest numbers."""
        dtypes = {record.info.dtype for record in self.workers.values()}
        return max((ROUNDING.get(dtype, 1.0) for dtype in dtypes), default=1.0)
