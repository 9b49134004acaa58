"""What to do about a fault: one ordered ladder, and the budgets that keep it from becoming a storm.

    retransmit → rewind → replay → reroute → fail

*Retransmit* is done by the links themselves out of their ledgers; it is only counted here. The
other rungs are chosen per fault from ``LADDER``: the first rung of the fault's kind whose budget is
not spent. A request never steps down: what was tried on its present route is not tried there again.

Three budgets bound everything: per request and rung (``rewinds_per_route_max``,
``replays_per_route_max``, ``fruitless_recoveries_max``), per mesh (a token bucket, so that a mesh
that is falling apart fails its requests with a reason instead of replaying them for ever), and per
worker:

* the *breaker* keeps a worker that failed out of new routes for a while, doubling each time and
starting
  over after a quiet period. The first stay is short, so that a restarted stage heals the pipeline
  at once;
* a series of corruptions of one worker, not interrupted by enough clean steps, is *quarantine*: it
must
  reload its weights, verify and probe itself before it may serve again.

Pure: ``now`` comes in, nothing is remembered that a test cannot see.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from coordinator.session import Session
from coordinator.settings import MeshPolicy
from stagemesh.frame import RowStatus
from stagemesh.topology import WorkerName


class Rung(enum.Enum):
    """The ladder. Values are what every surface shows."""

    RETRANSMIT = "retransmit"
    REWIND = "rewind"
    REPLAY = "replay"
    REROUTE = "reroute"
    FAIL = "fail"


class FaultKind(enum.Enum):
    """What went wrong for a request, by what can help."""

    POSITION_MISMATCH = "position_mismatch"
    """A stage's cache is not as long as it should be."""
    CACHE_LOST = "cache_lost"
    CORRUPTION = "corruption"
    """A stage computed, sampled or labelled something wrong."""
    MISCOMPUTED = "miscomputed"
    """The full worker rejects a token: only another route can help."""
    COMPUTE_FAILED = "compute_failed"
    CACHE_EXHAUSTED = "cache_exhausted"
    ROUTE_LOST = "route_lost"
    REFUSED = "refused"
    """The stage says the request itself is at fault; trying again cannot help."""


LADDER: Mapping[FaultKind, tuple[Rung, ...]] = {
    FaultKind.POSITION_MISMATCH: (Rung.REWIND, Rung.REPLAY, Rung.REROUTE),
    FaultKind.CACHE_LOST: (Rung.REPLAY, Rung.REROUTE),
    FaultKind.CORRUPTION: (Rung.REPLAY, Rung.REROUTE),
    FaultKind.MISCOMPUTED: (Rung.REROUTE,),
    FaultKind.COMPUTE_FAILED: (Rung.REPLAY, Rung.REROUTE),
    FaultKind.CACHE_EXHAUSTED: (Rung.REROUTE,),
    FaultKind.ROUTE_LOST: (Rung.REROUTE,),
    FaultKind.REFUSED: (),
}
"""Rungs in order; behind the last stands FAIL."""

KIND_OF_STATUS: Mapping[RowStatus, FaultKind] = {
    RowStatus.POSITION_MISMATCH: FaultKind.POSITION_MISMATCH,
    RowStatus.CACHE_LOST: FaultKind.CACHE_LOST,
    RowStatus.CACHE_EXHAUSTED: FaultKind.CACHE_EXHAUSTED,
    RowStatus.NON_FINITE: FaultKind.CORRUPTION,
    RowStatus.OUT_OF_ENVELOPE: FaultKind.CORRUPTION,
    RowStatus.CORRUPTED: FaultKind.CORRUPTION,
    RowStatus.COMPUTE_FAILED: FaultKind.COMPUTE_FAILED,
    RowStatus.INVALID: FaultKind.REFUSED,
}

SUSPICIOUS = frozenset({FaultKind.CORRUPTION, FaultKind.COMPUTE_FAILED})
"""Faults that count against the worker they came from."""


@dataclass(frozen=True, slots=True)
class RequestFault:
    """One fault of one request. ``cause`` is a constant of the error tree or of RowStatus."""

    kind: FaultKind
    cause: str
    worker: str = ""
    detail: str = ""


@dataclass(slots=True)
class WorkerHistory:
    """What is held against a worker. ``held_until``: not on a new route before this."""

    failures: int = 0
    failed_at: float = 0.0
    held_until: float = 0.0
    corruptions: int = 0
    corrupted_at_step: int = 0
    corrupted_epoch: int = 0


@dataclass(slots=True)
class TokenBucket:
    """``capacity`` at once, ``rate_per_s`` in the long run."""

    capacity: float
    rate_per_s: float
    level: float
    at: float = 0.0

    def take(self, now: float) -> bool:
        """Use one token if there is one."""
        if now > self.at:
            self.level = min(self.capacity, self.level + (now - self.at) * self.rate_per_s)
            self.at = now
        if self.level < 1.0:
            return False
        self.level -= 1.0
        return True


@dataclass(slots=True)
class RecoveryManager:
    """See the module."""

    policy: MeshPolicy
    workers: dict[WorkerName, WorkerHistory] = field(default_factory=dict)
    rungs_used: dict[Rung, int] = field(default_factory=lambda: dict.fromkeys(Rung, 0))
    bucket: TokenBucket = field(init=False)

    def __post_init__(self) -> None:
        burst = float(self.policy.recoveries_burst_max)
        self.bucket = TokenBucket(burst, self.policy.recoveries_per_s, burst)

    def choose(self, session: Session, fault: RequestFault, now: float) -> Rung:
        """The rung to take for this fault; its budget is charged."""
        rung = self._first_affordable(session, fault)
        in_vain = session.fruitless_recoveries >= self.policy.fruitless_recoveries_max
        if in_vain or not self.bucket.take(now):
            rung = Rung.FAIL
        if rung is Rung.REWIND:
            session.rewinds_here += 1
        elif rung is Rung.REPLAY:
            session.replays_here += 1
        self.rungs_used[rung] += 1
        return rung

    def _first_affordable(self, session: Session, fault: RequestFault) -> Rung:
        for rung in LADDER[fault.kind]:
            if rung is Rung.REWIND and not self._may_rewind(session):
                continue
            if rung is Rung.REPLAY and session.replays_here >= self.policy.replays_per_route_max:
                continue
            return rung
        return Rung.FAIL

    def _may_rewind(self, session: Session) -> bool:
        """Only to a position some stage has confirmed, and not behind a replay on the same
        route."""
        return (
            session.stream.confirmed > 0
            and session.rewinds_here < self.policy.rewinds_per_route_max
            and session.replays_here == 0
        )

    # Workers

    def history(self, worker: WorkerName) -> WorkerHistory:
        """What is held against this worker (nothing, if it is new)."""
        return self.workers.setdefault(worker, WorkerHistory())

    def failed(self, worker: WorkerName, now: float) -> float:
        """The breaker opens; returns until when."""
        held = self.history(worker)
        if now - held.failed_at > self.policy.breaker_reset_s:
            held.failures = 0
        held.failures += 1
        held.failed_at = now
        stay_s = self.policy.breaker_base_s * 2.0 ** min(held.failures - 1, 30)
        held.held_until = now + min(stay_s, self.policy.breaker_max_s)
        return held.held_until

    def may_serve(self, worker: WorkerName, now: float) -> bool:
        """Whether the breaker lets this worker onto a new route."""
        held = self.workers.get(worker)
        return held is None or now >= held.held_until

    def corrupted(self, worker: WorkerName, epoch: int, step: int) -> bool:
        """Count a corruption of this worker at ``step``, once however many rows of it are wrong;
        True if it is one too many: quarantine it."""
        held = self.history(worker)
        if not held.corruptions or (held.corrupted_epoch, held.corrupted_at_step) != (epoch, step):
            clean_steps = step - held.corrupted_at_step if held.corrupted_epoch == epoch else step
            goes_on = clean_steps <= self.policy.corruption_window_steps
            held.corruptions = held.corruptions + 1 if goes_on else 1
        held.corrupted_epoch, held.corrupted_at_step = epoch, step
        return held.corruptions >= self.policy.corruptions_consecutive_max

    def cleared(self, worker: WorkerName) -> None:
        """It was reinitialised and has proved itself: its corruptions are forgotten."""
        self.history(worker).corruptions = 0

    def forget(self, worker: WorkerName) -> None:
        """Nobody of this name is expected back."""
        self.workers.pop(worker, None)

    def cost(self, now: float) -> dict[WorkerName, float]:
        """Penalty of each worker for route planning: its recent failures."""
        return {
            name: float(held.failures)
            for name, held in self.workers.items()
            if held.failures and now - held.failed_at <= self.policy.breaker_reset_s
        }
