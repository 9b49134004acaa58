"""How a request ends: once, and with one terminal instruction.

``finish`` and ``fail`` are the only ways to an end. Both take the request out of every line and
route, free what it holds, and tell its client; what has ended is kept for those who ask again.

An end may turn out never to have reached its client (``withdraw``): it is then a failure, and
counted and shown as what its client was told.
"""

from __future__ import annotations

from coordinator.instructions import FailRequest, FinishRequest, RequestSummary
from coordinator.mesh_state import GENERATION, MeshState
from coordinator.session import Session, SessionPhase
from coordinator.shadow_book import ShadowBook
from stagemesh.errors import MeshError


class Endings:
    """See the module. ``finished`` counts complete answers, not cancelled ones."""

    def __init__(self, state: MeshState, shadows: ShadowBook) -> None:
        self.state, self._shadows = state, shadows
        self.finished = 0
        self.failed = 0

    def finish(self, session: Session, reason: str, now: float) -> None:
        """The answer is complete, or its client does not want it any more."""
        was_cancelled = reason == "cancelled"
        phase = SessionPhase.CANCELLED if was_cancelled else SessionPhase.FINISHED
        summary = session.summary(now)
        self._end(session, phase, now)
        self.finished += not was_cancelled
        self.state.emit(FinishRequest(session.request, reason, summary))
        self.state.publish(
            GENERATION,
            "GenerationFinished",
            request=session.request,
            reason=reason,
            completion_tokens=summary.completion_tokens,
            recoveries=len(summary.recoveries),
            total_s=f"{summary.total_s:.4f}",
            chain=summary.chain.hex(),
        )

    def fail(self, session: Session, error: MeshError, now: float) -> None:
        """It cannot go on."""
        error.metadata.setdefault("position", str(session.delivered))
        session.error_reason = error.reason
        summary = session.summary(now)
        self._end(session, SessionPhase.FAILED, now)
        self.state.emit(FailRequest(session.request, error, summary))
        self._failed(session, error, summary)

    def withdraw(self, session: Session, error: MeshError, now: float) -> None:
        """Its end never reached its client; who could not keep it tells the client."""
        self.finished -= session.phase is SessionPhase.FINISHED
        session.phase, session.error_reason = SessionPhase.FAILED, error.reason
        self._failed(session, error, session.summary(now))

    def _failed(self, session: Session, error: MeshError, summary: RequestSummary) -> None:
        self.failed += 1
        self.state.publish(
            GENERATION,
            "GenerationFailed",
            request=session.request,
            reason=error.reason,
            detail=error.message,
            completion_tokens=summary.completion_tokens,
        )

    def _end(self, session: Session, phase: SessionPhase, now: float) -> None:
        """Take a request out of everything. The only way to an end."""
        state = self.state
        live = state.routes.get(session.epoch) if session.epoch else None
        if live is not None:
            live.scheduler.remove(session)
            state.work_changed.add(live.epoch)
        elif session.request in state.settling:
            del state.settling[session.request]
        elif session in state.queue:
            state.queue.remove(session)
        elif session in state.fallback.displaced:
            state.fallback.displaced.remove(session)
        session.phase, session.ended_at = phase, now
        self._shadows.ended(session, completed=phase is SessionPhase.FINISHED)
        del state.sessions[session.request]
        state.ended.pop(session.request, None)
        state.ended[session.request] = session
        while len(state.ended) > state.policy.generations_kept_max:
            del state.ended[next(iter(state.ended))]
        state.placement_changed = True
