"""How long a step of a route may honestly take: predicted from those that came back.

In the manner of TCP's retransmission timer: the mean of what was seen and some deviations more, for
a step of that size. Time is a parameter.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from stagemesh.frame import FrameKind
from stagemesh.smoothed import Smoothed

DEVIATIONS = 2.0
"""More than the mean that an honest step may take."""


@dataclass(slots=True)
class StepTimes:
    """What steps of a route take: decode steps as a whole, also by size; prefill per token."""

    fallback_s: float
    decode: Smoothed = field(default_factory=Smoothed)
    by_rows: dict[int, Smoothed] = field(default_factory=dict)
    """Decode steps by the number of bits in their number of rows: half as many rows are elsewhere.
    """
    prefill_token: Smoothed = field(default_factory=Smoothed)

    def expected_s(self, kind: FrameKind, token_count: int) -> float:
        """A generous expectation for one step; ``fallback_s`` until something was measured."""
        base_s = self.decode.bound_s(DEVIATIONS) if self.decode.samples else 0.0
        if kind in (FrameKind.PREFILL, FrameKind.PROBE, FrameKind.SCORE):
            if not self.prefill_token.samples:
                return self.fallback_s
            return base_s + token_count * self.prefill_token.bound_s(DEVIATIONS)
        return base_s or self.fallback_s

    def decode_s(self, rows: int) -> float | None:
        """What a decode step of about so many rows takes; None until one was seen."""
        seen = self.by_rows.get(rows.bit_length())
        return None if seen is None else seen.mean_s

    def add(self, kind: FrameKind, token_count: int, seconds: float) -> None:
        """Learn from a step that took ``seconds`` of the route's time."""
        if kind is FrameKind.DECODE:
            self.decode.add(seconds)
            self.by_rows.setdefault(token_count.bit_length(), Smoothed()).add(seconds)
        elif kind in (FrameKind.PREFILL, FrameKind.PROBE, FrameKind.SCORE):
            self.prefill_token.add(seconds / max(token_count, 1))
