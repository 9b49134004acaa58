"""Which events are log lines as well, how loud, and how many at most.

The topics keep what happened for whoever asks in time; a log keeps it for who comes the day after.
So every event about workers, routes, integrity and recoveries, every request that failed and every
barrier that broke is a line that names its class (``cause``, ``reason``, ``status``), the workers,
and what was done about it (``action``, ``to_route``). A token is at no level: ``ChunkGenerated`` is
not here, and no event that is carries text or the digest of a single token.

Lines are bounded by type of event: LINES_AT_ONCE of them, LINES_PER_S in the long run. What is
left out is counted, and the next line of its type says how many there were; the topic has them all.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from coordinator.instructions import PublishEvent
from coordinator.recovery import TokenBucket

LINES_AT_ONCE = 128
"""Of one type of event: as many requests as one lost route usually carries."""
LINES_PER_S = 1.0
"""Of one type of event, in the long run."""
VALUE_CHARACTERS_MAX = 300
"""Of one attribute; what a peer says about itself may be longer."""

LEVELS: Mapping[str, int] = {
    **dict.fromkeys(
        (
            "WorkerRefused",
            "WorkerLost",
            "WorkerSuspect",
            "WorkerFailed",
            "WorkerQuarantined",
            "ReinitialisationFailed",
            "RouteRefused",
            "RouteClosed",
            "GenerationFailed",
            "RecoveryStarted",
            "RecoveryOvertaken",
            "RecoveryFinished",
            "HopFault",
            "TokenRejected",
            "RowFailed",
            "FrameUnexpected",
            "FrameMislabelled",
            "ShadowMismatch",
            "ShadowExamined",
            "ShadowLost",
            "VerificationDegraded",
            "VerificationIncomplete",
            "BarrierBroken",
        ),
        logging.WARNING,
    ),
    "WorkerGivenUp": logging.ERROR,
    **dict.fromkeys(
        (
            "WorkerJoined",
            "WorkerHealthy",
            "WorkerReturned",
            "WorkerReinitialised",
            "WorkerDraining",
            "WorkerDrained",
            "WorkerLeft",
            "RouteOpening",
            "RouteOpened",
            "RouteDraining",
            "FrameFenced",
            "VerificationResumed",
            "MeshDraining",
        ),
        logging.INFO,
    ),
    **dict.fromkeys(
        (
            "GenerationStarted",
            "GenerationFinished",
            "RequestConflict",
            "BarrierFormed",
            "BarrierCompleted",
            "JournalFailed",  # the journal has said so itself, and louder
            "JournalRecovered",
        ),
        logging.DEBUG,
    ),
}
"""Every event but that of a token."""


class EventLines:
    """Events as lines, as many as there is room for."""

    def __init__(self) -> None:
        self._room: dict[str, TokenBucket] = {}
        self._left_out: dict[str, int] = {}

    def line(self, event: PublishEvent, now: float) -> str:
        """An event of a type in LEVELS as a line; empty if it is one too many."""
        room = self._room.get(event.type)
        if room is None:
            room = TokenBucket(LINES_AT_ONCE, LINES_PER_S, LINES_AT_ONCE, now)
            self._room[event.type] = room
        if not room.take(now):
            self._left_out[event.type] = self._left_out.get(event.type, 0) + 1
            return ""
        return _told(event, self._left_out.pop(event.type, 0))


def _told(event: PublishEvent, left_out: int) -> str:
    worker = {"worker": event.worker} if event.worker else {}
    facts = {**worker, **event.attributes}
    said = [f"{name}={_value(value)}" for name, value in facts.items() if value]
    more = [f"({left_out} more of these were not logged)"] if left_out else []
    return " ".join([event.type, *said, *more])


def _value(value: str) -> str:
    """On one line, no longer than it may be, and in quotes if it has blanks."""
    text = "".join(one if one.isprintable() else " " for one in value[:VALUE_CHARACTERS_MAX])
    text += "…" if len(value) > VALUE_CHARACTERS_MAX else ""
    return f'"{text}"' if " " in text else text
