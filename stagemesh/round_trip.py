"""How long a hop waits for an acknowledgement before it sends again: the timer of RFC 6298.

The wait is the smoothed round trip and four deviations of it, within the limits of the hop. Only
the acknowledgement of a frame that was sent exactly once is a measurement (Karn's rule); whoever
asks sees to that, and to backing off.
"""

from __future__ import annotations

from stagemesh.hop_limits import HopLimits
from stagemesh.smoothed import Smoothed

TIMER_GRANULARITY_S = 0.001
"""RFC 6298's G: no clock tick or event loop is finer than this."""
DEVIATIONS = 4.0
"""RFC 6298's K."""


class RoundTrip:
    """See the module."""

    __slots__ = ("_limits", "_seen")

    def __init__(self, limits: HopLimits) -> None:
        self._limits = limits
        self._seen = Smoothed()

    def observe(self, seconds: float) -> None:
        """A frame sent exactly once was acknowledged after ``seconds``."""
        self._seen.add(seconds)

    @property
    def smoothed_s(self) -> float | None:
        """None before the first measurement."""
        return self._seen.mean_s if self._seen.samples else None

    @property
    def wait_s(self) -> float:
        """Until the oldest frame is sent again."""
        limits, seen = self._limits, self._seen
        if not seen.samples:
            return limits.retransmit_wait_s_initial
        wait = seen.mean_s + max(TIMER_GRANULARITY_S, DEVIATIONS * seen.deviation_s)
        return min(limits.retransmit_wait_s_max, max(limits.retransmit_wait_s_min, wait))

    @property
    def patience_s(self) -> float:
        """How long acknowledgements of one burst may lie apart: about a round trip."""
        if not self._seen.samples:
            return self._limits.retransmit_wait_s_min / 10
        return max(TIMER_GRANULARITY_S, self._seen.mean_s)
