"""Where a stage's time went, and what became of the rows it was given.

A step is timed in three parts, at the two marks where its rows go into the forward and where they
come out of it; a step without a forward has both marks at its beginning. Timings are facts for
people and for the next report: nothing in a step's answer depends on one, so the clocks are handed
in and may be anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stagemesh.frame import FrameKind, StepFrame, StepRow
from stagemesh.guards import Counters


@dataclass(frozen=True, slots=True)
class StepTiming:
    """Where a step's time went. ``started_unix_ns`` is wall clock; the others are durations in
    nanoseconds: ``input_ns`` checking and admitting, ``compute_ns`` unpacking, forward and
    evaluation, ``output_ns`` drawing or scoring, checking sizes and packing. ``batched`` rows ran
    side by side."""

    epoch: int
    step: int
    kind: FrameKind
    rows: int
    tokens: int
    batched: int
    started_unix_ns: int
    input_ns: int
    compute_ns: int
    output_ns: int

    @property
    def total_ns(self) -> int:
        """The whole step."""
        return self.input_ns + self.compute_ns + self.output_ns


class StepAccount:
    """See the module. For each step ``begin``, where there is a forward ``computing`` and
    ``computed`` around it, then ``close``. ``clock_ns`` is the wall clock, ``timer_ns`` a
    monotonic one."""

    def __init__(
        self, counters: Counters, *, clock_ns: Callable[[], int], timer_ns: Callable[[], int]
    ) -> None:
        self._counters = counters
        self._clock_ns = clock_ns
        self._timer_ns = timer_ns
        self._started_unix_ns = 0
        self._begun = self._computing = self._computed = 0
        self._batched = 0

    def begin(self) -> None:
        """The next step."""
        self._started_unix_ns = self._clock_ns()
        self._begun = self._computing = self._computed = self._timer_ns()
        self._batched = 0

    def computing(self) -> None:
        """Its rows go into the forward."""
        self._computing = self._timer_ns()

    def computed(self, batched: int) -> None:
        """They have come out of it; so many ran side by side."""
        self._batched = batched
        self._computed = self._timer_ns()

    def close(self, frame: StepFrame, rows: Sequence[StepRow]) -> StepTiming:
        """The step ``frame`` has its answer: ``rows``."""
        timing = StepTiming(
            frame.epoch,
            frame.step,
            frame.kind,
            len(frame.rows),
            frame.token_count,
            self._batched,
            self._started_unix_ns,
            self._computing - self._begun,
            self._computed - self._computing,
            self._timer_ns() - self._computed,
        )
        counters = self._counters
        counters["steps"] += 1
        counters["rows_batched"] += self._batched
        if frame.kind is FrameKind.SCORE:
            counters.count("validation_us.shadow", timing.total_ns // 1000)
        for row, given in zip(rows, frame.rows, strict=True):
            if row.status is not given.status:
                counters.count(f"rows_failed.{row.status.name.lower()}")
        return timing
