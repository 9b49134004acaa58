"""The generation's own spans and metrics, on the coordinator.

`RequestTelemetry` is told by the edge when a request comes in and is tokenized, stands before its
TokenSink (``watch``) to see tokens and the one end, and is the driver's StepObserver. From these
three it makes the generation span (``chat MODEL``) and its children, and measures latencies. It
follows at most REQUESTS_TRACKED_MAX requests; more are served, and not traced. It belongs to the
event loop's thread, never blocks and never raises what a request could see.

Every generation span ends: with the sink's end, with `request_ended`, or, if its call never got so
far as to submit it, with the call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, Tracer
from opentelemetry.util.types import AttributeValue

from coordinator.instructions import (
    AcceptTokens,
    AdvanceVerified,
    CorrectTokens,
    FailRequest,
    FinishRequest,
    RecoveryRecord,
    RequestSummary,
)
from coordinator.ports import TokenSink
from services.logs import note_request
from services.metrics import MeshMetrics, elapsed
from services.span_events import SpanEvents
from services.tracing import (
    LINKS_MAX,
    Clock,
    Segment,
    Timeline,
    below,
    current_call,
    parent_of,
    record,
    segment_steps_max,
    show_request,
    trace_id_of,
    traceparent_of,
)
from stagemesh.errors import MeshError
from stagemesh.frame import FrameKind, StepFrame, StepRow

REQUESTS_TRACKED_MAX = 4096
PREFILL_SPANS_MAX = 8
"""Prefill chunks of one request with a span of their own; one more span stands for the rest."""


@dataclass(slots=True)
class _Tracked:
    """One request. Times are readings of the monotonic clock; None means not yet."""

    request: bytes
    model: str
    operation: str
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
    labels: dict[str, AttributeValue] = field(default_factory=dict)
    epoch_answers: dict[int, float] = field(default_factory=dict)
    interrupted: dict[int, SpanContext] = field(default_factory=dict)


class RequestTelemetry:
    """Follows requests from the call to the end. See the module's docstring."""

    def __init__(
        self,
        tracer: Tracer,
        metrics: MeshMetrics,
        *,
        clock: Clock = time.monotonic,
        requests_tracked_max: int = REQUESTS_TRACKED_MAX,
    ) -> None:
        self._tracer = tracer
        self._metrics = metrics
        self._clock = clock
        self._requests_tracked_max = requests_tracked_max
        self._tracked: dict[bytes, _Tracked] = {}
        self._events = SpanEvents(self._add_event)
        self.event_published = self._events.published
        """Takes every fact of the coordinator's own: what a guard stopped is on the spans."""

    # -- told by the edge ---------------------------------------------------------------------

    def request_received(
        self,
        request: bytes,
        metadata: Mapping[str, str],
        model: str,
        operation: str = "chat",
        attributes: Mapping[str, AttributeValue] | None = None,
    ) -> str:
        """A call came in; returns the traceparent that its frames should carry.

        ``operation`` is "chat" or "text_completion"; ``attributes`` are ``gen_ai.request.*``.
        """
        note_request(request)
        known = self._tracked.get(request)
        if known is not None:
            return traceparent_of(known.span.get_span_context())
        if len(self._tracked) >= self._requests_tracked_max:
            return metadata.get("traceparent", "")
        call = current_call.get()
        parent = below(call.span) if call is not None else parent_of(metadata)
        now = self._clock()
        timeline = Timeline(self._clock)
        span = self._tracer.start_span(
            f"{operation} {model}",
            context=parent,
            kind=SpanKind.INTERNAL,
            start_time=timeline.at(now),
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "stagemesh",
                "gen_ai.request.model": model,
                "gen_ai.request.id": show_request(request),
                "gen_ai.response.id": show_request(request),
                "mesh.request.id": show_request(request),
                **(attributes or {}),
            },
        )
        one = _Tracked(request, model, operation, span, below(span), timeline, now)
        one.labels = self._labels(one)
        self._tracked[request] = one
        if call is not None:
            call.span.set_attribute("mesh.request.id", show_request(request))
            call.abandoned.append(lambda code, error: self._abandoned(one, code, error))
        return traceparent_of(span.get_span_context())

    def request_tokenized(self, request: bytes, prompt_tokens: int, seconds: float) -> None:
        """Its prompt is token ids now, after ``seconds`` of work."""
        one = self._tracked.get(request)
        if one is None:
            return
        now = self._clock()
        one.span.set_attribute("gen_ai.usage.input_tokens", prompt_tokens)
        self._child(one, "tokenize", now - seconds, now, {"mesh.tokens": prompt_tokens})

    def watch(self, request: bytes, sink: TokenSink, *, recoveries_before: int = 0) -> TokenSink:
        """The request is submitted with ``sink``; use what this returns in its place. Once. The
        first ``recoveries_before`` recoveries of its summary are not its own: it goes on with an
        answer that had failed, or outlived a coordinator."""
        one = self._tracked.get(request)
        if one is None or one.submitted is not None:
            return sink
        one.submitted, one.recoveries_before = self._clock(), recoveries_before
        return _WatchedSink(self, one, sink, self._clock)

    def request_ended(self, request: bytes, piece: Any) -> None:
        """A reader has seen the last piece. Only needed where ``watch`` was not used."""
        one = self._tracked.get(request)
        if one is not None and piece.end is not None:
            self.end(one, piece.end.reason, piece.end.summary, piece.end.error)

    def _abandoned(self, one: _Tracked, code: str, error: BaseException | None) -> None:
        # The interceptor turns a MeshError into an abort; the error is what the abort came from.
        cause = error if isinstance(error, MeshError) or error is None else error.__context__
        # A MeshError that ends the call unseen by its sink kept it from being submitted.
        submitted = one.submitted is not None and not isinstance(cause, MeshError)
        if not submitted and self._tracked.get(one.request) is one:
            reason = cause.reason if isinstance(cause, MeshError) else code
            self._close(one, reason if code != "OK" else "ABANDONED")

    def trace_id_of(self, request: bytes) -> str:
        """Hex trace id of a request that is followed; empty for any other."""
        one = self._tracked.get(request)
        return "" if one is None else trace_id_of(one.span.get_span_context())

    # -- told by the driver -------------------------------------------------------------------

    def step_sent(self, frame: StepFrame, now: float) -> None:
        """A step went to stage 0."""
        self._metrics.hop_bytes.add(frame.byte_count, {"mesh.hop": "coordinator-out"})
        self._events.step_sent(frame)
        if frame.kind is not FrameKind.PREFILL:
            return
        for row in frame.rows:
            one = self._tracked.get(row.request)
            if one is None:
                continue
            if row.opening is not None and not row.traceparent:
                one.shadow_epochs.add(frame.epoch)  # only what a client waits for carries its trace
            elif row.opening is not None:
                one.shadow_epochs.discard(frame.epoch)
            if one.first_step is None:
                one.first_step = now
                queued = one.received if one.submitted is None else one.submitted
                self._child(one, "queue", queued, now)
                self._metrics.queue.record(elapsed(queued, now))

    def step_returned(self, frame: StepFrame, now: float, seconds: float) -> None:
        """The last stage's answer to a step, ``seconds`` after it was sent."""
        if frame.kind is FrameKind.SCORE:
            self._shadowed(frame, frame.rows, now, seconds)
        if frame.kind not in {FrameKind.PREFILL, FrameKind.DECODE}:
            return
        phase = frame.kind.name.lower()
        self._metrics.step.record(max(0.0, seconds), {"mesh.phase": phase})
        self._metrics.batch.record(len(frame.rows), {"mesh.phase": phase})
        self._metrics.hop_bytes.add(frame.byte_count, {"mesh.hop": "coordinator-in"})
        for row in frame.rows:
            one = self._tracked.get(row.request)
            if one is None:
                continue
            if frame.kind is FrameKind.PREFILL and frame.epoch in one.shadow_epochs:
                self._shadowed(frame, (row,), now, seconds)
            elif frame.kind is FrameKind.PREFILL:
                self._prefilled(one, frame, row, now, seconds)
            else:
                self._decoded(one, frame, row, now, seconds)

    def _prefilled(
        self, one: _Tracked, frame: StepFrame, row: StepRow, now: float, seconds: float
    ) -> None:
        segment = one.prefill_rest or Segment(now - seconds, now, frame.epoch, frame.step)
        segment.add(now - seconds, now, len(row.token_ids), len(frame.rows))
        segment.sums["round_trip_s"] += seconds
        one.prefill_rest = segment
        if one.prefills < PREFILL_SPANS_MAX:
            one.prefills += 1
            self._flush_prefill(one)

    def _shadowed(
        self, frame: StepFrame, rows: tuple[StepRow, ...], now: float, seconds: float
    ) -> None:
        """A step behind the answer: one span stands for all of them."""
        for row in rows:
            one = self._tracked.get(row.request)
            if one is not None:
                segment = one.shadow or Segment(now - seconds, now, frame.epoch, frame.step)
                segment.add(now - seconds, now, row.token_count, len(frame.rows))
                segment.sums["round_trip_s"] += seconds
                one.shadow = segment

    def _decoded(
        self, one: _Tracked, frame: StepFrame, row: StepRow, now: float, seconds: float
    ) -> None:
        if one.prefill_rest is not None:
            self._flush_prefill(one)
        if one.decode is not None and one.decode.epoch != frame.epoch:
            self._flush_decode(one)
        segment = one.decode or Segment(now - seconds, now, frame.epoch, frame.step)
        segment.add(now - seconds, now, len(row.token_ids), len(frame.rows))
        segment.sums["round_trip_s"] += seconds
        one.decode = segment
        if len(frame.rows) > 1 and len(segment.peers) < LINKS_MAX:
            for other in frame.rows[: LINKS_MAX + 1]:
                if other.request != one.request:
                    segment.peers[other.request] = None
        if segment.count >= segment_steps_max(one.decode_segments):
            self._flush_decode(one)

    # -- spans --------------------------------------------------------------------------------

    def _add_event(self, request: bytes, name: str, attributes: dict[str, str]) -> None:
        one = self._tracked.get(request)
        if one is not None:
            one.span.add_event(name, attributes, one.timeline.at(self._clock()))

    def _child(
        self,
        one: _Tracked,
        name: str,
        started: float,
        ended: float,
        attributes: Mapping[str, AttributeValue] | None = None,
        links: tuple[Link, ...] = (),
    ) -> SpanContext:
        return record(
            self._tracer,
            name,
            one.context,
            one.timeline.at(started),
            one.timeline.at(ended),
            attributes={"mesh.request.id": show_request(one.request), **(attributes or {})},
            links=links,
        )

    def _flush_prefill(self, one: _Tracked) -> None:
        segment, one.prefill_rest = one.prefill_rest, None
        if segment is not None:
            one.last_work = self._child(
                one, "prefill", segment.started, segment.ended, segment.attributes()
            )
            one.interrupted[segment.epoch] = one.last_work

    def _flush_decode(self, one: _Tracked) -> None:
        segment, one.decode = one.decode, None
        if segment is None:
            return
        one.decode_segments += 1
        peers = (self._tracked.get(peer) for peer in list(segment.peers)[:LINKS_MAX])
        links = tuple(
            Link(peer.span.get_span_context(), {"mesh.link": "shared_steps"})
            for peer in peers
            if peer is not None
        )
        one.last_work = self._child(
            one, "decode", segment.started, segment.ended, segment.attributes(), links
        )
        one.interrupted[segment.epoch] = one.last_work

    def _recovered(self, one: _Tracked, recovery: RecoveryRecord) -> None:
        ended = one.epoch_answers.get(recovery.epoch, self._clock())
        started = max(one.received, ended - (recovery.seconds or 0.0))
        before = [context for epoch, context in one.interrupted.items() if epoch < recovery.epoch]
        self._child(
            one,
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
            tuple(Link(context, {"mesh.link": "interrupted"}) for context in before[-1:]),
        )

    # -- tokens and the end -------------------------------------------------------------------

    def accepted(self, one: _Tracked, instruction: AcceptTokens, now: float, took_s: float) -> None:
        one.accept_s += took_s
        if not instruction.chunks:
            return
        one.epoch_answers.setdefault(instruction.chunks[0].epoch, now)
        one.tokens = max(one.tokens, instruction.first_index + len(instruction.chunks))
        if one.first_token is None:
            one.first_token = now
            waited = elapsed(one.received, now)
            self._metrics.time_to_first_token.record(waited, self._labels(one))
        elif one.last_token is not None:
            each = elapsed(one.last_token, now) / len(instruction.chunks)
            for _ in instruction.chunks:
                self._metrics.time_per_output_token.record(each, one.labels)
        one.last_token = now if one.last_token is None else max(now, one.last_token)

    def _labels(self, one: _Tracked) -> dict[str, AttributeValue]:
        return {
            "gen_ai.operation.name": one.operation,
            "gen_ai.provider.name": "stagemesh",
            "gen_ai.request.model": one.model,
        }

    def end(
        self, one: _Tracked, reason: str, summary: RequestSummary, error: MeshError | None
    ) -> None:
        if self._tracked.get(one.request) is not one:
            return
        self._flush_prefill(one)
        self._flush_decode(one)
        if one.first_token is not None and one.last_token is not None:
            facts = {"mesh.busy_s": round(one.accept_s, 9), "mesh.tokens": one.tokens}
            self._child(one, "detokenize", one.first_token, one.last_token, facts)
        if one.shadow is not None:
            self._child(
                one, "shadow", one.shadow.started, one.shadow.ended, one.shadow.attributes()
            )
        for recovery in summary.recoveries[one.recoveries_before :]:
            self._recovered(one, recovery)
            self._metrics.recovered(recovery.cause, recovery.action)
        one.span.set_attributes(
            {
                "gen_ai.response.model": one.model,
                "gen_ai.response.finish_reasons": (reason,),
                "gen_ai.usage.input_tokens": summary.prompt_tokens,
                "gen_ai.usage.output_tokens": summary.completion_tokens,
                # The names that vLLM gives the same numbers, for dashboards made for it.
                "gen_ai.usage.prompt_tokens": summary.prompt_tokens,
                "gen_ai.usage.completion_tokens": summary.completion_tokens,
                "mesh.route": summary.route,
                "mesh.recoveries": len(summary.recoveries),
                **self._latencies(one),
            }
        )
        self._metrics.tokens.record(
            summary.prompt_tokens, {**self._labels(one), "gen_ai.token.type": "input"}
        )
        self._metrics.tokens.record(
            summary.completion_tokens, {**self._labels(one), "gen_ai.token.type": "output"}
        )
        self._close(one, error.reason if error is not None else "")

    def _latencies(self, one: _Tracked) -> dict[str, AttributeValue]:
        """Durations in seconds under vLLM's names; what did not happen is left out."""
        now = self._clock()
        start, first, last = one.first_step, one.first_token, one.last_token
        submitted = one.received if one.submitted is None else one.submitted
        found: dict[str, float | None] = {
            "e2e": now - one.received,
            "time_in_queue": _between(submitted, start),
            "time_to_first_token": _between(one.received, first),
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
            named["gen_ai.response.time_to_first_chunk"] = round(first - one.received, 9)
        return named

    def _close(self, one: _Tracked, error_type: str) -> None:
        del self._tracked[one.request]
        now = self._clock()
        labels = self._labels(one)
        if error_type:
            one.span.set_attribute("error.type", error_type)
            one.span.set_status(Status(StatusCode.ERROR))
            labels["error.type"] = self._metrics.known_reason(error_type)
        one.span.end(one.timeline.at(now))
        self._metrics.request.record(elapsed(one.received, now), labels)


def _between(started: float | None, ended: float | None) -> float | None:
    return None if started is None or ended is None else max(0.0, ended - started)


class _WatchedSink:
    """A TokenSink that tells the telemetry what passes."""

    def __init__(
        self, owner: RequestTelemetry, one: _Tracked, sink: TokenSink, clock: Callable[[], float]
    ) -> None:
        self._owner, self._one, self._sink, self._clock = owner, one, sink, clock

    def accept(self, instruction: AcceptTokens) -> None:
        began = self._clock()
        self._sink.accept(instruction)
        self._owner.accepted(self._one, instruction, began, self._clock() - began)

    def advance(self, instruction: AdvanceVerified) -> None:
        self._sink.advance(instruction)

    def correct(self, instruction: CorrectTokens) -> None:
        self._one.span.add_event("correction", {"mesh.from_index": instruction.from_index})
        self._sink.correct(instruction)

    def finish(self, instruction: FinishRequest) -> None:
        self._sink.finish(instruction)
        self._owner.end(self._one, instruction.reason, instruction.summary, None)

    def fail(self, instruction: FailRequest) -> None:
        self._sink.fail(instruction)
        self._owner.end(self._one, "error", instruction.summary, instruction.error)
