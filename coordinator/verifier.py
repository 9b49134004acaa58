"""Runs the shadows of a mesh: opens them, judges what they bring back, and corrects answers.

Who is shadowed: requests that asked for it, the first streams of a route that was just opened,
streams that had a recovery, and a sample of the others within a budget of compute. Requests that
asked are paid for by whoever allowed it; everything else is charged to ``AuditBudget``.

A token the full worker would not have chosen (by more than the tolerance) is *rejected*: it and all
behind it are withdrawn, the client is told where it saw them, and the request moves to the full
worker, whose cache holds everything verified. The stage that is to blame is named from the
checksums that came with the tokens, or by an examination (see ``shadow``), and counted; a series of
such is quarantine. The full worker is the reference by declaration: it computes alone, and what it
says of a boundary is not doubted here.

A full worker that dies takes its shadows along. What asked for verification is then *degraded*: its
watermark stands still until another full worker is there, which starts from the prompt. Answers
that are delivered when verified wait for that, and fail with VERIFICATION_UNAVAILABLE in the end;
others go on and end unverified.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from coordinator.corruption_detector import AuditBudget, CorruptionDetector, DetectorSettings
from coordinator.events import Delivery
from coordinator.instructions import AcceptTokens, AdvanceVerified, CorrectTokens
from coordinator.membership import Loss
from coordinator.mesh_state import INTEGRITY, MeshState
from coordinator.recovery import FaultKind, RequestFault, Rung
from coordinator.route import LiveRoute, RoutePhase
from coordinator.scheduler import SentRow
from coordinator.session import Session
from coordinator.settings import FallbackPolicy
from coordinator.shadow import (
    SHADOW_MISMATCH,
    Difference,
    Examination,
    Line,
    Shadow,
    Why,
    unavailable,
)
from coordinator.token_validator import Corruption, Finding
from stagemesh.checksum import crc32c
from stagemesh.errors import MeshError, TokenRejected
from stagemesh.frame import FrameKind, RowStatus, StepFrame, StepRow
from stagemesh.topology import EXACT, WorkerName

SHADOW_RESTARTS_MAX = 2
"""Times a shadow may begin anew on one route before it is given up there."""
EXAMINATIONS_MAX = 4
"""Examinations under way; more mismatches than that at once have one cause."""


@dataclass(frozen=True, slots=True)
class Acts:
    """What the verifier may do to a request; ``RequestDesk`` owns these."""

    finish: Callable[[Session, str, float], None]
    fail: Callable[[Session, MeshError, float], None]
    begin_recovery: Callable[[Session, RequestFault, Rung, float], None]
    displace: Callable[[Session, float], None]


class Verifier:
    """See the module. ``shadows`` by request; ``unfollowed``: asked for one and has none, since
    when."""

    def __init__(self, state: MeshState, acts: Acts) -> None:
        policy = state.policy
        self.state, self._acts = state, acts
        self.detector = CorruptionDetector(
            DetectorSettings(tolerance=policy.shadow_tolerance), counters=state.counters
        )
        self.budget = AuditBudget(policy.audit_budget)
        self.shadows: dict[bytes, Shadow] = {}
        self.unfollowed: dict[bytes, float] = {}
        self._examinations: list[Examination] = []

    # Opening and closing shadows

    def placed(self, session: Session, now: float) -> None:
        """A request has a route. What is delivered only when verified is shadowed from its
        beginning; everything else from its first token, so that the prompt is not computed twice
        at once."""
        live = self.state.routes.get(session.epoch)
        holds = session.delivery is Delivery.VERIFIED
        if live is not None and not live.is_full and holds and session.is_verifying:
            self._follow(session, Why.ASKED, now)

    def consider(self, session: Session, live: LiveRoute, now: float) -> None:
        """Another token was accepted on a pipeline: should this request have a shadow?"""
        if session.request in self.shadows:
            return
        if session.is_verifying:
            if session.request not in self.unfollowed:
                self._follow(session, Why.ASKED, now)
            return
        if session.considered_epoch == live.epoch:
            return
        session.considered_epoch = live.epoch
        full = self._full_route(session)
        why = self._worth_auditing(session, live, full) if full is not None else None
        if why is not None and self._follow(session, why, now) and why is Why.NEW_ROUTE:
            live.audited += 1

    def _worth_auditing(self, session: Session, live: LiveRoute, full: LiveRoute) -> Why | None:
        policy = self.state.policy
        if policy.audit_budget <= 0.0:
            return None
        if live.audited < policy.audit_first_streams:
            return Why.NEW_ROUTE
        if session.recoveries or session.recovering is not None:
            return Why.RECOVERED
        tokens = session.reserve_tokens
        audit_s = full.scheduler.times.expected_s(FrameKind.SCORE, tokens)
        piece_s = live.scheduler.times.decode.mean_s * session.max_tokens
        drawn = crc32c(session.request) / 2**32
        return Why.SAMPLED if self.budget.draws(drawn, piece_s=piece_s, audit_s=audit_s) else None

    def _full_route(self, session: Session) -> LiveRoute | None:
        """The full worker with the least to do that has room for another cache."""
        routes = [
            live
            for live in self.state.routes.values()
            if live.is_full
            and live.phase is RoutePhase.OPEN
            and not live.suspect
            and live.scheduler.has_room(session.reserve_tokens)
        ]
        return min(routes, key=lambda live: (live.scheduler.load, live.epoch), default=None)

    def _follow(self, session: Session, why: Why, now: float) -> bool:
        full = self._full_route(session)
        if full is None:
            if why is Why.ASKED:
                self._degraded(session, "no full worker has room", now)
            return False
        self.open_on(session, full, why)
        return True

    def open_on(self, session: Session, full: LiveRoute, why: Why = Why.ASKED) -> Shadow:
        """A shadow of ``session`` on this full worker's route."""
        self.drop(session.request)
        shadow = Shadow(session, full.epoch, why)
        if "boundaries" in full.route.workers[0].capabilities:
            shadow.boundaries = self._boundaries_of(session)
        self.shadows[session.request] = shadow
        self.unfollowed.pop(session.request, None)
        full.scheduler.add_shadow(shadow)
        self.state.work_changed.add(full.epoch)
        return shadow

    def _boundaries_of(self, session: Session) -> tuple[int, ...]:
        live = self.state.routes.get(session.epoch)
        if live is None or not self._is_exact():
            return ()  # checksums of kernels that are not bit-exact say nothing
        return tuple(worker.span.last for worker in live.route.workers[:-1])

    def _degraded(self, session: Session, why: str, now: float) -> None:
        self.unfollowed[session.request] = now
        self.state.wake(now + self.state.policy.verification_wait_s_max)
        self.state.count("verifications_degraded")
        self.state.publish(
            INTEGRITY,
            "VerificationDegraded",
            request=session.request,
            detail=why,
            verified_through=session.stream.verified,
        )

    def drop(self, request: bytes) -> None:
        """Forget a shadow and free its cache."""
        shadow = self.shadows.pop(request, None)
        if shadow is None:
            return
        shadow.ended = True
        full = self.state.routes.get(shadow.epoch)
        if full is not None:
            full.scheduler.drop_shadow(shadow)
            self.state.work_changed.add(full.epoch)

    def ended(self, session: Session, *, completed: bool) -> None:
        """A request is over. An audit nobody waits for goes on to the end of what was computed."""
        self.unfollowed.pop(session.request, None)
        shadow = self.shadows.get(session.request)
        if shadow is None:
            return
        if not completed or shadow.why is Why.ASKED or shadow.is_done:
            self.drop(session.request)
        else:
            self.state.work_changed.add(shadow.epoch)

    def route_closed(self, live: LiveRoute, now: float) -> None:
        """Shadows on that route are gone with it."""
        for shadow in [one for one in self.shadows.values() if one.epoch == live.epoch]:
            del self.shadows[shadow.request]
            shadow.ended = True
            if shadow.why is Why.ASKED and not shadow.session.has_ended:
                self._degraded(shadow.session, f"the full worker is gone: {live.reason}", now)
        self._examinations = [e for e in self._examinations if live.epoch not in e.epochs]

    def find_routes(self, now: float) -> None:
        """Routes have changed: perhaps what waits for a shadow can have one."""
        for request in list(self.unfollowed):
            session = self.state.sessions.get(request)
            if session is None:
                del self.unfollowed[request]
                continue
            live = self.state.routes.get(session.epoch)
            waits = live is None and not session.finishing
            if waits or (live is not None and live.is_full):
                continue
            full = self._full_route(session)
            if full is not None:
                self.open_on(session, full)
                self.state.publish(INTEGRITY, "VerificationResumed", request=request)

    def expire(self, now: float) -> None:
        """End what has waited too long to be verified."""
        limit = self.state.policy.verification_wait_s_max
        for session in list(self.state.settling.values()):
            if now - session.waiting_since >= limit:
                self._give_up(session, now)
        for request, since in list(self.unfollowed.items()):
            session_or_none = self.state.sessions.get(request)
            if session_or_none is None or now - since < limit:
                continue
            if session_or_none.delivery is Delivery.VERIFIED:
                self._give_up(session_or_none, now)

    def _give_up(self, session: Session, now: float) -> None:
        if session.delivery is Delivery.VERIFIED:
            self._acts.fail(session, unavailable(session.delivered), now)
            return
        self.state.publish(
            INTEGRITY,
            "VerificationIncomplete",
            request=session.request,
            verified_through=session.stream.verified,
        )
        self._acts.finish(session, session.finishing, now)

    # Live tokens

    def accepted(
        self, session: Session, live: LiveRoute, row: StepRow, step: int, now: float
    ) -> None:
        """A token was accepted: keep its evidence, feed its shadow."""
        if live.is_full:
            stream = session.stream
            if session.is_verifying and stream.verified == stream.accepted - 1:
                stream.verify_through(stream.accepted)  # the reference's own choice
            return
        self.consider(session, live, now)
        shadow = self.shadows.get(session.request)
        if shadow is None:
            return
        if row.token_count == 1 and shadow.boundaries:
            line = Line(live.route.workers, row.marks, live.epoch, step)
            shadow.lines.note_line(row.first_position, line)
        self.state.work_changed.add(shadow.epoch)

    def deliver(self, session: Session) -> None:
        """Emit what may be seen and was not yet."""
        count = len(session.undelivered)
        if session.delivery is Delivery.VERIFIED and session.is_verifying:
            count = min(count, session.stream.verified - session.delivered)
        if count <= 0:
            return
        chunks = tuple(session.undelivered[:count])
        del session.undelivered[:count]
        first, session.delivered = session.delivered, session.delivered + count
        self.state.emit(AcceptTokens(session.request, first, chunks, session.stream.verified))

    def must_wait(self, session: Session) -> bool:
        """Whether a complete answer is not to be ended before it is verified."""
        if not session.is_verifying or session.is_verified:
            return False
        return session.delivery is Delivery.VERIFIED or session.request in self.shadows

    # What comes back

    def returned(
        self, full: LiveRoute, asked: SentRow, row: StepRow, kind: FrameKind, now: float
    ) -> list[Loss]:
        """A shadow's row has come back from the full worker."""
        shadow = asked.shadow
        if shadow is None or shadow.ended or asked.attempt != shadow.attempt:
            return []
        if shadow.why is not Why.ASKED:
            self.budget.spend(full.scheduler.last_step_s)
        shadow.in_flight = False
        self.state.work_changed.add(full.epoch)
        end = row.end_position
        if row.status is not RowStatus.OK or not shadow.marks_fit(row.marks, end):
            said = row.fault_detail or "the full worker's account of its cache is wrong"
            self._stumbled(full, shadow, f"{row.status.name}: {said}", now)
            return []
        losses: list[Loss] = []
        if kind is FrameKind.SCORE:
            losses = self._judge(full, shadow, row, now)
        if not shadow.ended:
            shadow.held = end
            losses += self._go_on(full, shadow, now)
        return losses

    def _stumbled(self, full: LiveRoute, shadow: Shadow, detail: str, now: float) -> None:
        """The full worker lost a shadow's cache, or refused it."""
        session = shadow.session
        self.state.count("shadows_lost")
        self.state.publish(
            INTEGRITY,
            "ShadowLost",
            request=shadow.request,
            worker=full.route.names[-1],
            detail=detail,
        )
        if shadow.restarts < SHADOW_RESTARTS_MAX:
            shadow.start_over()
            return
        was_taking_over = shadow.taking_over
        self.drop(shadow.request)
        if was_taking_over and session.epoch == full.epoch:
            full.scheduler.restart(session)
        elif shadow.why is Why.ASKED and not session.has_ended:
            self._degraded(session, detail, now)

    def _judge(self, full: LiveRoute, shadow: Shadow, row: StepRow, now: float) -> list[Loss]:
        """Compare the scores with what was emitted."""
        session = shadow.session
        stream, base = session.stream, session.prompt_length
        shadow.lines.note_digests(row.digests)
        emitted = stream.tokens(row.first_position, row.end_position)
        result, findings = self.detector.check_scores(
            row.scores,
            emitted,
            first_position=row.first_position,
            worker=session.route[-1] if session.route else "",
            request=session.request,
            tolerance=self._tolerance(session),
        )
        if result.mismatch is None and result.checked < row.token_count:
            self._stumbled(full, shadow, "tokens came back without a score", now)
            return []
        before = stream.verified
        if session.is_verifying and stream.verify_through(result.verified_to - base) > before:
            self._advanced(session)
        shadow.lines.forget_before(result.verified_to - 1)
        if result.mismatch is None:
            return []
        return self._mismatch(full, shadow, findings[0], now)

    def _tolerance(self, session: Session) -> float:
        """In score units: sampling divides logits by the temperature."""
        if self._is_exact():
            return 0.0
        temperature = session.demand.sampling.temperature
        tolerance = self.state.policy.shadow_tolerance
        return tolerance / temperature if temperature > 0.0 else tolerance

    def _is_exact(self) -> bool:
        """Whether every worker of the mesh has bit-exact kernels. All of them: an answer may have
        come over any."""
        return all(EXACT in record.info.capabilities for record in self.state.workers.values())

    def _advanced(self, session: Session) -> None:
        """The watermark has moved."""
        if session.has_ended:
            return
        delivered = session.delivered
        self.deliver(session)
        if session.delivered == delivered:
            self.state.emit(AdvanceVerified(session.request, session.stream.verified))

    def _go_on(self, full: LiveRoute, shadow: Shadow, now: float) -> list[Loss]:
        """Everything there is was scored: end what waits for that, take over what moves here."""
        session = shadow.session
        if session.finishing and session.is_verified:
            self._acts.finish(session, session.finishing, now)
        elif shadow.is_done and session.has_ended:
            self.drop(shadow.request)  # also one that was to go on here, and was ended meanwhile
        elif shadow.is_done and shadow.taking_over:
            self._hand_over(full, shadow)
        return []

    def _hand_over(self, full: LiveRoute, shadow: Shadow) -> None:
        """The request goes on where its shadow stands."""
        session = shadow.session
        del self.shadows[shadow.request]
        shadow.ended = True
        full.scheduler.hand_over(session, shadow)
        self.state.work_changed.add(full.epoch)
        if session.recovering is not None:
            behind = session.stream.next_position - shadow.taken_at
            session.recovering.replayed = max(behind, 1)

    def take_over(self, session: Session, full: LiveRoute, now: float) -> bool:
        """The request was placed on a full worker's route. True if it goes on behind its shadow
        there; False if it should be fed like any other."""
        shadow = self.shadows.get(session.request)
        unverified = session.is_verifying and session.accepted_count > session.stream.verified
        if shadow is not None and (shadow.epoch != full.epoch or not (shadow.fed or unverified)):
            self.drop(session.request)
            shadow = None
        if shadow is None:
            if not unverified:
                return False
            shadow = self.open_on(session, full)
        shadow.taking_over, shadow.taken_at = True, shadow.held
        full.scheduler.admit_behind(session, shadow, now)
        if shadow.is_done:
            self._hand_over(full, shadow)
        return True

    def preferred(self, session: Session) -> LiveRoute | None:
        """The full worker's route on which a corrected request should go on."""
        shadow = self.shadows.get(session.request)
        if shadow is None or not session.prefers_shadow:
            return None
        if self.state.policy.fallback is FallbackPolicy.FORBID:
            return None
        full = self.state.routes.get(shadow.epoch)
        return full if full is not None and full.phase is RoutePhase.OPEN else None

    # A wrong token

    def _mismatch(
        self, full: LiveRoute, shadow: Shadow, finding: Finding, now: float
    ) -> list[Loss]:
        """The full worker rejects a token: correct the answer and find who is to blame."""
        session, position = shadow.session, finding.position
        source = self._source_of(shadow, position)
        difference = self._difference(shadow, position, source)
        worker = difference.worker if difference is not None else ""
        self.state.publish(
            INTEGRITY,
            "ShadowMismatch",
            request=session.request,
            worker=worker,
            position=position - session.prompt_length,
            epoch=difference.epoch if difference else session.epoch,
            reference=full.route.names[-1],
            detail=finding.detail,
        )
        losses: list[Loss] = []
        if difference is not None:
            losses = self._blame(difference.worker, difference.epoch, difference.step, finding)
        else:
            self._examine(full, session, position)
        if session.has_ended or position >= shadow.limit:
            self.drop(shadow.request)
        elif position < session.prompt_length + session.stream.verified:
            # Another full worker has confirmed it, and that was told: it stays.
            self._stumbled(full, shadow, "rejects what was verified before", now)
        else:
            self._correct(full, shadow, position, worker, finding.detail, now)
        return losses

    def _source_of(self, shadow: Shadow, position: int) -> Line | None:
        """The line that yielded the token at ``position``, or one near it."""
        return shadow.lines.last_line(position - 1) or shadow.lines.last_line(position)

    def _difference(self, shadow: Shadow, position: int, source: Line | None) -> Difference | None:
        """Who the checksums say it was. All boundaries equal: the last stage, behind the last
        boundary."""
        if not shadow.boundaries:
            return None
        if shadow.lines.first is not None:
            return shadow.lines.first
        if source is None or shadow.lines.compared < position - 1:
            return None
        return Difference(position, source.workers[-1].name, source.epoch, source.step)

    def _blame(self, worker: str, epoch: int, step: int, finding: Finding) -> list[Loss]:
        """Count it against the worker; one too many ends its route. Its route's next streams are
        audited."""
        live = self.state.routes.get(epoch)
        if live is not None:
            live.audited = 0
        if not self.state.recovery.corrupted(WorkerName(worker), epoch, step):
            return []
        return [Loss(epoch, "QUARANTINED", worker, finding.detail)] if live is not None else []

    def _correct(
        self, full: LiveRoute, shadow: Shadow, position: int, worker: str, detail: str, now: float
    ) -> None:
        """Withdraw the token and everything behind it, and go on with the full worker."""
        session, index = shadow.session, position - shadow.session.prompt_length
        fault = RequestFault(FaultKind.MISCOMPUTED, SHADOW_MISMATCH, worker, detail)
        rung = self.state.recovery.choose(session, fault, now)
        self.state.settling.pop(session.request, None)
        session.withdraw_from(position)
        if session.corrected_from is not None:
            session.corrected_from = None
            self.state.emit(CorrectTokens(session.request, index, SHADOW_MISMATCH))
        shadow.lines.withdraw(position)
        live = self.state.routes.get(session.epoch) if session.epoch else None
        self._acts.begin_recovery(session, fault, rung, now)
        if rung is Rung.FAIL:
            self._acts.fail(session, TokenRejected(detail, worker=worker or None), now)
            return
        if live is full:
            self._hand_over(full, shadow)
            return
        if live is not None:
            live.scheduler.remove(session)
            self.state.work_changed.add(live.epoch)
        in_line = session in self.state.fallback.displaced or session in self.state.queue
        session.avoid_epoch = live.epoch if live is not None else session.avoid_epoch
        session.prefers_shadow = True
        shadow.held = shadow.fed
        if not in_line:
            self._acts.displace(session, now)

    # Who it was, where checksums cannot tell

    def _examine(self, full: LiveRoute, session: Session, position: int) -> None:
        live = self.state.routes.get(session.epoch) if session.epoch else None
        if live is None or live.is_full or len(self._examinations) >= EXAMINATIONS_MAX:
            return
        if "boundaries" not in full.route.workers[0].capabilities:
            return
        policy = self.state.policy
        token_ids = session.stream.tokens(0, min(position, policy.examine_tokens_max))
        one = Examination(
            token_ids=token_ids,
            workers=live.route.workers,
            epochs=(live.epoch, full.epoch),
            tolerance=policy.boundary_tolerance,
            request=session.request,
            position=position,
        )
        self._examinations.append(one)
        for route in (live, full):
            route.scheduler.probe(token_ids, one.boundaries)
            self.state.work_changed.add(route.epoch)

    def examined(self, live: LiveRoute, frame: StepFrame, now: float) -> list[Loss]:
        """One route's account of an examination."""
        row = frame.rows[0]
        for one in self._examinations:
            if live.epoch in one.epochs and row.token_ids == one.token_ids:
                chosen = row.token.token_id if row.token is not None else -1
                one.answers[live.epoch] = (row.digests, chosen)
                culprit = one.culprit()
                if culprit is None:
                    return []
                self._examinations.remove(one)
                return self._concluded(one, culprit, frame.step)
        return []

    def _concluded(self, one: Examination, culprit: str, step: int) -> list[Loss]:
        self.state.publish(
            INTEGRITY,
            "ShadowExamined",
            request=one.request,
            worker=culprit,
            epoch=one.epochs[0],
            position=one.position,
            detail="" if culprit else "computed again, every stage agrees with the full worker",
        )
        if not culprit:
            return []
        self._name_culprit(one.request, culprit)
        detail = "computes otherwise than the full worker"
        finding = Finding(
            Corruption.SEMANTIC_SUSPICION, -1, -1, culprit, one.request, one.position, detail
        )
        return self._blame(culprit, one.epochs[0], step, finding)

    def _name_culprit(self, request: bytes, culprit: str) -> None:
        """Into the recovery record that this mismatch began."""
        session = self.state.sessions.get(request) or self.state.ended.get(request)
        if session is None:
            return
        pending = session.recovering
        if pending is not None and pending.cause == SHADOW_MISMATCH and not pending.worker:
            pending.worker = culprit
        for index, record in enumerate(session.recoveries):
            if record.cause == SHADOW_MISMATCH and not record.worker:
                session.recoveries[index] = replace(record, worker=culprit)
