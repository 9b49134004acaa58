"""Which states may follow which: tables that documents and tests are made from.

``docs/protocol.md`` prints these tables (``scripts/generate_tables.py``), and a test holds the
machine to them: whatever fails, no route, worker or request ever takes a step that is not listed.
Barriers have theirs in ``barrier.TRANSITIONS``, which also drives them.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from coordinator.barrier import BarrierState, Trigger
from coordinator.mesh_state import WorkerState
from coordinator.route import RoutePhase
from coordinator.session import SessionPhase

Table = Mapping[tuple[enum.Enum, enum.Enum], str]
"""(from, to) → what makes it happen. A pair that is not listed does not happen."""

ROUTE_MOVES: Table = {
    (RoutePhase.OPENING, RoutePhase.LINKING): "barrier `open-route` complete",
    (
        RoutePhase.OPENING,
        RoutePhase.CLOSED,
    ): "barrier broken: refused, departed, disagreed, expired",
    (RoutePhase.LINKING, RoutePhase.PROBING): "the coordinator's link to stage 0 is up",
    (RoutePhase.LINKING, RoutePhase.CLOSED): "no link in time, or a worker failed",
    (RoutePhase.PROBING, RoutePhase.OPEN): "probes answered, marked and chosen as elsewhere",
    (RoutePhase.PROBING, RoutePhase.CLOSED): "a probe failed, differs or is late; a worker failed",
    (RoutePhase.OPEN, RoutePhase.DRAINING): "one of its workers is to leave",
    (RoutePhase.OPEN, RoutePhase.CLOSED): "a worker or hop failed, frames vanished, quarantine",
    (RoutePhase.DRAINING, RoutePhase.CLOSED): "empty, out of time, or a worker failed",
}
"""An epoch that is closed is fenced and never comes back."""

WORKER_MOVES: Table = {
    (WorkerState.JOINING, WorkerState.READY): "its route is open",
    (WorkerState.JOINING, WorkerState.SUSPECT): "owes a step past its deadline, or silent",
    (WorkerState.JOINING, WorkerState.FAILED): "control stream ended, or silent",
    (
        WorkerState.JOINING,
        WorkerState.QUARANTINED,
    ): "a series of corruptions, now or before it was away",
    (WorkerState.JOINING, WorkerState.DRAINING): "an operator or the worker asks, or had asked",
    (WorkerState.READY, WorkerState.SUSPECT): "owes a step past its deadline, or silent",
    (WorkerState.READY, WorkerState.FAILED): "control stream ended, or silent",
    (WorkerState.READY, WorkerState.QUARANTINED): "a series of corruptions",
    (WorkerState.READY, WorkerState.DRAINING): "an operator, or the worker itself, asks",
    (WorkerState.SUSPECT, WorkerState.READY): "moves or reports again, and a route of it was open",
    (WorkerState.SUSPECT, WorkerState.JOINING): "moves or reports again, before its route is open",
    (WorkerState.SUSPECT, WorkerState.FAILED): "control stream ended, or silent for too long",
    (WorkerState.SUSPECT, WorkerState.QUARANTINED): "a series of corruptions",
    (WorkerState.SUSPECT, WorkerState.DRAINING): "an operator, or the worker itself, asks",
    (WorkerState.FAILED, WorkerState.JOINING): "reports again, or its process registers again",
    (WorkerState.QUARANTINED, WorkerState.JOINING): "reloaded: same fingerprint, probe passed",
    (WorkerState.QUARANTINED, WorkerState.FAILED): "control stream ended, or silent",
    (WorkerState.QUARANTINED, WorkerState.DRAINING): "an operator, or the worker itself, asks",
    (
        WorkerState.DRAINING,
        WorkerState.FAILED,
    ): "control stream ended before it was let go, or silent",
}
"""A worker that left in order, or was replaced by another process of its name, is forgotten.

One that is to leave never serves again: if it is found to compute wrongly, its route ends and it
leaves; if it was silent when it was asked, it stays failed until it reports, and leaves then.
"""

_ENDED = (SessionPhase.FINISHED, SessionPhase.FAILED, SessionPhase.CANCELLED)
_WHY = {
    SessionPhase.FINISHED: "stop token, stop string or length",
    SessionPhase.FAILED: "refused, out of time, the ladder is spent, or it could not be kept",
    SessionPhase.CANCELLED: "the client asked, or went away",
}
_UNKEPT = "the journal could not keep this end, and its client is told so instead"
REQUEST_MOVES: Table = {
    (SessionPhase.QUEUED, SessionPhase.PREFILLING): "placed on a route",
    (SessionPhase.QUEUED, SessionPhase.RECOVERING): "placed on a route behind a restart",
    (SessionPhase.PREFILLING, SessionPhase.DECODING): "its first token is accepted",
    (SessionPhase.PREFILLING, SessionPhase.RECOVERING): "a row or its route failed",
    (
        SessionPhase.DECODING,
        SessionPhase.RECOVERING,
    ): "a row or its route failed, a token was withdrawn",
    (SessionPhase.RECOVERING, SessionPhase.DECODING): "the next token is accepted",
    **{
        (phase, ended): _WHY[ended]
        for phase in SessionPhase
        if phase not in _ENDED
        for ended in _ENDED
        if (phase, ended) != (SessionPhase.PREFILLING, SessionPhase.FINISHED)
    },
    (SessionPhase.FINISHED, SessionPhase.FAILED): _UNKEPT,
    (SessionPhase.CANCELLED, SessionPhase.FAILED): _UNKEPT,
}
"""``FAILED`` is final, and each client is told of exactly one end. Only an end of which it was not
told yet, because the journal could not keep it, still becomes the failure that it is told of.

A request in its first prefill has no token with which it could be complete.
"""


def table_of(moves: Table) -> str:
    """A Markdown table of moves, in their order."""
    lines = ["| from | to | when |", "|---|---|---|"]
    lines += [
        f"| {before.value} | {after.value} | {why} |" for (before, after), why in moves.items()
    ]
    return "\n".join(lines)


def barrier_table(moves: Mapping[tuple[BarrierState, Trigger], BarrierState]) -> str:
    """A Markdown table of a barrier's transitions."""
    lines = ["| from | trigger | to |", "|---|---|---|"]
    lines += [
        f"| {before.value} | {by.value} | {after.value} |" for (before, by), after in moves.items()
    ]
    return "\n".join(lines)


def diagram_of(moves: Table) -> str:
    """The same moves as a diagram (mermaid's state notation)."""
    lines = ["```mermaid", "stateDiagram-v2"]
    lines += [f"    {before.value} --> {after.value}" for before, after in moves]
    return "\n".join([*lines, "```"])


def barrier_diagram(moves: Mapping[tuple[BarrierState, Trigger], BarrierState]) -> str:
    """A barrier's transitions as a diagram; arrows with the same ends share one label."""
    labels: dict[tuple[str, str], list[str]] = {}
    for (before, by), after in moves.items():
        labels.setdefault((before.value, after.value), []).append(by.value)
    lines = ["```mermaid", "stateDiagram-v2"]
    lines += [
        f"    {before} --> {after}: {', '.join(triggers)}"
        for (before, after), triggers in labels.items()
    ]
    return "\n".join([*lines, "```"])
