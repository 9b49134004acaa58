"""Which of several ways to compute the same is faster here: measured once, as a process starts.

Processes of a mesh start at the same time, and a core that is one of two threads of a real one
computes 1.6 times as slowly while the other thread works. So ways are not timed one behind the
other, each for itself: the one that was timed while the neighbour rested would win (two of 32
workers, four starting at once on two cores, chose a layout with which a step takes nearly twice as
long, for as long as they lived). They are timed in turns, each way once a turn, and what is
compared is a turn's ratio: whoever slows a whole turn down cancels out. Times are the process's
own, which waiting for a core does not lengthen.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

TURNS = 12

_Way = TypeVar("_Way")


def costs(
    ways: Mapping[_Way, Callable[[], object]], clock: Callable[[], float] = time.process_time
) -> dict[_Way, float]:
    """What each way costs, as a multiple of the first: the median over the turns. Each is computed
    once before, untimed."""
    for compute in ways.values():
        compute()
    ratios: dict[_Way, list[float]] = {way: [] for way in ways}
    for _ in range(TURNS):
        taken = {way: _seconds(compute, clock) for way, compute in ways.items()}
        first = next(iter(taken.values()))
        for way, seconds in taken.items():
            ratios[way].append(seconds / first)
    return {way: statistics.median(found) for way, found in ratios.items()}


def _seconds(compute: Callable[[], object], clock: Callable[[], float]) -> float:
    """Never 0, so that anything can be a multiple of it."""
    began = clock()
    compute()
    return max(clock() - began, 1e-9)
