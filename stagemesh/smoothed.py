"""A duration as TCP smooths its round trip: mean and mean deviation of what was seen (RFC 6298,
section 2).

Late samples weigh more than early ones, and an irregular duration has a large deviation; what may
honestly take longer is bounded by the mean and some deviations more. How many is for whoever asks.
"""

from __future__ import annotations

from dataclasses import dataclass

MEAN_WEIGHT = 1 / 8
"""RFC 6298 alpha: weight of a new sample in the mean."""
DEVIATION_WEIGHT = 1 / 4
"""RFC 6298 beta."""


@dataclass(slots=True)
class Smoothed:
    """See the module. Seconds; both are 0 before the first of ``samples``."""

    mean_s: float = 0.0
    deviation_s: float = 0.0
    samples: int = 0

    def add(self, seconds: float) -> None:
        """Take in one duration."""
        if self.samples == 0:
            self.mean_s, self.deviation_s = seconds, seconds / 2
        else:
            error = seconds - self.mean_s
            self.deviation_s += DEVIATION_WEIGHT * (abs(error) - self.deviation_s)
            self.mean_s += MEAN_WEIGHT * error
        self.samples += 1

    def bound_s(self, deviations: float) -> float:
        """The mean and so many deviations more."""
        return self.mean_s + deviations * self.deviation_s
