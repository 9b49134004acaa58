"""How much of the machine others used meanwhile: what a figure needs beside it to be trusted.

A load average says how many wanted to run, ours included. This says what the others got: the CPU
time the machine spent, less what this process, its children and theirs spent, as a share of all the
CPU time there was. On a quiet machine it is next to nothing.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

import psutil

MEASURED_S_MIN = 0.5


@dataclass(frozen=True, slots=True)
class Reading:
    """Seconds, since some fixed moment: on the clock, busy on all cores, and spent by us."""

    clock_s: float
    busy_s: float
    own_s: float


def read() -> Reading:
    """Where the machine stands now."""
    spent = psutil.cpu_times()
    busy = sum(spent) - spent.idle - getattr(spent, "iowait", 0.0) - getattr(spent, "guest", 0.0)
    return Reading(time.monotonic(), busy, _own_s())


def _own_s() -> float:
    """CPU seconds of this process, of its descendants, and of those that have ended."""
    here = psutil.Process()
    total = 0.0
    for process in (here, *here.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            used = process.cpu_times()
            total += used.user + used.system + used.children_user + used.children_system
    return total


def others_share(before: Reading, after: Reading, cores: int) -> float | None:
    """What others used between two readings, from 0 to 1; None if they lie too close together."""
    if after.clock_s - before.clock_s < MEASURED_S_MIN:
        return None
    there_was = (after.clock_s - before.clock_s) * cores
    others = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
    return min(1.0, max(0.0, others / there_was))
