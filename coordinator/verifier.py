"""Judges what the shadows of a mesh bring back, and corrects answers.

A token the full worker would not have chosen (by more than the tolerance) is *rejected*: it and all
behind it are withdrawn, the client is told where it saw them, and the request moves to the full
worker, whose cache holds everything verified. The full worker is the reference by declaration: it
computes alone, and is not doubted here. Which stage is to blame is found out by ``Examiner``.

Who has a shadow is ``ShadowBook``'s. Answers that are delivered when verified wait where there can
be none, and fail with VERIFICATION_UNAVAILABLE in the end; others go on and end unverified.
"""

from __future__ import annotations

from coordinator.corruption_detector import CorruptionDetector
from coordinator.endings import Endings
from coordinator.events import Delivery
from coordinator.examiner import Examiner
from coordinator.instructions import AcceptTokens, AdvanceVerified, CorrectTokens
from coordinator.ladder import Ladder
from coordinator.membership import Loss
from coordinator.mesh_state import INTEGRITY, MeshState
from coordinator.recovery import FaultKind, RequestFault, Rung
from coordinator.route import LiveRoute, RoutePhase
from coordinator.session import Session
from coordinator.settings import FallbackPolicy
from coordinator.shadow import SHADOW_MISMATCH, Line, Shadow, Why, unavailable
from coordinator.shadow_book import ShadowBook
from coordinator.step_book import SentRow
from coordinator.token_validator import Finding
from stagemesh.errors import TokenRejected
from stagemesh.frame import FrameKind, RowStatus, StepRow
from stagemesh.token import ValidationStatus

SHADOW_RESTARTS_MAX = 2
"""Times in a row that a shadow may begin anew on one route before it is given up there."""


class Verifier:
    """See the module."""

    def __init__(
        self, state: MeshState, shadows: ShadowBook, endings: Endings, ladder: Ladder
    ) -> None:
        self.state, self._shadows = state, shadows
        self._endings, self._ladder = endings, ladder
        self.examiner = Examiner(state)
        self.detector = CorruptionDetector(state.policy.shadow_tolerance, counters=state.counters)

    # Waiting to be verified

    def expire(self, now: float) -> None:
        """End what has waited too long to be verified."""
        limit = self.state.policy.verification_wait_s_max
        for session in list(self.state.settling.values()):
            if now - session.waiting_since >= limit:
                self._give_up(session, now)
        for request, since in list(self._shadows.unfollowed.items()):
            waiting = self.state.sessions.get(request)
            if waiting is None or now - since < limit:
                continue
            if waiting.delivery is Delivery.VERIFIED:
                self._give_up(waiting, now)

    def _give_up(self, session: Session, now: float) -> None:
        if session.delivery is Delivery.VERIFIED:
            self._endings.fail(session, unavailable(session.delivered), now)
            return
        self.finish(session, session.finishing, now)

    def finish(self, session: Session, reason: str, now: float) -> None:
        """The answer ends, whether or not it was verified as it asked."""
        if session.is_verifying and not session.is_verified:
            self.state.publish(
                INTEGRITY,
                "VerificationIncomplete",
                request=session.request,
                verified_through=session.stream.verified,
            )
        self._endings.finish(session, reason, now)

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
        self._shadows.consider(session, live, now)
        shadow = self._shadows.open.get(session.request)
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
        return session.delivery is Delivery.VERIFIED or session.request in self._shadows.open

    # What comes back

    def returned(
        self, full: LiveRoute, asked: SentRow, row: StepRow, kind: FrameKind, now: float
    ) -> list[Loss]:
        """A shadow's row has come back from the full worker."""
        shadow = asked.shadow
        if shadow is None or shadow.ended or asked.attempt != shadow.attempt:
            return []
        if shadow.why is not Why.ASKED:
            self._shadows.budget.spend(full.scheduler.steps.last_step_s)
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
        if asked.attempt == shadow.attempt and not shadow.ended:
            shadow.held = end
            self._go_on(full, shadow, now)
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
        was_taking_over, session.given_up_epoch = shadow.taking_over, full.epoch
        self._shadows.drop(shadow.request)
        if was_taking_over and session.epoch == full.epoch:
            self._go_on_without(full, session)
        elif shadow.why is Why.ASKED and not session.has_ended:
            self._shadows.degraded(session, detail, now)

    def _go_on_without(self, full: LiveRoute, session: Session) -> None:
        """Its shadow there is lost for good: it is fed like any other. Tokens that may only be seen
        when they are verified, and never will be now, the full worker makes itself."""
        if session.is_verifying and session.delivery is Delivery.VERIFIED:
            session.withdraw_from(session.prompt_length + session.stream.verified)
            if session.recovering is not None:
                session.recovering.kept = min(session.recovering.kept, session.accepted_count)
        full.scheduler.restart(session)
        self._ladder.goes_to(session, full, session.pending)

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
            shadow.restarts = 0
            self._advanced(session)
        shadow.lines.forget_before(result.verified_to - 1)
        if result.mismatch is None:
            return []
        return self._mismatch(full, shadow, findings[0], now)

    def _tolerance(self, session: Session) -> float:
        """In score units: sampling divides logits by the temperature."""
        if self.state.is_exact:
            return 0.0
        temperature = session.demand.sampling.temperature
        tolerance = self.state.policy.shadow_tolerance * self.state.rounding
        return tolerance / temperature if temperature > 0.0 else tolerance

    def _advanced(self, session: Session) -> None:
        """The watermark has moved."""
        if session.has_ended:
            return
        delivered = session.delivered
        self.deliver(session)
        if session.delivered == delivered:
            self.state.emit(AdvanceVerified(session.request, session.stream.verified))

    def _go_on(self, full: LiveRoute, shadow: Shadow, now: float) -> None:
        """Everything there is was scored: end what waits for that, take over what moves here."""
        session = shadow.session
        if session.finishing and session.is_verified:
            self._endings.finish(session, session.finishing, now)
        elif shadow.is_done and session.has_ended:
            # Also one that was to go on here, and was ended meanwhile.
            self._shadows.drop(shadow.request)
        elif shadow.is_done and shadow.taking_over:
            self._hand_over(full, shadow)

    def _hand_over(self, full: LiveRoute, shadow: Shadow) -> None:
        """The request goes on where its shadow stands."""
        session = shadow.session
        self._shadows.let_go(shadow)
        full.scheduler.hand_over(session, shadow)
        self.state.work_changed.add(full.epoch)
        if session.recovering is not None:
            behind = session.stream.next_position - shadow.taken_at
            session.recovering.replayed = max(behind, 1)

    def take_over(self, session: Session, full: LiveRoute, now: float) -> bool:
        """The request was placed on a full worker's route. True if it goes on behind its shadow
        there; False if it should be fed like any other."""
        shadow = self._shadows.open.get(session.request)
        unverified = session.is_verifying and session.accepted_count > session.stream.verified
        if shadow is not None and (shadow.epoch != full.epoch or not (shadow.fed or unverified)):
            self._shadows.drop(session.request)
            shadow = None
        if shadow is None:
            if not unverified:
                self._shadows.unfollowed.pop(session.request, None)  # verified as it is made
                return False
            shadow = self._shadows.open_on(session, full)
        shadow.taking_over, shadow.taken_at = True, shadow.held
        full.scheduler.admit_behind(session, shadow, now)
        if shadow.is_done:
            self._hand_over(full, shadow)
        return True

    def preferred(self, session: Session) -> LiveRoute | None:
        """The full worker's route on which a corrected request should go on."""
        shadow = self._shadows.open.get(session.request)
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
        """The full worker rejects a token: find who is to blame, and correct the answer. What was
        told for good stays, in doubt."""
        session, position = shadow.session, finding.position
        difference = self.examiner.difference(shadow, position)
        worker = difference.worker if difference is not None else ""
        is_over = session.has_ended or position >= shadow.limit
        was_verified = position < session.prompt_length + session.stream.verified
        stays = is_over or was_verified
        status = ValidationStatus.SUSPECT if stays else ValidationStatus.REJECTED
        self.state.publish(
            INTEGRITY,
            "ShadowMismatch",
            request=session.request,
            worker=worker,
            status=status.name,
            position=position - session.prompt_length,
            epoch=difference.epoch if difference else session.epoch,
            reference=full.route.names[-1],
            detail=finding.detail,
        )
        losses: list[Loss] = []
        if difference is not None:
            losses = self.examiner.blame(
                difference.worker, difference.epoch, difference.step, finding.detail
            )
        else:
            self.examiner.examine(full, session, position)
        if is_over:
            self._shadows.drop(shadow.request)
        elif was_verified:  # by another full worker, and that was told
            self._stumbled(full, shadow, "rejects what was verified before", now)
        else:
            self._correct(full, shadow, position, worker, finding.detail, now)
        return losses

    def _correct(
        self, full: LiveRoute, shadow: Shadow, position: int, worker: str, detail: str, now: float
    ) -> None:
        """Withdraw the token and everything behind it, and go on with the full worker; where policy
        denies that, on another pipeline, or on this one if it is the only one."""
        session, index = shadow.session, position - shadow.session.prompt_length
        fault = RequestFault(FaultKind.MISCOMPUTED, SHADOW_MISMATCH, worker, detail)
        self.state.settling.pop(session.request, None)
        session.withdraw_from(position)
        # Behind that: what is withdrawn again and again is no progress.
        rung = self.state.recovery.choose(session, fault, now)
        if session.corrected_from is not None:
            session.corrected_from = None
            self.state.emit(CorrectTokens(session.request, index, SHADOW_MISMATCH))
        shadow.lines.withdraw(position)
        live = self.state.routes.get(session.epoch) if session.epoch else None
        self._ladder.begin(session, fault, rung, now)
        if rung is Rung.FAIL:
            self._endings.fail(session, TokenRejected(detail, worker=worker or None), now)
            return
        if live is full:
            self._hand_over(full, shadow)
            return
        if live is not None:
            live.scheduler.remove(session)
            self.state.work_changed.add(live.epoch)
        in_line = session in self.state.fallback.displaced or session in self.state.queue
        if live is not None and self._ladder.has_alternative(live, session):
            session.avoid_epoch = live.epoch
        session.prefers_shadow = True
        shadow.held = shadow.fed
        if not in_line:
            self._ladder.displace(session, now)
