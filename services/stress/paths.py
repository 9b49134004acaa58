"""How a mesh should answer each fault, and how that is seen from outside. Pure.

A *path* is a counter that grows or an event that is published, where the fault happened. For each
fault any one of its paths is enough; a fault whose path was never seen either did not happen or was
not noticed, and both make a run worthless.

    counter:NAME@PROCESS       a guard's counter
    event:TYPE@WORKER          an event about a worker
    event:RouteClosed@EPOCH    the route that a damaged frame belonged to was given up
    route:closed@WORKER        a route with this worker in it was given up
    cause:CAUSE                a recovery for this cause has finished, or another went on from it
    client:resumes             a client attached to its stream again

Without ``@`` a number is the whole mesh's. In ``PATHS`` the part behind ``@`` is a role: ``sender``
and ``worker`` are the two ends of a hop or wire, ``epoch`` those of the frames. A name may be a
pattern (``fnmatch``). What a fault does to a number of frames, a counter has to count as often.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from services.stress.plan import FaultName

_AGAIN = "counter:frames_retransmitted@sender"
_TWICE = "counter:duplicates_answered@worker"
_REFUSED = "counter:frames_rejected.[!s]*@worker"
"""For what they are: ``sequence_gap`` is said of whatever came behind a hole."""
_GAP = "counter:frames_rejected.sequence_gap@worker"
_REOPENED = "counter:links_reopened@sender"
_FAULT = "event:HopFault@sender"
_RESUMED = "client:resumes"
_ENDED = "event:RouteClosed@epoch"
_DIALLED = "event:WorkerJoined@worker"
_OUT = (
    *("event:WorkerFailed@worker", "event:WorkerLost@worker", "event:WorkerLeft@worker"),
    *("event:WorkerSuspect@worker", "route:closed@worker"),
)
_RESTARTED = "cause:COORDINATOR_RESTARTED"

PATHS: Mapping[FaultName, tuple[str, ...]] = {
    FaultName.DROP: (_AGAIN, _ENDED),
    FaultName.DELAY: ("client:tokens",),
    FaultName.DUPLICATE: (_TWICE, _ENDED),
    FaultName.REORDER: ("counter:frames_held@worker", _GAP, _ENDED),
    FaultName.CORRUPT: (_REFUSED, _ENDED),
    FaultName.TRUNCATE: (_REFUSED, _ENDED),
    FaultName.GARBAGE: (_REFUSED, _ENDED),
    FaultName.STALE: ("counter:frames_fenced@worker", _ENDED),
    FaultName.LOST_ANSWER: (_TWICE, _AGAIN, _ENDED),
    FaultName.RESET: (_REOPENED, _FAULT, _DIALLED, *_OUT),
    FaultName.HALF_OPEN: (_REOPENED, _AGAIN, _FAULT, _DIALLED, *_OUT),
    FaultName.BLACK_HOLE: _OUT,
    FaultName.SLOW_READER: ("counter:window_waits@sender", _AGAIN, _TWICE, _FAULT, *_OUT),
    FaultName.SWIZZLE_CLOG: _OUT,
    FaultName.CLIENT_CUT: (_RESUMED,),
    FaultName.SIGKILL: _OUT,
    FaultName.SIGSTOP: _OUT,
    FaultName.OTHER_WEIGHTS: ("event:WorkerRefused@worker",),
    FaultName.COORDINATOR_KILL: (_RESTARTED,),
}
"""``client:tokens``: answers went on, which is all there is to see of a frame that is merely late.
Nothing else may be answered by it, since it always is."""

_ANYBODY_OUT = tuple(path.partition("@")[0] for path in _OUT)

FORGED: tuple[str, ...] = (
    *("counter:frames_rejected*", "counter:links_reopened", "counter:hop_faults*"),
    *(_RESUMED, *_ANYBODY_OUT),
)
"""A forged packet breaks a connection or is refused as a frame, depending on what it carried."""
FORGED_MIN = 10
"""So many packets cannot all have carried what nobody needs."""

RUN_PATHS: Mapping[str, frozenset[FaultName]] = {
    "event:RecoveryFinished": frozenset(
        {FaultName.SIGKILL, FaultName.SIGSTOP, FaultName.BLACK_HOLE}
    ),
    "counter:frames_retransmitted": frozenset(
        {FaultName.DROP, FaultName.CORRUPT, FaultName.TRUNCATE, FaultName.GARBAGE}
    ),
}
"""Paths that a run must have taken at least once if it met any of these faults."""


@dataclass(frozen=True, slots=True)
class Where:
    """Where a fault happened. ``workers``: to whom, or who receives on the hop. ``sender``: who
    sends there. ``epochs``: of the frames it met. ``times``: how many of them."""

    workers: tuple[str, ...] = ()
    sender: str = ""
    epochs: tuple[int, ...] = ()
    times: int = 1

    def places(self, role: str) -> tuple[str, ...]:
        """What a role stands for; the whole mesh if there is none."""
        if not role:
            return ("",)
        if role == "epoch":
            return tuple(str(epoch) for epoch in self.epochs)
        return (self.sender,) if role == "sender" else self.workers


def growth(path: str, before: Mapping[str, int], after: Mapping[str, int]) -> int:
    """By how much a path's number grew."""
    return total(path, after) - total(path, before)


def total(path: str, counts: Mapping[str, int]) -> int:
    """A path's number."""
    if not any(sign in path for sign in "*["):
        return counts.get(path, 0)
    pattern, _, place = path.partition("@")
    return sum(
        count
        for name, _, where, count in ((*key.partition("@"), count) for key, count in counts.items())
        if where == place and fnmatchcase(name, pattern)
    )


def _of(fault: FaultName, where: Where) -> Iterator[str]:
    for path in PATHS[fault]:
        name, _, role = path.partition("@")
        for place in where.places(role):
            yield f"{name}@{place}" if place else name


def taken(
    fault: FaultName, where: Where, before: Mapping[str, int], after: Mapping[str, int]
) -> str:
    """The first path of a fault that was taken between two readings; empty if none was."""
    for path in _of(fault, where):
        needed = where.times if path.startswith("counter:") else 1
        if growth(path, before, after) >= needed:
            return path
    return ""


def untaken(met: set[FaultName], counts: Mapping[str, int]) -> list[str]:
    """Paths that should have been taken in this run and were not."""
    return [path for path, faults in RUN_PATHS.items() if faults & met and not total(path, counts)]


def is_forging_unnoticed(forged: int, counts: Mapping[str, int]) -> bool:
    """Packets were forged, and nothing in the mesh ever said so."""
    return forged >= FORGED_MIN and not any(total(path, counts) for path in FORGED)
