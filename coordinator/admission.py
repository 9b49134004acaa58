"""At the door: which requests are taken, how long they may wait for a route, and until when they
have to have ended."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator

from coordinator.mesh_state import MeshState, WorkerState
from coordinator.route import RoutePhase, explain_cover
from coordinator.session import Session
from stagemesh import errors
from stagemesh.errors import MeshError

DEADLINES_OVER_MAX = 1024
"""Deadlines of ended requests that may be kept, beyond as many as there are live ones."""


def refusal(session: Session, state: MeshState) -> MeshError | None:
    """Why a request that has just come is not taken; None if it is."""
    demand, policy = session.demand, state.policy
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
    if state.is_draining:
        return errors.Overloaded("the mesh is shutting down", retry_after_s=5.0)
    was_running = demand.recovered and not demand.resumed_after
    if len(state.queue) >= policy.queue_length_max and not was_running:
        return errors.Overloaded(
            "the queue is full",
            retry_after_s=policy.retry_after_s,
            queue_length=len(state.queue),
        )
    return None


def waited_too_long(session: Session, state: MeshState, now: float) -> MeshError | None:
    """Why a queued request is not kept waiting any longer; None if it is."""
    policy, waited = state.policy, now - session.waiting_since
    if _is_served(state):
        if waited < policy.queue_wait_s_max:
            return None
        return errors.Overloaded("waited too long", retry_after_s=policy.retry_after_s)
    return None if waited < policy.route_wait_s_max else no_route(state, "no route in time")


def larger_may_come(session: Session, state: MeshState, now: float) -> bool:
    """Whether a request that no route of now could hold is kept waiting for one that could: for as
    long as it would wait for any, if it was begun (by a route that held it, so its workers may be
    back in a moment), or if there may be a pipeline yet."""
    if session.admitted_at is not None:
        return True  # how long it may stand in the line is seen to there
    if now - session.waiting_since >= state.policy.route_wait_s_max:
        return False
    return session.recovering is not None or _pipeline_may_come(state, now)


def _pipeline_may_come(state: MeshState, now: float) -> bool:
    """Whether the mesh has just begun to form, or workers that are there only have to form one."""
    first_at = state.first_worker_at
    if first_at is None or state.model is None:
        return True
    if any(not live.is_full and live.is_alive for live in state.routes.values()):
        return False
    if not state.had_pipeline and now - first_at < state.policy.route_wait_s_max:
        return True
    there = [one for one in state.workers.values() if one.connected and not one.info.is_full]
    spans = [one.info.span for one in there if one.state is not WorkerState.DRAINING]
    return not explain_cover(spans, state.model.layer_count)


def no_route(state: MeshState, message: str) -> MeshError:
    """There is none for a request, and why, if there is none at all."""
    return errors.RouteUnavailable(message, cause=why_not_ready(state) or None)


def why_not_ready(state: MeshState) -> str:
    """Why no route serves requests; "" if one does."""
    if _is_served(state):
        return ""
    if not state.workers or state.model is None:
        return "no worker has registered"
    allowed = [one for one in state.routes.values() if state.fallback.allows(one, state.has_stages)]
    opening = next((live for live in allowed if live.is_alive), None)
    if opening is not None:
        return f"a route is {opening.phase.value}"
    usable = [r.info for r in state.workers.values() if r.may_be_planned]
    spans = [info.span for info in usable if not info.is_full]
    said = explain_cover(spans, state.model.layer_count) or "workers are held back after a failure"
    if any(live.phase is RoutePhase.OPEN for live in state.routes.values()):
        return f"{said}, and fallback is forbidden"
    return said


def _is_served(state: MeshState) -> bool:
    """Whether a route is open that policy lets requests use."""
    return any(
        live.phase is RoutePhase.OPEN and state.fallback.allows(live, state.has_stages)
        for live in state.routes.values()
    )


class Deadlines:
    """When live requests have to have ended, soonest first; and the mesh's wake-up for each.

    An answer takes seconds, and its deadline may be an hour away: deadlines of what has ended are
    swept out when there are too many of them.
    """

    def __init__(self, state: MeshState) -> None:
        self._state = state
        self._heap: list[tuple[float, bytes]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def __contains__(self, request: bytes) -> bool:
        return any(one == request for _, one in self._heap)

    def add(self, deadline: float, request: bytes) -> None:
        """A request was taken."""
        heapq.heappush(self._heap, (deadline, request))
        self._state.wake(deadline)
        if len(self._heap) > DEADLINES_OVER_MAX + 2 * len(self._state.sessions):
            self._sweep()

    def passed(self, now: float) -> Iterator[Session]:
        """Live requests whose deadline has passed, each once."""
        while self._heap and self._heap[0][0] <= now:
            deadline, request = heapq.heappop(self._heap)
            if self._is_due(deadline, request):
                yield self._state.sessions[request]

    def _sweep(self) -> None:
        gone = Counter(when for when, request in self._heap if not self._is_due(when, request))
        self._heap = [one for one in self._heap if self._is_due(*one)]
        heapq.heapify(self._heap)
        self._state.let_sleep(gone)

    def _is_due(self, deadline: float, request: bytes) -> bool:
        """Whether it is still that request's; an id may be asked again with another deadline."""
        session = self._state.sessions.get(request)
        return session is not None and session.demand.deadline == deadline
