"""Requests: admitted, placed, verified token by token, recovered, ended exactly once.

    QUEUED -placed->  PREFILLING -first token->  DECODING -stop, length->  FINISHED
    PREFILLING, DECODING -fault->  RECOVERING -next token->  DECODING
    any -cancelled->  CANCELLED          any -refused, late, ladder spent->  FAILED
    FINISHED, CANCELLED -not kept, so its client is told otherwise->  FAILED

A token reaches the client only through ``_accept``, which runs only behind
``TokenStreamSynchronizer``; what was accepted is never emitted again and never contradicted. It
ends only through ``Endings``.
"""

from __future__ import annotations

from coordinator.admission import (
    Deadlines,
    larger_may_come,
    no_route,
    refusal,
    waited_too_long,
    why_not_ready,
)
from coordinator.endings import Endings
from coordinator.events import (
    CancelRequested,
    Delivery,
    GenerationRequested,
    RequestFailed,
    StopMatched,
)
from coordinator.ladder import Ladder
from coordinator.membership import Loss
from coordinator.mesh_state import GENERATION, INTEGRITY, MeshState
from coordinator.recovery import (
    KIND_OF_STATUS,
    FaultKind,
    RequestFault,
    Rung,
)
from coordinator.route import LiveRoute
from coordinator.row_labels import hop_behind
from coordinator.session import Session, SessionPhase
from coordinator.shadow_book import ShadowBook
from coordinator.step_book import SentRow, SentStep
from coordinator.token_validator import TokenValidator
from coordinator.verifier import Verifier
from stagemesh import errors
from stagemesh.errors import MeshError, TokenRejected
from stagemesh.frame import FrameKind, RowStatus, StepFrame, StepRow
from stagemesh.token import TokenChunk, ValidationStatus

COORDINATOR_RESTARTED = "COORDINATOR_RESTARTED"
"""Cause of the recovery that a request which was running begins with when a journal brings it back.
One that had failed and is resumed names what it failed for."""


class RequestDesk:
    """See the module."""

    def __init__(self, state: MeshState) -> None:
        self.state = state
        self.validator = TokenValidator(state.policy.vocab_size, counters=state.counters)
        self.deadlines = Deadlines(state)
        self.shadows = ShadowBook(state)
        self.endings = Endings(state, self.shadows)
        self.ladder = Ladder(state, self.endings)
        self.verifier = Verifier(state, self.shadows, self.endings, self.ladder)

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
        problem = refusal(session, state)
        if problem is not None:
            state.count("requests_refused")
            self.endings.fail(session, problem, now)
            return
        if session.accepted_count >= session.max_tokens or _ends_with_stop(session):
            self.verifier.finish(session, _natural_end(session), now)
            return
        if demand.deadline is not None:
            self.deadlines.add(demand.deadline, demand.request)
        if demand.recovered and (demand.accepted or not demand.resumed_after):
            cause = demand.resumed_after or COORDINATOR_RESTARTED
            fault = RequestFault(FaultKind.ROUTE_LOST, cause)
            self.ladder.begin(session, fault, Rung.REPLAY, now)
        state.queue.append(session)
        state.placement_changed = True

    # Placing

    @property
    def running(self) -> int:
        """Requests on a route, or complete and yet to be verified."""
        waiting = len(self.state.queue) + len(self.state.fallback.displaced)
        return len(self.state.sessions) - waiting

    @property
    def _is_full(self) -> bool:
        """Whether so many requests are on routes that new ones have to wait."""
        on_routes = self.running - len(self.state.settling)
        return on_routes >= self.state.policy.requests_running_max

    def place(self, now: float) -> None:
        """Give waiting requests a route: displaced ones first, then new ones in order."""
        state = self.state
        self.shadows.find_routes()
        displaced = state.fallback.displaced
        for _ in range(len(displaced)):
            session = displaced.popleft()
            if not self._place(session, now) and not session.has_ended:
                displaced.append(session)
        passed: list[Session] = []
        while state.queue and not self._is_full:
            session = state.queue.popleft()
            if self._place(session, now) or session.has_ended:
                continue
            passed.append(session)
            if not session.outsized:  # who waits for a larger route is in nobody's way
                break
        state.queue.extendleft(reversed(passed))

    def _place(self, session: Session, now: float) -> bool:
        """Onto a route if there is one for it now. A request that no route can hold, and for which
        none is awaited, is failed."""
        state = self.state
        if not self._same_weights(session):
            self.endings.fail(
                session, errors.JournalError("begun with other weights or dtype"), now
            )
            return False
        shadow = self.shadows.open.get(session.request)
        choice = state.fallback.choose(
            session,
            state.routes.values(),
            now,
            has_stages=state.has_stages,
            warm_epoch=shadow.epoch if shadow is not None else 0,
        )
        session.outsized = choice.hopeless
        if choice.hopeless and not larger_may_come(session, state, now):
            error = errors.CacheExhausted(choice.reason, needed_tokens=session.reserve_tokens)
            self.endings.fail(session, error, now)
            return False
        live = self.verifier.preferred(session) or choice.route
        if live is None:
            return False
        is_new = session.admitted_at is None
        session.weights = state.model.label if state.model is not None else ""
        self.ladder.goes_to(session, live, session.stream.next_position)
        if session.prefers_shadow and not live.is_full:
            self.shadows.drop(session.request)  # it holds tokens that were withdrawn
        session.prefers_shadow = False
        self.shadows.make_way(session, live)
        if not (live.is_full and self.verifier.take_over(session, live, now)):
            live.scheduler.admit(session, now)
        state.work_changed.add(live.epoch)
        self.shadows.placed(session, now)
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
            self.shadows.budget.earn(live.scheduler.steps.last_step_s)
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
                status=ValidationStatus.REJECTED.name,
                detail=error.message,
                corruption=error.metadata.get("corruption", ""),
                hop=error.metadata.get("hop", ""),
            )
            fault = RequestFault(FaultKind.CORRUPTION, error.reason, worker, error.message)
            return self.ladder.recover(live, session, fault, step, now)
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
            hop=hop_behind(row.fault_stage, len(names)) if worker else "",
        )
        kind = KIND_OF_STATUS[row.status]
        fault = RequestFault(kind, row.status.name, worker, row.fault_detail)
        return self.ladder.recover(live, session, fault, step, now)

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
        return self.ladder.recover(live, session, fault, step, now)

    def _accept(self, live: LiveRoute, session: Session, chunk: TokenChunk, now: float) -> None:
        """One verified token: commit and emit it, and see whether the answer ends."""
        state = self.state
        count = session.accepted_count
        session.accepted(now)
        if count <= session.corrected_through:
            session.corrected += 1
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
        self.ladder.recovered(session, now)
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
            self.verifier.finish(session, reason, now)
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
        shadow = self.shadows.open.get(session.request)
        if shadow is not None:
            state.work_changed.add(shadow.epoch)
        state.placement_changed = True
        state.wake(now + state.policy.verification_wait_s_max)

    def route_closed(self, live: LiveRoute, loss: Loss, now: float) -> None:
        """Every request of a route that ended needs another one."""
        fault = RequestFault(FaultKind.ROUTE_LOST, loss.cause, loss.worker, loss.detail)
        self.shadows.route_closed(live, now)
        self.verifier.examiner.route_closed(live)
        for session in list(live.scheduler.sessions.values()):
            self.ladder.leave_lost_route(live, session, fault, now)
        for session in self.state.fallback.displaced:
            self.ladder.may_go_back(session)

    # Going out

    def cancel(self, event: CancelRequested, now: float) -> None:
        """The client asked, or went away. Unknown or ended requests are ignored."""
        session = self.state.sessions.get(event.request)
        if session is not None:
            self.endings.finish(session, "cancelled", now)

    def give_up(self, event: RequestFailed, now: float) -> None:
        """Something outside cannot go on with it. Unknown or failed requests are ignored.

        One that had all its tokens is told of a failure as well if they, or its end, could not be
        kept: what is counted and shown is what its client was told.
        """
        session = self.state.sessions.get(event.request)
        if session is not None:
            self.endings.fail(session, event.error, now)
            return
        ended = self.state.ended.get(event.request)
        if ended is not None and ended.phase is not SessionPhase.FAILED:
            self.endings.withdraw(ended, event.error, now)

    def stop_matched(self, event: StopMatched, now: float) -> None:
        """The edge found a stop string: the answer ends with its first ``kept`` tokens."""
        session = self.state.sessions.get(event.request)
        if session is None or (event.chain and event.chain != session.chain_behind(event.kept)):
            return  # The edge does not know yet that the tokens it was found in are withdrawn.
        session.matched_stop = event.matched
        session.kept = min(max(event.kept, 0), session.accepted_count)
        self._complete(session, "stop", now)

    def expire(self, now: float) -> None:
        """Fail what is past a deadline: its own, the queue's, or that of a displaced request."""
        state = self.state
        for session in self.deadlines.passed(now):
            late = errors.DeadlineExceeded("the request's deadline passed")
            self._out_of_time(session, late, now)
        self.verifier.expire(now)
        for session in state.fallback.overdue(now):
            state.fallback.displaced.appendleft(session)
            self.endings.fail(session, no_route(state, "no route could take over in time"), now)
        while state.queue:
            session = state.queue[0]
            error = waited_too_long(session, state, now)
            if error is None:
                return
            self.endings.fail(session, error, now)

    def why_not_ready(self) -> str:
        """Why no route serves requests; "" if one does."""
        return why_not_ready(self.state)

    def fail_everything(self, error: MeshError, now: float, *, only_waiting: bool) -> None:
        """Shutdown: end what waits, or everything."""
        waiting = [*self.state.queue, *self.state.fallback.displaced]
        doomed = waiting if only_waiting else list(self.state.sessions.values())
        for session in doomed:
            self._out_of_time(session, error, now)

    def _out_of_time(self, session: Session, error: MeshError, now: float) -> None:
        """It fails; an answer that its client has to its end, and that only waited to be verified,
        ends."""
        if session.finishing and session.delivery is Delivery.IMMEDIATE:
            self.verifier.finish(session, session.finishing, now)
        else:
            self.endings.fail(session, error, now)


def _ends_with_stop(session: Session) -> bool:
    accepted = session.demand.accepted
    return bool(accepted) and accepted[-1] in session.demand.stop_token_ids


def _natural_end(session: Session) -> str:
    return "stop" if _ends_with_stop(session) else "length"
