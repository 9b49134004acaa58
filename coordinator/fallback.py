"""Where a request goes: the first time, and after its route was lost.

New requests prefer the pipeline, and wait a moment for one that is being opened; displaced requests
(their route is gone, but their tokens are not) go before new ones. A displaced request moves to a
pipeline formed with spare stages if policy prefers that and one is coming, else to a full worker,
where its prompt and accepted tokens are prefilled and decoding goes on at the next position.

Overload of the full worker is bounded three ways: displaced requests computed there at once,
displaced requests waiting, and the time each may wait. The line is first come, first served, which
is fair because a request that was served takes its place behind nobody: it is then in the route's
own round robin. New requests do not count against that bound, and take no room on a route that has
too little for a displaced one that waits for it: else a steady stream of them would starve it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from coordinator.route import LiveRoute, RoutePhase
from coordinator.session import Session
from coordinator.settings import FallbackPolicy, MeshPolicy


@dataclass(frozen=True, slots=True)
class Choice:
    """A route, or why there is none now. ``hopeless``: no route of now or soon could ever hold
    it."""

    route: LiveRoute | None
    reason: str = ""
    hopeless: bool = False


@dataclass(slots=True)
class FallbackCoordinator:
    """See the module. ``displaced`` is the line of requests between two routes."""

    policy: MeshPolicy
    displaced: deque[Session] = field(default_factory=deque)

    def enqueue(self, session: Session) -> bool:
        """Line up a displaced request; False if the line is full."""
        if len(self.displaced) >= self.policy.fallback_queue_max:
            return False
        self.displaced.append(session)
        return True

    def overdue(self, now: float) -> list[Session]:
        """Take out every displaced request that has waited too long."""
        limit = self.policy.fallback_wait_s_max
        late: list[Session] = []
        while self.displaced and now - self.displaced[0].waiting_since >= limit:
            late.append(self.displaced.popleft())
        return late

    def choose(
        self,
        session: Session,
        routes: Iterable[LiveRoute],
        now: float,
        *,
        has_stages: bool,
        warm_epoch: int = 0,
    ) -> Choice:
        """The best route for this request now. ``has_stages``: some worker hosts less than the
        model; ``warm_epoch``: the full worker's route on which it has a shadow, and so a cache."""
        usable = [route for route in routes if self._may_use(session, route, has_stages)]
        open_routes = [route for route in usable if route.phase is RoutePhase.OPEN]
        if self._should_wait(session, usable, open_routes, now):
            return Choice(None, "a pipeline is being opened")
        if not open_routes:
            return Choice(None, "no route is open")
        if all(_never_fits(session, route) for route in usable):
            return Choice(None, "no route has a cache that large", hopeless=True)
        fitting = [route for route in open_routes if self._has_room(session, route)]
        if session.recovering is None:
            fitting = [route for route in fitting if not self._is_awaited(route, has_stages)]
        if not fitting:
            return Choice(None, "every open route is full")
        return Choice(min(fitting, key=lambda route: _preference(route, warm_epoch)))

    def _may_use(self, session: Session, route: LiveRoute, has_stages: bool) -> bool:
        if not route.is_alive or route.epoch == session.avoid_epoch:
            return False
        return self.allows(route, has_stages)

    def could_serve(self, session: Session, route: LiveRoute, has_stages: bool) -> bool:
        """Whether this route, once it is open and has room, could compute the request."""
        is_allowed = route.is_alive and self.allows(route, has_stages)
        return is_allowed and not _never_fits(session, route)

    def allows(self, route: LiveRoute, has_stages: bool) -> bool:
        """Whether policy lets requests use this route at all."""
        forbidden = self.policy.fallback is FallbackPolicy.FORBID and has_stages
        return not (route.is_full and forbidden)

    def _should_wait(
        self,
        session: Session,
        usable: list[LiveRoute],
        open_routes: list[LiveRoute],
        now: float,
    ) -> bool:
        if any(not route.is_full for route in open_routes):
            return False
        if session.recovering and self.policy.fallback is FallbackPolicy.ALLOW:
            return False
        displaced = session.recovering is not None
        limit = self.policy.spare_wait_s_max if displaced else self.policy.pipeline_wait_s_max
        return any(not route.is_full and now - route.began_at < limit for route in usable)

    def _has_room(self, session: Session, route: LiveRoute) -> bool:
        if not route.scheduler.fits(session):
            return False
        if route.is_full and session.recovering:
            moved = sum(one.was_recovered for one in route.scheduler.sessions.values())
            return moved < self.policy.fallback_requests_max
        return True

    def _is_awaited(self, route: LiveRoute, has_stages: bool) -> bool:
        """Whether a displaced request waits for room on this route."""
        return any(
            self._may_use(one, route, has_stages)
            and not _never_fits(one, route)
            and not self._has_room(one, route)
            for one in self.displaced
        )


def _never_fits(session: Session, route: LiveRoute) -> bool:
    budget = route.scheduler.kv_budget_tokens
    return budget is not None and session.reserve_tokens > budget


def _preference(route: LiveRoute, warm_epoch: int) -> tuple[bool, bool, bool, int, int]:
    """Routes without doubt first, then pipelines, then where its cache is, then the least loaded,
    then the older."""
    is_cold = route.epoch != warm_epoch
    return (route.suspect, route.is_full, is_cold, len(route.scheduler.sessions), route.epoch)
