"""The numeric envelope: is an activation of the size that this boundary carries?

A checksum proves that bytes arrived as they were sent; it says nothing of a stage that computed
wrongly. The cheapest sign of that is size. For each token the root mean square over the hidden axis
is taken, and the largest absolute element; both must lie in a band learnt at this boundary from
known-good forwards (the load-time calibration of a first stage, the route-opening probe elsewhere,
whose activations come through the real stages ahead) and widened by `WIDENING`, because a band that
ever refuses honest text is worse than none. What stays inside the band is for shadow verification
to find.

NaN and infinity need no pass of their own: either makes the sum of squares non-finite. So does an
element above 1e19 in float32, which is as good a reason to refuse.

One token, which is what a decode step brings, takes a short way: one product, held against two
limits on the sum of squares that the band comes to. Its peak need not be looked for, unless the sum
leaves room for one: no element exceeds the root of the sum of squares. Behind a forward nothing of
numpy is in a cache, so each further call costs tens of microseconds there (and one, repeated by
itself).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stage_worker.tensors import Floats
from stagemesh.frame import RowStatus

WIDENING = 16.0
"""Sixteen times the largest size ever seen in calibration, or a sixteenth of the smallest, is
refused: an exponent bit flipped high passes it by far, and tokens of one model differ among each
other by less, the first position's attention sink included, which every calibration covers."""

ROUNDING = 1.001
"""More than a sum of squares in float32 may be too small by, at any width a model has."""

_WELL = (RowStatus.OK, "")


@dataclass(frozen=True, slots=True)
class Band:
    """Smallest and largest root mean square of a token, and its largest absolute element."""

    rms_low: float
    rms_high: float
    peak: float

    def joined(self, other: Band) -> Band:
        return Band(
            min(self.rms_low, other.rms_low),
            max(self.rms_high, other.rms_high),
            max(self.peak, other.peak),
        )


def measure(values: Floats) -> Band:
    """Sizes over the tokens of ``values`` [tokens, hidden]; a field is NaN or infinite if an
    element is."""
    with np.errstate(over="ignore", invalid="ignore"):
        if values.shape[0] == 1:
            row = values[0]
            square = float(np.dot(row, row)) / row.size
            root = math.sqrt(square) if square >= 0.0 else math.nan
            return Band(root, root, max(float(row.max()), -float(row.min())))
        squares = np.einsum("ij,ij->i", values, values) / values.shape[1]
        peak = max(float(values.max()), -float(values.min()))
    return Band(math.sqrt(abs(float(squares.min()))), math.sqrt(abs(float(squares.max()))), peak)


class Envelope:
    """One boundary's band. Until `learn` was called only finiteness is checked."""

    __slots__ = ("_band", "_squares_high", "_squares_low", "_width")

    def __init__(self) -> None:
        self._band: Band | None = None
        self._width = 0
        self._squares_low, self._squares_high = math.inf, -math.inf

    @property
    def band(self) -> Band | None:
        """What was learnt."""
        return self._band

    def set_band(self, band: Band, width: int) -> None:
        """Hold tokens of ``width`` elements against ``band``."""
        self._band, self._width = band, width
        root_high = min(
            band.rms_high * WIDENING * math.sqrt(width), band.peak * WIDENING / ROUNDING
        )
        self._squares_low = width * (band.rms_low / WIDENING) ** 2
        self._squares_high = root_high**2

    def learn(self, values: Floats) -> None:
        """Take in a known-good activation [tokens, hidden]; a non-finite one teaches nothing."""
        seen = measure(values)
        if math.isfinite(seen.rms_high) and math.isfinite(seen.rms_low):
            band = seen if self._band is None else self._band.joined(seen)
            self.set_band(band, values.shape[1])

    def check(self, values: Floats) -> tuple[RowStatus, str]:
        """(OK, "") or why this activation [tokens, hidden] must not travel on."""
        # Of numpy's products only this one says nothing of an overflow; NaN is within nothing.
        if values.size == self._width and (
            self._squares_low <= float(np.vdot(values, values)) <= self._squares_high
        ):
            return _WELL
        seen = measure(values)
        if not (math.isfinite(seen.rms_high) and math.isfinite(seen.rms_low)):
            return RowStatus.NON_FINITE, "activation holds NaN or infinity"
        band = self._band
        if band is None:
            return _WELL
        if seen.rms_high > band.rms_high * WIDENING or seen.rms_low < band.rms_low / WIDENING:
            detail = (
                f"root mean square {seen.rms_low:.3g} to {seen.rms_high:.3g}, "
                f"calibrated {band.rms_low:.3g} to {band.rms_high:.3g}"
            )
            return RowStatus.OUT_OF_ENVELOPE, detail
        if seen.peak > band.peak * WIDENING:
            detail = f"largest element {seen.peak:.3g}, calibrated {band.peak:.3g}"
            return RowStatus.OUT_OF_ENVELOPE, detail
        return _WELL
