"""What a benchmark says, and the arithmetic behind it. No clock, no process, no I/O.

A *paired* result comes from turns taken alternately: ``ours`` and ``baseline`` are medians, but
``ratio`` is the median of the ratios of neighbouring turns, which slow drift of the machine cannot
move. ``ratio`` is always ours ÷ baseline, whichever direction is better. ``spread`` is the distance
between the first and third quartile divided by the median: of the paired ratios where there is a
baseline, of our samples where there is none.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Target:
    """What was promised: a bound on the ratio, or on our own figure where ``of_ours``; and the
    ``aim`` beyond it, where there is one. A figure with an interval keeps it with all of that."""

    bound: float
    at_least: bool
    of_ours: bool = False
    aim: float | None = None

    def met_by(self, result: Result) -> bool | None:
        """Whether the result keeps the promise; None where it has no such figure."""
        return self._keeps(result, self.bound)

    def aim_met_by(self, result: Result) -> bool | None:
        """Whether the result reaches the aim too; None where there is none, or no figure."""
        return None if self.aim is None else self._keeps(result, self.aim)

    def _keeps(self, result: Result, bound: float) -> bool | None:
        value = result.ours if self.of_ours else result.ratio
        if value is None:
            return None
        if self.of_ours and result.interval is not None:
            value = result.interval[0 if self.at_least else 1]
        return value >= bound if self.at_least else value <= bound

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        aim = "" if self.aim is None else f" (aim {self.aim:,g})"
        return f"{'' if self.of_ours else 'ratio '}{sign} {self.bound:,g}{aim}"


TARGETS: dict[str, Target] = {
    "decode_single": Target(0.95, at_least=True, aim=1.0),
    "ttft_512": Target(1.0, at_least=False, aim=0.75),
    "ttft_1024": Target(1.0, at_least=False, aim=0.75),
    "prefill_1024": Target(1.0, at_least=True),
    "batch_16": Target(1.2, at_least=True, aim=1.6),
    "batch_32": Target(1.2, at_least=True, aim=1.6),
    "admission_gap": Target(2.0, at_least=False, of_ours=True),
    "overhead_checks": Target(1.0, at_least=False, of_ours=True, aim=0.1),
    "overhead_switched": Target(1.0, at_least=False, of_ours=True, aim=0.1),
    "overhead_switched_apart": Target(1.0, at_least=False, of_ours=True, aim=0.1),
    "overhead_integrity": Target(1.0, at_least=False, of_ours=True),
    "overhead_numeric": Target(1.0, at_least=False, of_ours=True),
    "overhead_tracing": Target(1.0, at_least=False, of_ours=True),
    "overhead_shadow": Target(2.0, at_least=False, of_ours=True),
    "coordinator_tokens": Target(5000.0, at_least=True, of_ours=True, aim=20_000.0),
    "coordinator_linear": Target(0.9, at_least=True),
    "coordinator_latency_p99": Target(5.0, at_least=False, of_ours=True),
    "idle_streams_1000": Target(2.0, at_least=False),
    "failover_gap_sigkill": Target(1.0, at_least=False, of_ours=True),
    "failover_notice_sigkill": Target(0.2, at_least=False, of_ours=True),
    "failover_notice_sigstop": Target(2.0, at_least=False, of_ours=True),
}
"""The bounds that were set before anything was measured."""


@dataclass(frozen=True, slots=True)
class Result:
    """One named figure. ``error`` says why there is none; then the numbers are None.
    ``others_cpu``: share of the machine that other processes used meanwhile. ``interval``: in
    which our figure lies with 95 %, where it is a difference between noisy things."""

    name: str
    ours: float | None
    baseline: float | None
    ratio: float | None
    unit: str
    higher_is_better: bool
    spread: float | None
    samples: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""
    error: str = ""
    others_cpu: float | None = None
    interval: tuple[float, float] | None = None

    @property
    def met(self) -> bool | None:
        """Whether its target is met; None without a target or without a figure."""
        target = TARGETS.get(self.name)
        return None if target is None or self.error else target.met_by(self)

    def as_json(self) -> dict[str, Any]:
        """The stable fields first, then what this version adds."""
        document: dict[str, Any] = {
            "name": self.name,
            "ours": _rounded(self.ours),
            "baseline": _rounded(self.baseline),
            "ratio": _rounded(self.ratio),
            "unit": self.unit,
            "higher_is_better": self.higher_is_better,
            "spread": _rounded(self.spread),
        }
        target = TARGETS.get(self.name)
        if target is not None:
            document |= {"target": str(target), "met": self.met}
            if target.aim is not None and not self.error:
                document["aim_met"] = target.aim_met_by(self)
        if self.interval is not None:
            document["interval"] = [_rounded(end) for end in self.interval]
        if self.samples:
            document["samples"] = {
                name: [_rounded(value) for value in values] for name, values in self.samples.items()
            }
        if self.others_cpu is not None:
            document["others_cpu"] = round(self.others_cpu, 3)
        if self.note:
            document["note"] = self.note
        if self.error:
            document["error"] = self.error
        return document


def paired(
    name: str,
    ours: Sequence[float],
    baseline: Sequence[float],
    *,
    unit: str,
    higher_is_better: bool,
    note: str = "",
) -> Result:
    """From alternating turns of equal number; ``ours[i]`` and ``baseline[i]`` are neighbours."""
    ratios = [mine / theirs for mine, theirs in zip(ours, baseline, strict=True) if theirs > 0]
    if not ratios:
        return failed(name, "no pair of turns could be compared", unit, higher_is_better)
    return Result(
        name,
        statistics.median(ours),
        statistics.median(baseline),
        statistics.median(ratios),
        unit,
        higher_is_better,
        spread_of(ratios),
        {"ours": list(ours), "baseline": list(baseline)},
        note,
    )


def measured(
    name: str,
    samples: Sequence[float],
    *,
    unit: str,
    higher_is_better: bool,
    note: str = "",
    pick: Callable[[Sequence[float]], float] = statistics.median,
) -> Result:
    """From our samples alone; ``pick`` makes one figure of them."""
    if not samples:
        return failed(name, "nothing was measured", unit, higher_is_better)
    figure, spread = pick(samples), spread_of(samples)
    return Result(
        name, figure, None, None, unit, higher_is_better, spread, {"ours": list(samples)}, note
    )


def failed(name: str, error: str, unit: str = "", higher_is_better: bool = True) -> Result:
    """A figure that could not be taken."""
    return Result(name, None, None, None, unit, higher_is_better, None, error=error or "failed")


def spread_of(values: Sequence[float]) -> float | None:
    """Interquartile range ÷ median; None for fewer than two values or a median of 0."""
    if len(values) < 2:
        return None
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle if middle else None


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Two of the values between which the true median lies with 95 %, whatever their distribution:
    the ranks of a fair coin's quantiles. All of them, if they are too few for that."""
    ordered = sorted(values)
    count = len(ordered)
    low = math.floor((count - 1.96 * math.sqrt(count)) / 2) - 1
    return ordered[max(0, low)], ordered[min(count - 1, count - 1 - low)]


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100.0) - 1)]


def percent_of(part_s: float, whole_s: float) -> float:
    """How many percent of ``whole_s`` are ``part_s``."""
    return 100.0 * part_s / whole_s if whole_s > 0 else math.inf


def _rounded(value: float | None) -> float | None:
    """Six significant digits are more than any of this is good for."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")
