"""Who of a mesh's requests is shadowed, and by which full worker.

Shadowed are requests that asked for it, the first streams of a route that was just opened, streams
that had a recovery, and a sample of the others within a budget of compute. Requests that asked are
paid for by whoever allowed it; everything else is charged to ``AuditBudget``.

A full worker that dies takes its shadows along. What asked for verification is then *degraded*: its
watermark stands still until another full worker is there, which starts from the prompt.

What shadows bring back is judged by ``Verifier``.
"""

from __future__ import annotations

from coordinator.audit_budget import AuditBudget
from coordinator.events import Delivery
from coordinator.mesh_state import INTEGRITY, MeshState
from coordinator.route import LiveRoute, RoutePhase
from coordinator.session import Session
from coordinator.shadow import Shadow, Why
from stagemesh.checksum import crc32c
from stagemesh.frame import FrameKind


class ShadowBook:
    """See the module. ``open``: shadows by request; ``unfollowed``: requests that asked for one and
    have none, since when."""

    def __init__(self, state: MeshState) -> None:
        self.state = state
        self.budget = AuditBudget(state.policy.audit_budget)
        self.open: dict[bytes, Shadow] = {}
        self.unfollowed: dict[bytes, float] = {}

    def placed(self, session: Session, now: float) -> None:
        """A request has a route. What is delivered only when verified is shadowed from its
        beginning; everything else from its first token, so that the prompt is not computed twice
        at once. A shadow that it has already goes on, and looks at this route's boundaries too."""
        live = self.state.routes.get(session.epoch)
        if live is None or live.is_full:
            return
        shadow = self.open.get(session.request)
        if shadow is not None and shadow.boundaries:
            shadow.boundaries = tuple(sorted({*shadow.boundaries, *self._boundaries_of(session)}))
        elif shadow is None and session.delivery is Delivery.VERIFIED and session.is_verifying:
            self._follow(session, now)

    def consider(self, session: Session, live: LiveRoute, now: float) -> None:
        """Another token was accepted on a pipeline: should this request have a shadow?"""
        if session.request in self.open:
            return
        if session.is_verifying:
            if session.request not in self.unfollowed:
                self._follow(session, now)
            return
        if session.considered_epoch == live.epoch:
            return
        session.considered_epoch = live.epoch
        full = self._full_route(session)
        if full is None:
            return
        why = self._worth_auditing(session, live, full)
        if why is not None:
            self.open_on(session, full, why)
            live.audited += why is Why.NEW_ROUTE

    def _worth_auditing(self, session: Session, live: LiveRoute, full: LiveRoute) -> Why | None:
        policy = self.state.policy
        if policy.audit_budget <= 0.0:
            return None
        if live.audited < policy.audit_first_streams:
            return Why.NEW_ROUTE
        if session.was_recovered:
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
            and live.epoch != session.given_up_epoch
            and live.scheduler.has_room(session.reserve_tokens)
        ]
        return min(routes, key=lambda live: (live.scheduler.load, live.epoch), default=None)

    def _follow(self, session: Session, now: float) -> None:
        """It asked to be verified."""
        full = self._full_route(session)
        if full is None:
            self.degraded(session, "no full worker has room", now)
        else:
            self.open_on(session, full)

    def open_on(self, session: Session, full: LiveRoute, why: Why = Why.ASKED) -> Shadow:
        """A shadow of ``session`` on this full worker's route."""
        self.drop(session.request)
        shadow = Shadow(session, full.epoch, why)
        if "boundaries" in full.route.workers[0].capabilities:
            shadow.boundaries = self._boundaries_of(session)
        self.open[session.request] = shadow
        self.unfollowed.pop(session.request, None)
        full.scheduler.add_shadow(shadow)
        self.state.work_changed.add(full.epoch)
        return shadow

    def _boundaries_of(self, session: Session) -> tuple[int, ...]:
        live = self.state.routes.get(session.epoch)
        if live is None or not self.state.is_exact:
            return ()  # checksums of kernels that are not bit-exact say nothing
        return tuple(worker.span.last for worker in live.route.workers[:-1])

    def make_way(self, session: Session, live: LiveRoute) -> None:
        """The request goes on on this route: audits end that hold the room it needs."""
        for shadow in live.scheduler.audits_in_the_way(session):
            self.drop(shadow.request)

    def degraded(self, session: Session, why: str, now: float) -> None:
        """What asked to be verified has lost its shadow, or found no room for one."""
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
        shadow = self.open.get(request)
        if shadow is None:
            return
        self.let_go(shadow)
        full = self.state.routes.get(shadow.epoch)
        if full is not None:
            full.scheduler.drop_shadow(shadow)
            self.state.work_changed.add(full.epoch)

    def let_go(self, shadow: Shadow) -> None:
        """Forget a shadow whose cache is gone, or is now the request's own."""
        del self.open[shadow.request]
        shadow.ended = True

    def ended(self, session: Session, *, completed: bool) -> None:
        """A request is over. An audit nobody waits for goes on to the end of what was computed."""
        self.unfollowed.pop(session.request, None)
        shadow = self.open.get(session.request)
        if shadow is None:
            return
        if not completed or shadow.why is Why.ASKED or shadow.is_done:
            self.drop(session.request)
        else:
            self.state.work_changed.add(shadow.epoch)

    def route_closed(self, live: LiveRoute, now: float) -> None:
        """Shadows on that route are gone with it."""
        for shadow in [one for one in self.open.values() if one.epoch == live.epoch]:
            self.let_go(shadow)
            if shadow.why is Why.ASKED and not shadow.session.has_ended:
                self.degraded(shadow.session, f"the full worker is gone: {live.reason}", now)

    def find_routes(self) -> None:
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
