"""One request as its telemetry sees it: when it passed which point, what it does now, and the spans
made of that.

Steps of one kind are gathered in a ``Segment`` until a span stands for them: the first prefill
chunks have one each, decode steps longer and longer series, everything a full worker does behind
the answer one together. Times are readings of the monotonic clock; None means not yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanContext, Tracer
from opentelemetry.util.types import AttributeValue

from coordinator.instructions import RecoveryRecord
from services.request_ids import show_id
from services.tracing import Segment, Timeline, record
from stagemesh.frame import StepFrame, StepRow

PREFILL_SPANS_MAX = 8
"""Prefill chunks of one request with a span of their own; one more span stands for the rest."""


@dataclass(slots=True)
class Trouble:
    """When a recovery began, which span it interrupted, and when the next token was there (or it
    was given up)."""

    began: float
    interrupted: SpanContext | None
    ended: float = math.inf


@dataclass(slots=True)
class TrackedRequest:
    """See the module. ``span`` is the generation's, ``context`` that of its children."""

    tracer: Tracer
    request: bytes
    labels: Mapping[str, AttributeValue]
    """Of its span and of its metrics."""
    span: Span
    context: Context
    timeline: Timeline
    received: float
    submitted: float | None = None
    first_step: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    tokens: int = 0
    prefills: int = 0
    prefill_rest: Segment | None = None
    decode: Segment | None = None
    decode_segments: int = 0
    shadow_epochs: set[int] = field(default_factory=set)
    """Routes on which it is verified."""
    shadow: Segment | None = None
    accept_s: float = 0.0
    recoveries_before: int = 0
    last_work: SpanContext | None = None
    """The last span of prefill or decode, which a recovery interrupts."""
    troubles: list[Trouble] = field(default_factory=list)
    """One for each recovery of its own."""

    @property
    def queued_since(self) -> float:
        """When its waiting for a first step began."""
        return self.received if self.submitted is None else self.submitted

    # -- steps --------------------------------------------------------------------------------

    def prefilled(self, frame: StepFrame, row: StepRow, now: float, seconds: float) -> None:
        """A chunk of its prompt came back."""
        self.prefill_rest = _with_step(self.prefill_rest, frame, row, now, seconds)
        if self.prefills < PREFILL_SPANS_MAX:
            self.prefills += 1
            self.flush_prefill()

    def shadowed(self, frame: StepFrame, row: StepRow, now: float, seconds: float) -> None:
        """A step behind the answer: one span stands for all of them."""
        self.shadow = _with_step(self.shadow, frame, row, now, seconds)

    def decoded(self, frame: StepFrame, row: StepRow, now: float, seconds: float) -> Segment:
        """It was in a decode step; the segment that it went into."""
        self.decode = segment = _with_step(self.decode, frame, row, now, seconds)
        return segment

    # -- spans --------------------------------------------------------------------------------

    def child(
        self,
        name: str,
        started: float,
        ended: float,
        attributes: Mapping[str, AttributeValue] | None = None,
        links: tuple[Link, ...] = (),
    ) -> SpanContext:
        """A span below the generation's, from one reading of the clock to another."""
        return record(
            self.tracer,
            name,
            self.context,
            self.timeline.at(started),
            self.timeline.at(ended),
            attributes={"mesh.request.id": show_id(self.request), **(attributes or {})},
            links=links,
        )

    def flush_prefill(self) -> None:
        """A span for the prefill steps that have none yet."""
        segment, self.prefill_rest = self.prefill_rest, None
        if segment is not None:
            self._work("prefill", segment)

    def flush_decode(self, links: tuple[Link, ...]) -> None:
        """A span for the decode steps that have none yet."""
        segment, self.decode = self.decode, None
        if segment is not None:
            self.decode_segments += 1
            self._work("decode", segment, links)

    def _work(self, name: str, segment: Segment, links: tuple[Link, ...] = ()) -> None:
        self.last_work = self.child(
            name, segment.started, segment.ended, segment.attributes(), links
        )

    def flush_shadow(self) -> None:
        """A span for everything that was computed behind the answer."""
        segment, self.shadow = self.shadow, None
        if segment is not None:
            self.child("shadow", segment.started, segment.ended, segment.attributes())

    # -- recoveries ---------------------------------------------------------------------------

    def troubled(self, now: float) -> None:
        """A recovery begins; one that was under way is given up for it. What it interrupts has a
        span."""
        self.settled(now)
        self.troubles.append(Trouble(now, self.last_work))

    def settled(self, now: float) -> None:
        """The recovery under way, if any, is over."""
        if self.troubles:
            last = self.troubles[-1]
            last.ended = min(last.ended, now)

    def recovered(self, recovery: RecoveryRecord, trouble: Trouble) -> None:
        """A span for a recovery that is over, linked with the work that it interrupted."""
        started, ended, before = trouble.began, trouble.ended, trouble.interrupted
        if recovery.seconds is not None:  # another one may have come to nothing before it
            started = max(self.received, ended - recovery.seconds)
        self.child(
            f"recovery {recovery.action}",
            started,
            ended,
            {
                "error.type": recovery.cause,
                "mesh.recovery.cause": recovery.cause,
                "mesh.recovery.action": recovery.action,
                "mesh.worker": recovery.worker,
                "mesh.route.before": recovery.from_route,
                "mesh.route.after": recovery.to_route,
                "mesh.epoch": recovery.epoch,
                "mesh.tokens.kept": recovery.kept,
                "mesh.tokens.replayed": recovery.replayed,
            },
            () if before is None else (Link(before, {"mesh.link": "interrupted"}),),
        )

    def latencies(self, now: float) -> dict[str, AttributeValue]:
        """Durations in seconds under vLLM's names; what did not happen is left out."""
        start, first, last = self.first_step, self.first_token, self.last_token
        found: dict[str, float | None] = {
            "e2e": now - self.received,
            "time_in_queue": _between(self.queued_since, start),
            "time_to_first_token": _between(self.received, first),
            "time_in_model_prefill": _between(start, first),
            "time_in_model_decode": _between(first, last),
            "time_in_model_inference": _between(start, last),
        }
        named: dict[str, AttributeValue] = {
            f"gen_ai.latency.{name}": round(value, 9)
            for name, value in found.items()
            if value is not None
        }
        if first is not None:
            named["gen_ai.response.time_to_first_chunk"] = round(first - self.received, 9)
        return named


def _with_step(
    segment: Segment | None, frame: StepFrame, row: StepRow, now: float, seconds: float
) -> Segment:
    """The segment, begun if there is none, with one more step of the request in it."""
    segment = segment or Segment(now - seconds, now, frame.epoch, frame.step)
    segment.add(now - seconds, now, row.token_count, len(frame.rows))
    segment.sums["round_trip_s"] += seconds
    return segment


def _between(started: float | None, ended: float | None) -> float | None:
    return None if started is None or ended is None else max(0.0, ended - started)
