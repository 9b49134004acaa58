"""The mesh at one moment, for operators: plain frozen data, no prompt and no text.

Built only when somebody asks, so it may look at everything.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.barrier import BarrierOutcome
from coordinator.instructions import RecoveryRecord, RequestSummary
from coordinator.mesh_state import MeshState
from coordinator.session import Session, SessionPhase
from stagemesh.topology import WorkerInfo


@dataclass(frozen=True, slots=True)
class WorkerView:
    """``state``: a value of WorkerState. ``stage_index``: -1 if on no route."""

    info: WorkerInfo
    state: str
    stage_index: int
    epoch: int
    in_flight: int
    kv_tokens: int
    idle_s: float
    evidence: str
    counters: dict[str, int]


@dataclass(frozen=True, slots=True)
class RouteView:
    """``phase``: a value of RoutePhase. ``proved_s_ago``: since a step last came back whole."""

    epoch: int
    workers: tuple[str, ...]
    phase: str
    step: int
    in_flight: int
    requests: int
    full_worker: bool
    proved_s_ago: float


@dataclass(frozen=True, slots=True)
class GenerationView:
    """One request. ``age_s``: since it came in; ``ended_s_ago``: None while it lives."""

    request: bytes
    phase: str
    prompt_tokens: int
    completion_tokens: int
    verified_through: int
    epoch: int
    route: tuple[str, ...]
    recoveries: tuple[RecoveryRecord, ...]
    age_s: float
    ended_s_ago: float | None
    traceparent: str
    error_reason: str
    summary: RequestSummary
    is_verifying: bool = False
    """Every token is to be confirmed by a full worker."""


@dataclass(frozen=True, slots=True)
class MeshSnapshot:
    """Everything admin calls show. ``generations``: newest first, live and recently ended."""

    workers: tuple[WorkerView, ...]
    routes: tuple[RouteView, ...]
    generations: tuple[GenerationView, ...]
    barriers: tuple[BarrierOutcome, ...]
    counters: dict[str, int]
    running: int
    queued: int
    displaced: int
    finished: int
    failed: int
    ready: bool
    not_ready_reason: str
    next_epoch: int
    draining: bool


def take_snapshot(
    state: MeshState, now: float, *, finished: int, failed: int, running: int, not_ready_reason: str
) -> MeshSnapshot:
    """Look at everything once."""
    sessions = [*state.ended.values(), *state.sessions.values()]
    sessions.sort(key=lambda session: session.arrived_at, reverse=True)
    return MeshSnapshot(
        workers=tuple(_workers(state, now)),
        routes=tuple(_routes(state, now)),
        generations=tuple(_generation(session, now) for session in sessions),
        barriers=tuple(state.barriers.outcomes()),
        counters=dict(state.counters),
        running=running,
        queued=len(state.queue),
        displaced=len(state.fallback.displaced),
        finished=finished,
        failed=failed,
        ready=not not_ready_reason,
        not_ready_reason=not_ready_reason,
        next_epoch=state.next_epoch,
        draining=state.is_draining,
    )


def _workers(state: MeshState, now: float) -> list[WorkerView]:
    views = []
    for record in state.workers.values():
        live = state.route_of(record)
        progress = record.progress
        views.append(
            WorkerView(
                info=record.info,
                state=record.state.value,
                stage_index=live.route.names.index(record.name) if live else -1,
                epoch=record.epoch,
                in_flight=live.scheduler.steps.in_flight if live else 0,
                kv_tokens=progress.kv_tokens if progress else 0,
                idle_s=now - record.heard_at,
                evidence=record.evidence,
                counters=dict(progress.counters) if progress else {},
            )
        )
    return views


def _routes(state: MeshState, now: float) -> list[RouteView]:
    return [
        RouteView(
            epoch=live.epoch,
            workers=live.route.names,
            phase=live.phase.value,
            step=live.scheduler.steps.next_step - 1,
            in_flight=live.scheduler.steps.in_flight,
            requests=len(live.scheduler.sessions),
            full_worker=live.is_full,
            proved_s_ago=now - max(live.scheduler.steps.last_returned_at, live.began_at),
        )
        for live in state.routes.values()
    ]


def _generation(session: Session, now: float) -> GenerationView:
    ended = session.ended_at
    summary = session.summary(ended if ended is not None else now)
    return GenerationView(
        request=session.request,
        phase=session.phase.value,
        prompt_tokens=session.prompt_length,
        completion_tokens=session.accepted_count,
        verified_through=session.verified_through,
        epoch=session.epoch,
        route=session.route,
        recoveries=summary.recoveries,
        age_s=now - session.arrived_at,
        ended_s_ago=None if ended is None else now - ended,
        traceparent=session.demand.traceparent,
        error_reason=session.error_reason if session.phase is SessionPhase.FAILED else "",
        summary=summary,
        is_verifying=session.is_verifying,
    )
