"""A stage's own spans and metrics, on a worker.

``observe(frame, timing)`` is called once per computed step. A request is followed from its opening
row, which carries the trace context of its generation, to its CLOSE, its next opening (a replay or
a reroute) or the fencing of its epoch. What only verifies it carries none and is not followed; if
the answer goes on behind that, the first row that does so carries it. Its steps are added up into
``stage.prefill`` (one per opening) and ``stage.decode`` (one per segment) spans below the
generation, with this stage's compute, queue and transfer time and its bytes. May be called from any
thread; a call takes microseconds and never blocks on anything but its own short lock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from opentelemetry.context import Context
from opentelemetry.trace import Tracer
from opentelemetry.util.types import AttributeValue

from services.metrics import MeshMetrics, elapsed
from services.request_ids import show_id
from services.tracing import (
    Clock,
    Segment,
    Timeline,
    parent_of,
    record,
    segment_steps_max,
)
from stagemesh.frame import FrameKind, StepFrame, StepRow

REQUESTS_TRACKED_MAX = 4096


@dataclass(frozen=True, slots=True)
class StepTiming:
    """Where one step's time went on this stage. Seconds; ``finished`` on the monotonic clock.

    queue_s: from accepted to the compute thread. compute_s: on it. transfer_s: from sending the
    result to its acknowledgement, smoothed by the hop (this step's own is not in yet). bytes_in and
    bytes_out: frames as they arrived and left.
    """

    finished: float
    compute_s: float
    queue_s: float = 0.0
    transfer_s: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0


@dataclass(slots=True)
class _Tracked:
    parent: Context
    epoch: int
    timeline: Timeline
    prefill: Segment | None = None
    decode: Segment | None = None
    decode_segments: int = 0


class StageTelemetry:
    """Adds a worker's steps up. ``facts`` go on every span, such as ``mesh.worker``."""

    def __init__(
        self,
        tracer: Tracer,
        metrics: MeshMetrics,
        *,
        facts: Mapping[str, AttributeValue] | None = None,
        clock: Clock = time.monotonic,
        requests_tracked_max: int = REQUESTS_TRACKED_MAX,
    ) -> None:
        self._tracer = tracer
        self._metrics = metrics
        self._facts = dict(facts or {})
        self._clock = clock
        self._requests_tracked_max = requests_tracked_max
        self._tracked: dict[bytes, _Tracked] = {}
        self._lock = threading.Lock()
        self._idle_since: float | None = None
        """When the last step was finished."""

    def describe(self, **facts: AttributeValue) -> None:
        """More facts for every span from now on, as ``layer_first=0`` for ``mesh.layer.first``."""
        named = {f"mesh.{name.replace('_', '.')}": value for name, value in facts.items()}
        self._facts = {**self._facts, **named}

    def observe(self, frame: StepFrame, timing: StepTiming) -> None:
        """One step was computed. ``frame`` is the one that leaves this stage."""
        stage = max(0, frame.hop_from)
        if frame.kind in {FrameKind.PREFILL, FrameKind.DECODE, FrameKind.SCORE}:
            self._measure(frame, timing, stage)
        with self._lock:
            for row in frame.rows:
                if frame.kind is FrameKind.CLOSE:
                    self._forget(row.request, stage)
                elif frame.kind in {FrameKind.PREFILL, FrameKind.DECODE}:
                    self._add(frame, row, timing, stage)

    def fenced(self, epoch: int) -> None:
        """The epoch and everything older is over on this worker."""
        with self._lock:
            old = [key for key, one in self._tracked.items() if one.epoch <= epoch]
            for request in old:
                self._forget(request, -1)

    def _measure(self, frame: StepFrame, timing: StepTiming, stage: int) -> None:
        place = self._place(stage)
        labels: dict[str, AttributeValue] = {
            **place,
            "mesh.phase": frame.kind.name.lower(),
        }
        self._metrics.stage_compute.record(max(0.0, timing.compute_s), labels)
        self._metrics.stage_queue.record(max(0.0, timing.queue_s), labels)
        if timing.transfer_s > 0.0:
            self._metrics.stage_transfer.record(timing.transfer_s, labels)
        self._metrics.hop_bytes.add(timing.bytes_in, {"mesh.hop": "stage-in", **place})
        self._metrics.hop_bytes.add(timing.bytes_out, {"mesh.hop": "stage-out", **place})
        begun = timing.finished - timing.compute_s
        since, self._idle_since = self._idle_since, timing.finished
        self._metrics.stage_spent(
            place,
            compute=timing.compute_s,
            queue=timing.queue_s,
            transfer=timing.transfer_s,
            wait=0.0 if since is None else elapsed(since, begun),
        )

    def _place(self, stage: int) -> dict[str, AttributeValue]:
        """Which stage of which worker: a full worker is a stage 0 as well."""
        worker = self._facts.get("mesh.worker")
        place: dict[str, AttributeValue] = {"mesh.stage.index": stage}
        return place if worker is None else {**place, "mesh.worker": worker}

    def _add(self, frame: StepFrame, row: StepRow, timing: StepTiming, stage: int) -> None:
        if row.opening is not None or row.traceparent:
            self._open(frame, row, stage)
        one = self._tracked.get(row.request)
        if one is None:
            return
        started = timing.finished - timing.compute_s
        if frame.kind is FrameKind.PREFILL:
            segment = one.prefill or Segment(started, timing.finished, frame.epoch, frame.step)
            one.prefill = segment
        else:
            self._flush_prefill(row.request, one, stage)
            segment = one.decode or Segment(started, timing.finished, frame.epoch, frame.step)
            one.decode = segment
        segment.add(started, timing.finished, row.token_count, len(frame.rows))
        sums = segment.sums
        sums["compute_s"] += timing.compute_s
        sums["queue_s"] += timing.queue_s
        sums["transfer_s"] += timing.transfer_s
        sums["bytes_in"] += timing.bytes_in
        sums["bytes_out"] += timing.bytes_out
        if one.decode is not None and one.decode.count >= segment_steps_max(one.decode_segments):
            self._flush_decode(row.request, one, stage)

    def _open(self, frame: StepFrame, row: StepRow, stage: int) -> None:
        self._forget(row.request, stage)
        if not row.traceparent:
            return
        while len(self._tracked) >= self._requests_tracked_max:
            self._forget(next(iter(self._tracked)), stage)
        parent = parent_of({"traceparent": row.traceparent})
        self._tracked[row.request] = _Tracked(parent, frame.epoch, Timeline(self._clock))

    def _forget(self, request: bytes, stage: int) -> None:
        one = self._tracked.pop(request, None)
        if one is not None:
            self._flush_prefill(request, one, stage)
            self._flush_decode(request, one, stage)

    def _flush_prefill(self, request: bytes, one: _Tracked, stage: int) -> None:
        segment, one.prefill = one.prefill, None
        self._record("stage.prefill", request, one, segment, stage)

    def _flush_decode(self, request: bytes, one: _Tracked, stage: int) -> None:
        segment, one.decode = one.decode, None
        one.decode_segments += segment is not None
        self._record("stage.decode", request, one, segment, stage)

    def _record(
        self, name: str, request: bytes, one: _Tracked, segment: Segment | None, stage: int
    ) -> None:
        if segment is None:
            return
        attributes: dict[str, AttributeValue] = {
            "mesh.request.id": show_id(request),
            **self._facts,
            **segment.attributes(),
        }
        if stage >= 0:
            attributes["mesh.stage.index"] = stage
        record(
            self._tracer,
            name,
            one.parent,
            one.timeline.at(segment.started),
            one.timeline.at(segment.ended),
            attributes=attributes,
        )
