"""The generation's own spans and metrics, on the coordinator.

`RequestTelemetry` is told by the edge when a request comes in and is tokenized, stands before its
TokenSink (``watch``) to see tokens and the one end, is the driver's StepObserver, and hears every
event. From these it makes the generation span (``chat MODEL``) and its children, and measures
latencies. It follows at most REQUESTS_TRACKED_MAX requests; more are served, and not traced. It
belongs to the event loop's thread, never blocks and never raises what a request could see.

Every generation span ends: with the sink's end, or, if its call never got so far as to submit it,
with the call. What is known of one request, and the spans made of it, are in `tracked_request`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from opentelemetry.trace import Link, SpanKind, Status, StatusCode, Tracer
from opentelemetry.util.types import AttributeValue

from coordinator.instructions import (
    AcceptTokens,
    AdvanceVerified,
    CorrectTokens,
    FailRequest,
    FinishRequest,
    PublishEvent,
    RequestSummary,
)
from coordinator.ports import TokenSink
from services.generation_ports import AnswerSink
from services.logs import note_request
from services.metrics import MeshMetrics, elapsed
from services.request_ids import show_id
from services.span_events import SpanEvents
from services.tracing import (
    LINKS_MAX,
    Clock,
    Timeline,
    below,
    current_call,
    parent_of,
    segment_steps_max,
    trace_id_of,
    traceparent_of,
)
from services.tracked_request import TrackedRequest
from stagemesh.errors import MeshError
from stagemesh.frame import FrameKind, StepFrame, StepRow

REQUESTS_TRACKED_MAX = 4096


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
        self._tracked: dict[bytes, TrackedRequest] = {}
        self._events = SpanEvents(self._add_event)

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
        labels: dict[str, AttributeValue] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "stagemesh",
            "gen_ai.request.model": model,
        }
        span = self._tracer.start_span(
            f"{operation} {model}",
            context=parent,
            kind=SpanKind.INTERNAL,
            start_time=timeline.at(now),
            attributes={
                **labels,
                "gen_ai.request.id": show_id(request),
                "gen_ai.response.id": show_id(request),
                "mesh.request.id": show_id(request),
                **(attributes or {}),
            },
        )
        one = TrackedRequest(self._tracer, request, labels, span, below(span), timeline, now)
        self._tracked[request] = one
        if call is not None:
            call.span.set_attribute("mesh.request.id", show_id(request))
            call.abandoned.append(lambda code, error: self._abandoned(one, code, error))
        return traceparent_of(span.get_span_context())

    def request_tokenized(self, request: bytes, prompt_tokens: int, seconds: float) -> None:
        """Its prompt is token ids now, after ``seconds`` of work."""
        one = self._tracked.get(request)
        if one is None:
            return
        now = self._clock()
        one.span.set_attribute("gen_ai.usage.input_tokens", prompt_tokens)
        one.child("tokenize", now - seconds, now, {"mesh.tokens": prompt_tokens})

    def watch(self, request: bytes, sink: AnswerSink, *, recoveries_before: int = 0) -> TokenSink:
        """The request is submitted with ``sink``; use what this returns in its place. Once. The
        first ``recoveries_before`` recoveries of its summary are not its own: it goes on with an
        answer that had failed, or outlived a coordinator."""
        one = self._tracked.get(request)
        if one is None or one.submitted is not None:
            return sink
        one.submitted, one.recoveries_before = self._clock(), recoveries_before
        return _WatchedSink(self, one, sink, self._clock)

    def _abandoned(self, one: TrackedRequest, code: str, error: BaseException | None) -> None:
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
                one.child("queue", one.queued_since, now)
                self._metrics.queue.record(elapsed(one.queued_since, now))

    def step_returned(self, frame: StepFrame, now: float, seconds: float) -> None:
        """The last stage's answer to a step, ``seconds`` after it was sent."""
        if frame.kind is FrameKind.SCORE:
            for row in frame.rows:
                if row.request in self._tracked:
                    self._tracked[row.request].shadowed(frame, row, now, seconds)
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
                one.shadowed(frame, row, now, seconds)
            elif frame.kind is FrameKind.PREFILL:
                one.prefilled(frame, row, now, seconds)
            else:
                self._decoded(one, frame, row, now, seconds)

    def event_published(self, event: PublishEvent) -> None:
        """A fact of the coordinator's own: what a guard stopped is on the spans, and a recovery
        begins and ends with its events."""
        self._events.published(event)
        one = self._tracked.get(event.request) if event.topic == "recovery" else None
        if one is None:
            return
        if event.type == "RecoveryStarted":
            one.flush_prefill()
            self._flush_decode(one)
            one.troubled(self._clock())
        elif event.type == "RecoveryFinished":
            one.settled(self._clock())

    def _decoded(
        self, one: TrackedRequest, frame: StepFrame, row: StepRow, now: float, seconds: float
    ) -> None:
        if one.prefill_rest is not None:
            one.flush_prefill()
        if one.decode is not None and one.decode.epoch != frame.epoch:
            self._flush_decode(one)
        segment = one.decoded(frame, row, now, seconds)
        if len(frame.rows) > 1 and len(segment.peers) < LINKS_MAX:
            for other in frame.rows[: LINKS_MAX + 1]:
                if other.request != one.request:
                    segment.peers[other.request] = None
        if segment.count >= segment_steps_max(one.decode_segments):
            self._flush_decode(one)

    def _flush_decode(self, one: TrackedRequest) -> None:
        """A span for its decode steps, linked with those that shared them."""
        peers = one.decode.peers if one.decode is not None else {}
        known = (self._tracked.get(peer) for peer in list(peers)[:LINKS_MAX])
        one.flush_decode(
            tuple(
                Link(peer.span.get_span_context(), {"mesh.link": "shared_steps"})
                for peer in known
                if peer is not None
            )
        )

    def _add_event(self, request: bytes, name: str, attributes: dict[str, str]) -> None:
        one = self._tracked.get(request)
        if one is not None:
            one.span.add_event(name, attributes, one.timeline.at(self._clock()))

    # -- tokens and the end -------------------------------------------------------------------

    def accepted(
        self, one: TrackedRequest, instruction: AcceptTokens, now: float, took_s: float
    ) -> None:
        """Tokens have passed; its sink took so long for them."""
        one.accept_s += took_s
        if not instruction.chunks:
            return
        one.tokens = max(one.tokens, instruction.first_index + len(instruction.chunks))
        if one.first_token is None:
            one.first_token = now
            waited = elapsed(one.received, now)
            self._metrics.time_to_first_token.record(waited, one.labels)
        elif one.last_token is not None:
            each = elapsed(one.last_token, now) / len(instruction.chunks)
            for _ in instruction.chunks:
                self._metrics.time_per_output_token.record(each, one.labels)
        one.last_token = now if one.last_token is None else max(now, one.last_token)

    def end(
        self, one: TrackedRequest, reason: str, summary: RequestSummary, error: MeshError | None
    ) -> None:
        """The one end: every span that is still open, the latencies, the metrics."""
        if self._tracked.get(one.request) is not one:
            return
        one.flush_prefill()
        self._flush_decode(one)
        if one.first_token is not None and one.last_token is not None:
            facts = {"mesh.busy_s": round(one.accept_s, 9), "mesh.tokens": one.tokens}
            one.child("detokenize", one.first_token, one.last_token, facts)
        one.flush_shadow()
        one.settled(self._clock())
        recoveries = summary.recoveries[one.recoveries_before :]
        for recovery, trouble in zip(recoveries, one.troubles, strict=False):
            one.recovered(recovery, trouble)
        for recovery in recoveries:
            self._metrics.recovered(recovery.cause, recovery.action)
        one.span.set_attributes(
            {
                "gen_ai.response.model": one.labels["gen_ai.request.model"],
                "gen_ai.response.finish_reasons": (reason,),
                "gen_ai.usage.input_tokens": summary.prompt_tokens,
                "gen_ai.usage.output_tokens": summary.completion_tokens,
                # The names that vLLM gives the same numbers, for dashboards made for it.
                "gen_ai.usage.prompt_tokens": summary.prompt_tokens,
                "gen_ai.usage.completion_tokens": summary.completion_tokens,
                "mesh.route": summary.route,
                "mesh.recoveries": len(summary.recoveries),
                **one.latencies(self._clock()),
            }
        )
        self._metrics.tokens.record(
            summary.prompt_tokens, {**one.labels, "gen_ai.token.type": "input"}
        )
        self._metrics.tokens.record(
            summary.completion_tokens, {**one.labels, "gen_ai.token.type": "output"}
        )
        self._close(one, error.reason if error is not None else "")

    def _close(self, one: TrackedRequest, error_type: str) -> None:
        del self._tracked[one.request]
        now = self._clock()
        labels = dict(one.labels)
        if error_type:
            one.span.set_attribute("error.type", error_type)
            one.span.set_status(Status(StatusCode.ERROR))
            labels["error.type"] = self._metrics.known_reason(error_type)
        one.span.end(one.timeline.at(now))
        self._metrics.request.record(elapsed(one.received, now), labels)


class _WatchedSink:
    """A TokenSink that tells the telemetry what passes."""

    def __init__(
        self,
        owner: RequestTelemetry,
        one: TrackedRequest,
        sink: AnswerSink,
        clock: Callable[[], float],
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
        for name in self._sink.advice:
            self._one.span.add_event("text_signal", {"mesh.signal": name})
        self._owner.end(self._one, instruction.reason, instruction.summary, None)

    def fail(self, instruction: FailRequest) -> None:
        self._sink.fail(instruction)
        self._owner.end(self._one, "error", instruction.summary, instruction.error)
