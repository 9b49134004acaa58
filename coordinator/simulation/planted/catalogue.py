"""Every bug that can be planted. One is *killed* if, under it, any seed of a range violates any
invariant."""

from __future__ import annotations

from collections.abc import Mapping

from coordinator.simulation.planted import hops, requests, restarts, routes, stages
from coordinator.simulation.planted.bug import Bug

BUGS: tuple[Bug, ...] = (
    *hops.FRAMES,
    *hops.ANSWERS,
    *stages.STAGES,
    *routes.ROUTES,
    *requests.REQUESTS,
    *restarts.RESTARTS,
)
BUGS_BY_NAME: Mapping[str, Bug] = {bug.name: bug for bug in BUGS}
