"""How long a hop waits for an acknowledgement before it sends again: the timer of RFC 6298.

The wait is the smoothed round trip and four deviations of it, within the limits of the hop. Only
the acknowledgement of a frame that was sent exactly once is a measurement (Karn's rule); whoever
asks sees to that, and to backing off.
"""

from __future__ import annotations

from stagemesh.hop_limits import HopLimits

TIMER_GRANULARITY_S = 0.001
"""RFC 6298's G: no clock tick or event loop is finer than this."""


class RoundTrip:
    """Adaptive retransmission wait of RFC 6298: smoothed round trip plus four deviations, in
    seconds."""

    __slots__ = ("_deviation", "_limits", "smoothed")

    def __init__(self, limits: HopLimits) -> None:
        self._limits = limits
        self._deviation = 0.0
        self.smoothed: float | None = None

    def observe(self, seconds: float) -> None:
        """A frame sent exactly once was acknowledged after ``seconds``."""
        if self.smoothed is None:
            self.smoothed, self._deviation = seconds, seconds / 2
            return
        self._deviation += (abs(self.smoothed - seconds) - self._deviation) / 4
        self.smoothed += (seconds - self.smoothed) / 8

    @property
    def wait_s(self) -> float:
        limits = self._limits
        if self.smoothed is None:
            return limits.retransmit_wait_s_initial
        wait = self.smoothed + max(TIMER_GRANULARITY_S, 4 * self._deviation)
        return min(limits.retransmit_wait_s_max, max(limits.retransmit_wait_s_min, wait))

    @property
    def patience_s(self) -> float:
        """How long acknowledgements of one burst may lie apart: about a round trip."""
        if self.smoothed is None:
            return self._limits.retransmit_wait_s_min / 10
        return max(TIMER_GRANULARITY_S, self.smoothed)
