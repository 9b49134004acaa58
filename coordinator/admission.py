"""At the door: which requests are taken, and until when each has to have ended."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator

from coordinator.mesh_state import MeshState
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
