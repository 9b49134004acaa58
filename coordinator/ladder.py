"""The ladder of recovery, taken for one request: what the chosen rung does to it, and its record.

``RecoveryManager`` chooses a rung; here the request is rewound or restarted on its route, put into
the line for another one, or failed. Every recovery has a record from the first sign of trouble to
the next accepted token, and both ends are published.
"""

from __future__ import annotations

from coordinator.endings import Endings
from coordinator.instructions import RecoveryEnded, RecoveryRecord
from coordinator.membership import Loss
from coordinator.mesh_state import RECOVERY, MeshState
from coordinator.recovery import SUSPICIOUS, FaultKind, RequestFault, Rung
from coordinator.route import LiveRoute
from coordinator.session import PendingRecovery, Session
from stagemesh import errors
from stagemesh.errors import MeshError

_ERRORS: dict[FaultKind, type[MeshError]] = {
    FaultKind.POSITION_MISMATCH: errors.PositionMismatch,
    FaultKind.CACHE_LOST: errors.CacheLost,
    FaultKind.CORRUPTION: errors.TokenRejected,
    FaultKind.COMPUTE_FAILED: errors.ComputeFailed,
    FaultKind.CACHE_EXHAUSTED: errors.CacheExhausted,
    FaultKind.ROUTE_LOST: errors.RouteUnavailable,
    FaultKind.REFUSED: errors.InvalidRequest,
}


class Ladder:
    """See the module."""

    def __init__(self, state: MeshState, endings: Endings) -> None:
        self._state, self._endings = state, endings

    def recover(
        self, live: LiveRoute, session: Session, fault: RequestFault, step: int, now: float
    ) -> list[Loss]:
        """Take a rung of the ladder for one request on an open route."""
        losses = self._note_suspicion(live, fault, step)
        rung = self._state.recovery.choose(session, fault, now)
        if rung is Rung.REROUTE and not self.has_alternative(live, session):
            rung = self._without_alternative(live, fault, losses)
        self.begin(session, fault, rung, now)
        if rung is Rung.REWIND:
            live.scheduler.rewind(session)
            self.goes_to(session, live, session.pending)
        elif rung is Rung.REPLAY:
            live.scheduler.restart(session)
            self.goes_to(session, live, session.pending)
        elif rung is Rung.REROUTE:
            live.scheduler.remove(session)
            session.avoid_epoch = live.epoch
            self.displace(session, now)
        else:
            kind = _ERRORS[fault.kind]
            said = f"{fault.cause}: {fault.detail}" if fault.detail else fault.cause
            self._endings.fail(session, kind(said, worker=fault.worker or None), now)
        return losses

    def _note_suspicion(self, live: LiveRoute, fault: RequestFault, step: int) -> list[Loss]:
        """Count a corruption against the worker it came from; one too many ends its route."""
        if fault.kind not in SUSPICIOUS or not fault.worker:
            return []
        record = next((w for w in live.route.workers if w.name == fault.worker), None)
        if record is None:
            return []
        if not self._state.recovery.corrupted(record.name, live.epoch, step):
            return []
        return [Loss(live.epoch, "QUARANTINED", record.name, fault.detail)]

    def has_alternative(self, live: LiveRoute, session: Session) -> bool:
        """Whether another route could take this request, now or soon."""
        fallback, has_stages = self._state.fallback, self._state.has_stages
        return any(
            other is not live and fallback.could_serve(session, other, has_stages)
            for other in self._state.routes.values()
        )

    def _without_alternative(
        self, live: LiveRoute, fault: RequestFault, losses: list[Loss]
    ) -> Rung:
        """There is only this route: a lost cache is rebuilt here once more (within the request's
        budget); a worker that computes wrongly is healed and waited for, not failed at once.
        """
        if fault.kind in (FaultKind.CACHE_LOST, FaultKind.POSITION_MISMATCH):
            return Rung.REPLAY
        if fault.kind not in SUSPICIOUS or not fault.worker:
            return Rung.FAIL
        if not losses:
            losses.append(Loss(live.epoch, "QUARANTINED", fault.worker, fault.detail))
        return Rung.REROUTE

    def leave_lost_route(
        self, live: LiveRoute, session: Session, fault: RequestFault, now: float
    ) -> None:
        """The route of this request has ended."""
        rung = self._state.recovery.choose(session, fault, now)
        live.scheduler.remove(session)
        self.begin(session, fault, rung, now)
        if rung is Rung.FAIL:
            error = errors.RouteUnavailable(
                "the recovery budget is spent", cause=fault.cause, worker=fault.worker or None
            )
            self._endings.fail(session, error, now)
        else:
            self.displace(session, now)

    def may_go_back(self, session: Session) -> None:
        """The route that it was moved from is better than none; but not where tokens were made that
        its client was told to forget."""
        avoided = self._state.routes.get(session.avoid_epoch)
        if avoided is None or session.corrected_through or self.has_alternative(avoided, session):
            return
        session.avoid_epoch = 0

    def displace(self, session: Session, now: float) -> None:
        """Into the line of requests that need another route."""
        session.detach(now)
        self._state.placement_changed = True
        self._state.wake(now + self._state.policy.fallback_wait_s_max)
        if not self._state.fallback.enqueue(session):
            self._state.count("requests_refused")
            error = errors.Overloaded(
                "too many requests wait for another route",
                retry_after_s=self._state.policy.retry_after_s,
            )
            self._endings.fail(session, error, now)

    def begin(
        self,
        session: Session,
        fault: RequestFault,
        rung: Rung,
        now: float,
    ) -> None:
        """Record it. One that failed on its way is overtaken by it, and hands on the time of the
        first sign of trouble."""
        before = session.recovering
        if before is not None:
            self._keep(session, before.record(None))
            self._state.publish(
                RECOVERY,
                "RecoveryOvertaken",
                request=session.request,
                worker=before.worker,
                cause=before.cause,
                action=before.action,
                epoch=before.epoch,
                by=fault.cause,
            )
        session.recovering = PendingRecovery(
            cause=fault.cause,
            action=rung.value,
            worker=fault.worker,
            from_route=session.route,
            began_at=before.began_at if before else now,
            kept=session.accepted_count,
        )
        self._state.publish(
            RECOVERY,
            "RecoveryStarted",
            request=session.request,
            worker=fault.worker,
            cause=fault.cause,
            action=rung.value,
            epoch=session.epoch,
            kept=session.accepted_count,
        )

    def goes_to(self, session: Session, live: LiveRoute, replayed: int) -> None:
        """Where a recovery that is under way leads, and how many tokens are computed again there;
        nothing if none is under way."""
        recovering = session.recovering
        if recovering is not None:
            recovering.to_route, recovering.epoch = live.route.names, live.epoch
            recovering.replayed = replayed

    def recovered(self, session: Session, now: float) -> None:
        """A token came: what was under way has worked."""
        pending = session.recovering
        if pending is None:
            return
        record = pending.record(now - pending.began_at)
        session.recovering = None
        self._keep(session, record)
        self._state.publish(
            RECOVERY,
            "RecoveryFinished",
            request=session.request,
            worker=record.worker,
            cause=record.cause,
            action=record.action,
            epoch=record.epoch,
            to_route=" ".join(record.to_route),
            kept=record.kept,
            replayed=record.replayed,
            seconds=f"{record.seconds:.4f}",
            from_route=" ".join(record.from_route),
        )

    def _keep(self, session: Session, record: RecoveryRecord) -> None:
        session.recoveries.append(record)
        self._state.emit(RecoveryEnded(session.request, record))
