"""How long a step of a route may honestly take: predicted from those that came back.

In the manner of TCP's retransmission timer: the mean of what was seen and some deviations more, for
a step of that size. Time is a parameter.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from stagemesh.frame import FrameKind

MEAN_WEIGHT = 0.125
DEVIATION_WEIGHT = 0.25
"""Weights of a new sample, as in RFC 6298."""


@dataclass(slots=True)
class Estimate:
    """Mean and mean deviation of a duration, seconds."""

    mean_s: float = 0.0
    deviation_s: float = 0.0
    samples: int = 0

    def add(self, seconds: float) -> None:
        if self.samples == 0:
            self.mean_s, self.deviation_s = seconds, seconds / 2
        else:
            error = seconds - self.mean_s
            self.mean_s += MEAN_WEIGHT * error
            self.deviation_s += DEVIATION_WEIGHT * (abs(error) - self.deviation_s)
        self.samples += 1

    @property
    def upper_s(self) -> float:
        return self.mean_s + 2 * self.deviation_s


@dataclass(slots=True)
class StepTimes:
    """What steps of a route take: decode steps as a whole, prefill per token."""

    fallback_s: float
    decode: Estimate = field(default_factory=Estimate)
    prefill_token: Estimate = field(default_factory=Estimate)

    def expected_s(self, kind: FrameKind, token_count: int) -> float:
        """A generous expectation for one step; ``fallback_s`` until something was measured."""
        base_s = self.decode.upper_s if self.decode.samples else 0.0
        if kind in (FrameKind.PREFILL, FrameKind.PROBE, FrameKind.SCORE):
            if not self.prefill_token.samples:
                return self.fallback_s
            return base_s + token_count * self.prefill_token.upper_s
        return base_s or self.fallback_s

    def add(self, kind: FrameKind, token_count: int, seconds: float) -> None:
        """Learn from a step that took ``seconds`` of the route's time."""
        if kind is FrameKind.DECODE:
            self.decode.add(seconds)
        elif kind in (FrameKind.PREFILL, FrameKind.PROBE, FrameKind.SCORE):
            self.prefill_token.add(seconds / max(token_count, 1))
