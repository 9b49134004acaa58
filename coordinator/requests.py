"""Requests: admitted, placed, verified token by token, recovered, ended exactly once.

    QUEUED -placed->  PREFILLING -first token->  DECODING -stop, length->  FINISHED
    PREFILLING, DECODING -fault->  RECOVERING -next token->  DECODING
    any -cancelled->  CANCELLED          any -refused, late, ladder spent->  FAILED

A token reaches the client only through ``_accept``, which runs only behind
``TokenStreamSynchronizer``; what was accepted is never emitted again and never contradicted. Ending
goes only through ``_end``, which emits the single terminal instruction and takes the request out of
every line and route.
"""

from __future__ import annotations

import heapq
from collections import Counter

from coordinator.events import CancelRequested, GenerationRequested, RequestFailed, StopMatched
from coordinator.instructions import FailRequest, FinishRequest, RequestSummary
from coordinator.membership import Loss
from coordinator.mesh_state import GENERATION, INTEGRITY, RECOVERY, MeshState
from coordinator.recovery import (
    KIND_OF_STATUS,
    SUSPICIOUS,
    FaultKind,
    RequestFault,
    Rung,
)
from coordinator.route import LiveRoute, RoutePhase, explain_cover
from coordinator.scheduler import SentRow, SentStep
from coordinator.session import PendingRecovery, Session, SessionPhase
from coordinator.token_validator import TokenValidator
from coordinator.verifier import Acts, Verifier
from stagemesh import errors
from stagemesh.errors import MeshError, TokenRejected
from stagemesh.frame import FrameKind, RowStatus, StepFrame, StepRow
from stagemesh.token import TokenChunk, ValidationStatus

COORDINATOR_RESTARTED = "COORDINATOR_RESTARTED"
"""Cause of the recovery that a request which was running begins with when a journal brings it back.
One that had failed and is resumed names what it failed for."""

DEADLINES_OVER_MAX = 1024
"""Deadlines of ended requests that may be kept, beyond as many as there are live ones."""

_ERRORS: dict[FaultKind, type[MeshError]] = {
    FaultKind.POSITION_MISMATCH: errors.PositionMismatch,
    FaultKind.CACHE_LOST: errors.CacheLost,
    FaultKind.CORRUPTION: errors.TokenRejected,
    FaultKind.COMPUTE_FAILED: errors.ComputeFailed,
    FaultKind.CACHE_EXHAUSTED: errors.CacheExhausted,
    FaultKind.ROUTE_LOST: errors.RouteUnavailable,
    FaultKind.REFUSED: errors.InvalidRequest,
}


class RequestDesk:
    """See the module."""

    def __init__(self, state: MeshState) -> None:
        self.state = state
        self.validator = TokenValidator(state.policy.vocab_size, counters=state.counters)
        self.finished = 0
        self.failed = 0
        self.cancelled = 0
        acts = Acts(self._finish, self._fail, self._begin_recovery, self._displace)
        self.verifier = Verifier(state, acts)
        self._deadlines: list[tuple[float, bytes]] = []

    # Coming in

    def submit(self, demand: GenerationRequested, now: float) -> None:
        """A request arrives: refused at once, or queued."""
        state = self.state
        if demand.request in state.sessions:
            state.count("requests_conflicting")
            state.publish(GENERATION, "RequestConflict", request=demand.request)
            return
        session = Session.begin(
            demand, self.validator, context_tokens_max=state.policy.context_tokens_max, now=now
        )
        state.sessions[demand.request] = session
        state.ended.pop(demand.request, None)
        refusal = self._refusal(session)
        if refusal is not None:
            state.count("requests_refused")
            self._fail(session, refusal, now)
            return
        if session.accepted_count >= session.max_tokens or _ends_with_stop(session):
            self._finish(session, _natural_end(session), now)
            return
        if demand.deadline is not None:
            heapq.heappush(self._deadlines, (demand.deadline, demand.request))
            state.wake(demand.deadline)
            if len(self._deadlines) > DEADLINES_OVER_MAX + 2 * len(state.sessions):
                self._forget_deadlines()
        if demand.recovered and (demand.accepted or not demand.resumed_after):
            cause = demand.resumed_after or COORDINATOR_RESTARTED
            fault = RequestFault(FaultKind.ROUTE_LOST, cause)
            self._begin_recovery(session, fault, Rung.REPLAY, now)
        state.queue.append(session)
        state.placement_changed = True

    def _forget_deadlines(self) -> None:
        """Of what has ended: an answer takes seconds, and its deadline may be an hour away."""
        gone = Counter(when for when, request in self._deadlines if not self._is_due(when, request))
        self._deadlines = [one for one in self._deadlines if self._is_due(*one)]
        heapq.heapify(self._deadlines)
        self.state.let_sleep(gone)

    def _is_due(self, deadline: float, request: bytes) -> bool:
        """Whether it is still that request's; an id may be asked again with another deadline."""
        session = self.state.sessions.get(request)
        return session is not None and session.demand.deadline == deadline

    def _refusal(self, session: Session) -> MeshError | None:
        demand, policy = session.demand, self.state.policy
        if not demand.prompt:
            return errors.InvalidRequest("the prompt has no tokens", field="prompt")
        if demand.max_tokens < 1:
            return errors.InvalidRequest("max_tokens must be positive", field="max_tokens")
        if len(demand.prompt) >= policy.context_tokens_max:
            return errors.ContextExceeded(
                "the prompt fills the context",
                prompt_tokens=len(demand.prompt),
                context_tokens=policy.context_tokens_max,
            )
        if self.state.is_draining:
            return errors.Overloaded("the mesh is shutting down", retry_after_s=5.0)
        was_running = demand.recovered and not demand.resumed_after
        if len(self.state.queue) >= policy.queue_length_max and not was_running:
            return errors.Overloaded(
                "the queue is full",
                retry_after_s=policy.retry_after_s,
                queue_length=len(self.state.queue),
            )
        return None

    # Placing

    @property
    def running(self) -> int:
        """Requests on a route."""
        waiting = len(self.state.queue) + len(self.state.fallback.displaced)
        return len(self.state.sessions) - waiting

    def place(self, now: float) -> None:
        """Give waiting requests a route: displaced ones first, then new ones in order."""
        state = self.state
        self.verifier.find_routes(now)
        displaced = state.fallback.displaced
        for _ in range(len(displaced)):
            session = displaced.popleft()
            if not self._place(session, now) and not session.has_ended:
                displaced.append(session)
        while state.queue and self.running < state.policy.requests_running_max:
            session = state.queue.popleft()
            if not self._place(session, now) and not session.has_ended:
                state.queue.appendleft(session)
                return

    def _place(self, session: Session, now: float) -> bool:
        """Onto a route if there is one for it now. A hopeless request is failed."""
        state = self.state
        if not self._same_weights(session):
            self._fail(session, errors.JournalError("begun with other weights or dtype"), now)
            return False
        choice = state.fallback.choose(
            session, state.routes.values(), now, has_stages=state.has_stages
        )
        if choice.hopeless:
            error = errors.CacheExhausted(choice.reason, needed_tokens=session.reserve_tokens)
            self._fail(session, error, now)
            return False
        live = self.verifier.preferred(session) or choice.route
        if live is None:
            return False
        is_new = session.admitted_at is None
        session.weights = state.model.label if state.model is not None else ""
        if session.recovering is not None:
            recovering = session.recovering
            recovering.to_route, recovering.epoch = live.route.names, live.epoch
            recovering.replayed = session.stream.next_position
        if session.prefers_shadow and not live.is_full:
            self.verifier.drop(session.request)  # it holds tokens that were withdrawn
        session.prefers_shadow = False
        if not (live.is_full and self.verifier.take_over(session, live, now)):
            live.scheduler.admit(session, now)
        state.work_changed.add(live.epoch)
        self.verifier.placed(session, now)
        if is_new:
            state.publish(
                GENERATION,
                "GenerationStarted",
                request=session.request,
                epoch=live.epoch,
                route=" ".join(live.route.names),
                prompt_tokens=session.prompt_length,
                queue_s=f"{now - session.arrived_at:.4f}",
            )
        return True

    def _same_weights(self, session: Session) -> bool:
        """An answer is never finished by a model that did not begin it."""
        begun_with, model = session.demand.fingerprint, self.state.model
        return not begun_with or model is None or begun_with == model.label

    # Coming back

    def step_returned(
        self, live: LiveRoute, sent: SentStep, frame: StepFrame, now: float
    ) -> list[Loss]:
        """Judge every row of a step. Returns routes that cannot go on."""
        losses: list[Loss] = []
        if not live.is_full:
            self.verifier.budget.earn(live.scheduler.last_step_s)
        for asked, row in zip(sent.rows, frame.rows, strict=True):
            if asked.shadow is not None:
                losses += self.verifier.returned(live, asked, row, sent.kind, now)
                continue
            session = asked.session
            if session is None or session.has_ended or asked.attempt != session.attempt:
                continue
            if sent.kind is FrameKind.REWIND:
                losses += self._rewound(live, session, asked, row, frame.step, now)
            elif row.status is not RowStatus.OK:
                losses += self._row_failed(live, session, row, frame.step, now)
            else:
                losses += self._row_returned(live, session, row, frame.step, now)
        self.state.work_changed.add(live.epoch)
        return losses

    def _row_returned(
        self, live: LiveRoute, session: Session, row: StepRow, step: int, now: float
    ) -> list[Loss]:
        try:
            if not row.samples:
                session.stream.confirm(row, epoch=live.epoch, step=step, now=now)
                self._settle_checkpoint(session)
                return []
            chunk = session.stream.accept(row, epoch=live.epoch, step=step, now=now)
        except TokenRejected as error:
            self._settle_checkpoint(session)
            session.rejections += 1
            worker = error.metadata.get("worker", "")
            self.state.publish(
                INTEGRITY,
                "TokenRejected",
                request=session.request,
                worker=worker,
                epoch=live.epoch,
                step=step,
                detail=error.message,
                corruption=error.metadata.get("corruption", ""),
            )
            fault = RequestFault(FaultKind.CORRUPTION, error.reason, worker, error.message)
            return self._recover(live, session, fault, step, now)
        self._settle_checkpoint(session)
        self.verifier.accepted(session, live, row, step, now)
        self._accept(live, session, chunk, now)
        return []

    def _settle_checkpoint(self, session: Session) -> None:
        """File and publish the checkpoint barrier that the row just judged has settled, if any."""
        barrier = session.stream.take_checkpoint()
        if barrier is not None:
            self.state.barriers.record(barrier)
            self.state.publish_barrier(barrier, request=session.request)

    def _row_failed(
        self, live: LiveRoute, session: Session, row: StepRow, step: int, now: float
    ) -> list[Loss]:
        names = live.route.names
        worker = names[row.fault_stage] if 0 <= row.fault_stage < len(names) else ""
        self.state.count(f"rows_failed.{row.status.name.lower()}")
        self.state.publish(
            INTEGRITY,
            "RowFailed",
            request=session.request,
            worker=worker,
            epoch=live.epoch,
            step=step,
            status=row.status.name,
            detail=row.fault_detail,
        )
        kind = KIND_OF_STATUS[row.status]
        fault = RequestFault(kind, row.status.name, worker, row.fault_detail)
        return self._recover(live, session, fault, step, now)

    def _rewound(
        self,
        live: LiveRoute,
        session: Session,
        asked: SentRow,
        row: StepRow,
        step: int,
        now: float,
    ) -> list[Loss]:
        """A rewind has been carried out by every stage, or could not be."""
        wanted = asked.row.first_position
        agreed = len(row.marks) == live.route.stage_count and all(
            mark.cache_length == wanted for mark in row.marks
        )
        if row.status is RowStatus.OK and agreed:
            live.scheduler.ready(session)
            return []
        detail = row.fault_detail or "a stage did not trim its cache"
        fault = RequestFault(FaultKind.POSITION_MISMATCH, "REWIND_FAILED", "", detail)
        return self._recover(live, session, fault, step, now)

    def _accept(self, live: LiveRoute, session: Session, chunk: TokenChunk, now: float) -> None:
        """One verified token: commit and emit it, and see whether the answer ends."""
        state = self.state
        count = session.accepted_count
        session.accepted(now)
        if count <= session.corrected_through:
            chunk = chunk.with_status(ValidationStatus.CORRECTED)
        session.undelivered.append(chunk)
        self.verifier.deliver(session)
        state.publish_token(
            GENERATION,
            "ChunkGenerated",
            chunk,
            index=count - 1,
            verified_through=session.verified_through,
        )
        if session.recovering is not None:
            self._recovered(session, now)
        if chunk.token_id in session.demand.stop_token_ids:
            self._complete(session, "stop", now)
        elif count >= session.max_tokens:
            self._complete(session, "length", now)
        else:
            live.scheduler.ready(session)

    def _complete(self, session: Session, reason: str, now: float) -> None:
        """The answer is all there. It ends now, or when its last tokens are verified."""
        state = self.state
        if not self.verifier.must_wait(session):
            self._finish(session, reason, now)
            return
        live = state.routes.get(session.epoch) if session.epoch else None
        if live is not None:
            live.scheduler.remove(session)
            state.work_changed.add(live.epoch)
        elif session in state.fallback.displaced:
            state.fallback.displaced.remove(session)
        session.finishing = reason
        session.settle()
        session.waiting_since = now
        state.settling[session.request] = session
        shadow = self.verifier.shadows.get(session.request)
        if shadow is not None:
            state.work_changed.add(shadow.epoch)
        state.placement_changed = True
        state.wake(now + state.policy.verification_wait_s_max)

    # Recovery

    def _recover(
        self, live: LiveRoute, session: Session, fault: RequestFault, step: int, now: float
    ) -> list[Loss]:
        """Take a rung of the ladder for one request on an open route."""
        losses = self._note_suspicion(live, fault, step)
        rung = self.state.recovery.choose(session, fault, now)
        if rung is Rung.REROUTE and not self._has_alternative(live):
            rung = self._without_alternative(live, fault, losses)
        self._begin_recovery(session, fault, rung, now)
        if rung is Rung.REWIND:
            live.scheduler.rewind(session)
        elif rung is Rung.REPLAY:
            live.scheduler.restart(session)
            self._same_route(session, live)
        elif rung is Rung.REROUTE:
            live.scheduler.remove(session)
            session.avoid_epoch = live.epoch
            self._displace(session, now)
        else:
            kind = _ERRORS[fault.kind]
            said = f"{fault.cause}: {fault.detail}" if fault.detail else fault.cause
            self._fail(session, kind(said, worker=fault.worker or None), now)
        return losses

    def _note_suspicion(self, live: LiveRoute, fault: RequestFault, step: int) -> list[Loss]:
        """Count a corruption against the worker it came from; one too many ends its route."""
        if fault.kind not in SUSPICIOUS or not fault.worker:
            return []
        record = next((w for w in live.route.workers if w.name == fault.worker), None)
        if record is None:
            return []
        if not self.state.recovery.corrupted(record.name, live.epoch, step):
            return []
        return [Loss(live.epoch, "QUARANTINED", record.name, fault.detail)]

    def _has_alternative(self, live: LiveRoute) -> bool:
        return any(
            other.is_alive and other.epoch != live.epoch for other in self.state.routes.values()
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

    def route_closed(self, live: LiveRoute, loss: Loss, now: float) -> None:
        """Every request of a route that ended needs another one."""
        fault = RequestFault(FaultKind.ROUTE_LOST, loss.cause, loss.worker, loss.detail)
        self.verifier.route_closed(live, now)
        for session in list(live.scheduler.sessions.values()):
            rung = self.state.recovery.choose(session, fault, now)
            live.scheduler.remove(session)
            self._begin_recovery(session, fault, rung, now)
            if rung is Rung.FAIL:
                error = errors.RouteUnavailable(
                    "the recovery budget is spent", cause=loss.cause, worker=loss.worker or None
                )
                self._fail(session, error, now)
            else:
                self._displace(session, now)

    def _displace(self, session: Session, now: float) -> None:
        session.detach(now)
        self.state.placement_changed = True
        self.state.wake(now + self.state.policy.fallback_wait_s_max)
        if not self.state.fallback.enqueue(session):
            self.state.count("requests_refused")
            error = errors.Overloaded(
                "too many requests wait for another route",
                retry_after_s=self.state.policy.retry_after_s,
            )
            self._fail(session, error, now)

    def _begin_recovery(
        self,
        session: Session,
        fault: RequestFault,
        rung: Rung,
        now: float,
    ) -> None:
        """Record it. A recovery that fails on its way keeps the time of its first sign of
        trouble."""
        before = session.recovering
        if before is not None:
            session.recoveries.append(before.record(None))
        session.recovering = PendingRecovery(
            cause=fault.cause,
            action=rung.value,
            worker=fault.worker,
            from_route=session.route,
            began_at=before.began_at if before else now,
            kept=session.accepted_count,
        )
        self.state.publish(
            RECOVERY,
            "RecoveryStarted",
            request=session.request,
            worker=fault.worker,
            cause=fault.cause,
            action=rung.value,
            epoch=session.epoch,
            kept=session.accepted_count,
        )

    def _same_route(self, session: Session, live: LiveRoute) -> None:
        if session.recovering is not None:
            session.recovering.to_route, session.recovering.epoch = live.route.names, live.epoch
            session.recovering.replayed = session.stream.next_position

    def _recovered(self, session: Session, now: float) -> None:
        pending = session.recovering
        if pending is None:
            return
        record = pending.record(now - pending.began_at)
        session.recovering = None
        session.recoveries.append(record)
        self.state.publish(
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

    # Going out

    def cancel(self, event: CancelRequested, now: float) -> None:
        """The client asked, or went away. Unknown or ended requests are ignored."""
        session = self.state.sessions.get(event.request)
        if session is not None:
            self._finish(session, "cancelled", now)

    def give_up(self, event: RequestFailed, now: float) -> None:
        """Something outside cannot go on with it. Unknown or failed requests are ignored.

        One that had all its tokens is told of a failure as well if they, or its end, could not be
        kept: what is counted and shown is what its client was told.
        """
        session = self.state.sessions.get(event.request)
        if session is not None:
            self._fail(session, event.error, now)
            return
        ended = self.state.ended.get(event.request)
        if ended is not None and ended.phase is not SessionPhase.FAILED:
            self._end_withdrawn(ended, event.error, now)

    def _end_withdrawn(self, session: Session, error: MeshError, now: float) -> None:
        """Its end never reached its client; who could not keep it tells the client."""
        if session.phase is SessionPhase.CANCELLED:
            self.cancelled -= 1
        else:
            self.finished -= 1
        session.phase, session.error_reason = SessionPhase.FAILED, error.reason
        self._failed(session, error, session.summary(now))

    def stop_matched(self, event: StopMatched, now: float) -> None:
        """The edge found a stop string: the answer ends with its first ``kept`` tokens."""
        session = self.state.sessions.get(event.request)
        if session is None:
            return
        session.matched_stop = event.matched
        session.kept = min(max(event.kept, 0), session.accepted_count)
        self._complete(session, "stop", now)

    def expire(self, now: float) -> None:
        """Fail what is past a deadline: its own, the queue's, or that of a displaced request."""
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, request = heapq.heappop(self._deadlines)
            if self._is_due(deadline, request):
                session = self.state.sessions[request]
                self._fail(session, errors.DeadlineExceeded("the request's deadline passed"), now)
        self.verifier.expire(now)
        for session in self.state.fallback.overdue(now):
            self.state.fallback.displaced.appendleft(session)
            self._fail(session, self._no_route("no route could take over in time"), now)
        while self.state.queue:
            session = self.state.queue[0]
            error = self._waited_too_long(session, now)
            if error is None:
                return
            self._fail(session, error, now)

    def _waited_too_long(self, session: Session, now: float) -> MeshError | None:
        policy, waited = self.state.policy, now - session.waiting_since
        if any(live.phase is RoutePhase.OPEN for live in self.state.routes.values()):
            if waited < policy.queue_wait_s_max:
                return None
            return errors.Overloaded("waited too long", retry_after_s=policy.retry_after_s)
        return None if waited < policy.route_wait_s_max else self._no_route("no route in time")

    def _no_route(self, message: str) -> MeshError:
        return errors.RouteUnavailable(message, cause=self.why_not_ready() or None)

    def why_not_ready(self) -> str:
        """Why no route is open; "" if one is."""
        state = self.state
        if any(live.phase is RoutePhase.OPEN for live in state.routes.values()):
            return ""
        if not state.workers or state.model is None:
            return "no worker has registered"
        opening = next((live for live in state.routes.values() if live.is_alive), None)
        if opening is not None:
            return f"a route is {opening.phase.value}"
        usable = [r.info for r in state.workers.values() if r.may_be_planned]
        spans = [info.span for info in usable if not info.is_full]
        said = explain_cover(spans, state.model.layer_count)
        return said or "workers are held back after a failure"

    def fail_everything(self, error: MeshError, now: float, *, only_waiting: bool) -> None:
        """Shutdown: end what waits, or everything."""
        waiting = [*self.state.queue, *self.state.fallback.displaced]
        doomed = waiting if only_waiting else list(self.state.sessions.values())
        for session in doomed:
            self._fail(session, error, now)

    def _finish(self, session: Session, reason: str, now: float) -> None:
        was_cancelled = reason == "cancelled"
        phase = SessionPhase.CANCELLED if was_cancelled else SessionPhase.FINISHED
        summary = session.summary(now)
        self._end(session, phase, now)
        if was_cancelled:
            self.cancelled += 1
        else:
            self.finished += 1
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

    def _fail(self, session: Session, error: MeshError, now: float) -> None:
        error.metadata.setdefault("position", str(session.delivered))
        session.error_reason = error.reason
        summary = session.summary(now)
        self._end(session, SessionPhase.FAILED, now)
        self.state.emit(FailRequest(session.request, error, summary))
        self._failed(session, error, summary)

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
        """Take a request out of everything. The only way a session reaches a final phase."""
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
        self.verifier.ended(session, completed=phase is SessionPhase.FINISHED)
        del state.sessions[session.request]
        state.ended.pop(session.request, None)
        state.ended[session.request] = session
        while len(state.ended) > state.policy.generations_kept_max:
            del state.ended[next(iter(state.ended))]
        state.placement_changed = True


def _ends_with_stop(session: Session) -> bool:
    accepted = session.demand.accepted
    return bool(accepted) and accepted[-1] in session.demand.stop_token_ids


def _natural_end(session: Session) -> str:
    return "stop" if _ends_with_stop(session) else "length"
