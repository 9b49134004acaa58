"""Which workers can serve together, and one route's life.

A *pipeline* is an exact, disjoint cover of every layer by two or more workers of the same model
(equal fingerprint, dtype and layer count); a *full route* is one full worker. Planning is a
shortest path over layer boundaries: from boundary ``b`` a worker whose span starts at ``b`` leads
to its end. A worker that failed before costs more, so that a spare is preferred over a worker that
keeps failing.

A route's life is one way:

    OPENING  -barrier complete-->  LINKING  -link up-->  PROBING  -probes agree-->  OPEN
    OPEN     -drain-->             DRAINING
    any      -failure, empty drain-->  CLOSED       its epoch is fenced and never used again
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from coordinator.scheduler import RouteScheduler
from stagemesh.topology import Route, Span, WorkerInfo, WorkerName

OPEN_ROUTE_BARRIER = "open-route"
"""Name of the rendezvous of a route's workers. Each arrives with its ``fingerprint`` as a fact."""

PROBE_PROMPTS: tuple[tuple[int, ...], ...] = (
    (1, 2, 3, 5, 8, 13, 21, 3, 1, 4, 1, 5, 9, 2, 6, 5),
    (7,),
    (30, 29, 28, 27, 26, 25, 24, 23),
)
"""What every route must continue alike before it serves: ids small enough for any vocabulary,
several tokens at once and one alone, so that both shapes of forward pass are compared."""


class RoutePhase(enum.Enum):
    OPENING = "opening"
    LINKING = "linking"
    PROBING = "probing"
    OPEN = "open"
    DRAINING = "draining"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class ProbeAnswer:
    """What a route chose behind one probe prompt, and how clearly (top-1 minus top-2 logit)."""

    token_id: int
    margin: float


@dataclass(slots=True)
class LiveRoute:
    """A route and everything the coordinator knows of it. ``deadline`` ends the present phase."""

    route: Route
    scheduler: RouteScheduler
    generation: int
    deadline: float
    phase: RoutePhase = RoutePhase.OPENING
    began_at: float = 0.0
    opened_at: float = 0.0
    probe_answers: list[ProbeAnswer] = field(default_factory=list)
    reason: str = ""
    audited: int = 0
    """Streams shadowed because the route is new, or one of its stages was caught."""
    suspect: bool = False
    """One of its workers is late: other routes are preferred for new work."""

    @property
    def epoch(self) -> int:
        return self.route.epoch

    @property
    def is_full(self) -> bool:
        return self.route.stage_count == 1 and self.route.workers[0].is_full

    @property
    def is_alive(self) -> bool:
        """May serve now or soon."""
        return self.phase not in (RoutePhase.CLOSED, RoutePhase.DRAINING)

    def __str__(self) -> str:
        return f"{self.route} {self.phase.value}"


def plan_pipeline(
    workers: Iterable[WorkerInfo], *, cost: Mapping[WorkerName, float]
) -> tuple[WorkerInfo, ...] | None:
    """The cheapest exact disjoint cover by two or more workers, in stage order; None if there is
    none.

    ``cost``: penalty by worker name (absent = 0). Equal costs: fewer stages, then names, so that
    the same workers always form the same route.
    """
    stages = sorted((w for w in workers if not w.is_full), key=lambda w: (w.span.first, w.name))
    if not stages:
        return None
    layer_count = stages[0].layer_count
    best: dict[int, tuple[float, int, tuple[str, ...], tuple[WorkerInfo, ...]]] = {
        layer_count: (0.0, 0, (), ())
    }
    for worker in reversed(stages):
        rest = best.get(worker.span.last)
        if rest is None:
            continue
        penalty, count, names, tail = rest
        path = (
            penalty + cost.get(worker.name, 0.0),
            count + 1,
            (worker.name, *names),
            (worker, *tail),
        )
        held = best.get(worker.span.first)
        if held is None or path[:3] < held[:3]:
            best[worker.span.first] = path
    found = best.get(0)
    return found[3] if found else None


def explain_cover(spans: Sequence[Span], layer_count: int) -> str:
    """Why these spans form no pipeline, in words an operator can act on; "" if they do."""
    reachable, pending = {0}, [0]
    while pending:
        boundary = pending.pop()
        for span in spans:
            if span.first == boundary and span.last not in reachable:
                reachable.add(span.last)
                pending.append(span.last)
    if layer_count in reachable:
        return ""
    if not spans:
        return f"no worker hosts any of the {layer_count} layers"
    furthest = max(reachable)
    overlapping = [span for span in spans if span.first < furthest < span.last]
    if overlapping:
        return f"span {overlapping[0]} overlaps the layers before {furthest}"
    following = min((span.first for span in spans if span.first > furthest), default=layer_count)
    return f"layers {furthest}-{following} are hosted by nobody"


def probes_agree(
    ours: Sequence[ProbeAnswer], theirs: Sequence[ProbeAnswer], *, margin_tolerance: float
) -> str:
    """ "" if two routes continue the probe prompts alike; else the facts of the first disagreement.

    Different tokens are forgiven only where a route was undecided: a top-2 margin within the
    tolerance.
    """
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        undecided = min(mine.margin, other.margin) <= margin_tolerance
        if mine.token_id != other.token_id and not undecided:
            return (
                f"probe {index}: token {mine.token_id} (margin {mine.margin:.4f}) here, "
                f"token {other.token_id} (margin {other.margin:.4f}) on the other route"
            )
    return ""
