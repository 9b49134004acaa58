"""How a mesh should answer each fault, and how that is seen from outside. Pure.

A *path* is a counter that grows or an event that is published. For each fault any one of its paths
is enough; a fault whose path was never seen either did not happen or was not noticed, and both make
a run worthless. Names: ``counter:NAME`` (a guard's counter, of any process; a trailing ``*`` is any
name that begins so), ``event:TYPE``, ``client:resumes``.
"""

from __future__ import annotations

from collections.abc import Mapping

from services.stress.plan import FaultName

_AGAIN = "counter:frames_retransmitted"
_TWICE = "counter:duplicates_answered"
_REFUSED = "counter:frames_rejected*"
_REOPENED = "counter:links_reopened"
_REROUTED = "event:RecoveryFinished"
_FAULT = "counter:hop_faults*"
_RESUMED = "client:resumes"
_OUT = ("event:WorkerFailed", "event:WorkerLeft", "event:WorkerSuspect", "event:RouteClosed")

PATHS: Mapping[FaultName, tuple[str, ...]] = {
    FaultName.DROP: (_AGAIN, _REROUTED),
    FaultName.DELAY: ("client:tokens",),
    FaultName.DUPLICATE: (_TWICE,),
    FaultName.REORDER: ("counter:frames_held", _AGAIN, _TWICE, "client:tokens"),
    FaultName.CORRUPT: (_REFUSED,),
    FaultName.TRUNCATE: (_REFUSED,),
    FaultName.GARBAGE: (_REFUSED,),
    FaultName.STALE: ("counter:frames_fenced", _REFUSED),
    FaultName.LOST_ANSWER: (_AGAIN, _TWICE, "client:tokens"),
    FaultName.RESET: (_REOPENED, _FAULT, _REROUTED),
    FaultName.HALF_OPEN: (_REROUTED, _REOPENED, _AGAIN, _FAULT),
    FaultName.BLACK_HOLE: (_REROUTED, *_OUT),
    FaultName.SLOW_READER: ("counter:window_waits", _REROUTED, "client:tokens"),
    FaultName.SWIZZLE_CLOG: (_REROUTED, *_OUT),
    FaultName.CLIENT_CUT: (_RESUMED,),
    FaultName.SIGKILL: (_REROUTED, *_OUT),
    FaultName.SIGSTOP: (_REROUTED, *_OUT),
    FaultName.OTHER_WEIGHTS: ("event:WorkerRefused",),
    FaultName.COORDINATOR_KILL: (_RESUMED,),
}
"""``client:tokens``: answers went on, which is all there is to see of something merely late."""

FORGED: tuple[str, ...] = (_REFUSED, _REOPENED, _FAULT, _RESUMED, *_OUT)
"""A forged packet breaks a connection or is refused as a frame, depending on what it carried."""
FORGED_MIN = 10
"""So many packets cannot all have carried what nobody needs."""

RUN_PATHS: Mapping[str, frozenset[FaultName]] = {
    _REROUTED: frozenset({FaultName.SIGKILL, FaultName.SIGSTOP, FaultName.BLACK_HOLE}),
    _AGAIN: frozenset({FaultName.DROP, FaultName.CORRUPT, FaultName.TRUNCATE, FaultName.GARBAGE}),
}
"""Paths that a run must have taken at least once if it met any of these faults."""


def growth(path: str, before: Mapping[str, int], after: Mapping[str, int]) -> int:
    """By how much a path's number grew."""
    return total(path, after) - total(path, before)


def total(path: str, counts: Mapping[str, int]) -> int:
    """A path's number."""
    if path.endswith("*"):
        prefix = path[:-1]
        return sum(count for name, count in counts.items() if name.startswith(prefix))
    return counts.get(path, 0)


def taken(fault: FaultName, before: Mapping[str, int], after: Mapping[str, int]) -> str:
    """The first path of a fault that was taken between two readings; empty if none was."""
    for path in PATHS[fault]:
        if growth(path, before, after) > 0:
            return path
    return ""


def untaken(met: set[FaultName], counts: Mapping[str, int]) -> list[str]:
    """Paths that should have been taken in this run and were not."""
    return [path for path, faults in RUN_PATHS.items() if faults & met and not total(path, counts)]


def is_forging_unnoticed(forged: int, counts: Mapping[str, int]) -> bool:
    """Packets were forged, and nothing in the mesh ever said so."""
    return forged >= FORGED_MIN and not any(total(path, counts) for path in FORGED)
