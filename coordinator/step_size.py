"""How many requests decode in one step of a route: no more than pay.

Larger steps read the weights less often per token, but their tokens come all at once, and the
coordinator passes them on one behind the other: the last of 64 waits for 63 others. Where a token
takes the route a millisecond or more, as real models on a CPU do, nobody notices, and steps are as
large as they may be. A route that is faster is tried: now and then some steps have half as many
rows, or twice as many again, and the smaller size stays where a token took the route hardly longer.
A coordinator that is itself what holds the route up is part of what is measured, and larger steps
cost it less, so under load they grow again.

A size is tried over `TRIAL_STEPS` steps and compared with as many before it and as many behind it:
requests that come or go make steps cheaper or dearer meanwhile. Compared are means of the middle
three quarters: steps follow one another, so one that was late makes the next one short,
which a median does not see, and one that was held up for long is not the size's doing. A trial that
changed nothing is repeated ever more seldom: other rows side by side mean copied caches.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable

ROWS_MIN = 4
"""Steps of fewer rows hardly have tokens to wait for, but each costs the coordinator as much."""
TOKEN_S_MAX = 0.001
"""Only where a token takes the route less than this are smaller steps tried."""
SLOWER_MAX = 1.10
"""What a token may cost in smaller steps, as a multiple of what it does in larger ones."""
GAIN_MIN = 1.15
"""What larger steps have to gain to come back."""
TRIAL_STEPS = 48
"""Two windows of so many steps of the same size differ by 8 % or less, nineteen times of twenty."""
STEPS_FIRST, STEPS_MOST = 48, 4096
"""Steps of the usual size from one trial to the next: at first, and after many without effect."""


class StepSize:
    """See the module. ``rows`` is the limit for the next decode step, ``most`` the highest. Seconds
    are of the route's time."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.usual = most
        self._trial = 0
        """The size being tried; 0: none is."""
        self._tried: list[float] = []
        """Per token, of steps of that size."""
        self._found: tuple[int, float, float] | None = None
        """A size that was tried, what it cost, and what the usual one had cost before."""
        self._grow_next = False
        self._between = STEPS_FIRST
        self._since = 0
        self._missed = 0
        self._costs: deque[float] = deque(maxlen=TRIAL_STEPS)
        """Per token, of steps of the usual size."""

    @property
    def rows(self) -> int:
        return self._trial or self.usual

    def add(self, rows: int, seconds: float) -> None:
        """A decode step of so many rows has come back."""
        if self._trial:
            self._add_to_trial(rows, seconds / rows)
        elif _is_full(rows, self.usual):
            self._costs.append(seconds / rows)
            self._since += 1
            if self._found is not None and self._since == TRIAL_STEPS:
                self._judge(*self._found)
            elif self._since >= self._between and len(self._costs) == TRIAL_STEPS:
                self._begin()

    def _add_to_trial(self, rows: int, cost_s: float) -> None:
        if _is_full(rows, self._trial):
            self._tried.append(cost_s)
        else:
            self._missed += 1  # sent before, or there are not so many requests any more
        if len(self._tried) == TRIAL_STEPS:
            self._found = self._trial, _typical(self._tried), _typical(self._costs)
            self._trial, self._since = 0, 0
        elif self._missed > TRIAL_STEPS:
            self._end(changed=False)

    def _begin(self) -> None:
        is_fast = _typical(self._costs) < TOKEN_S_MAX
        can_shrink = is_fast and self.usual >= 2 * ROWS_MIN
        can_grow = self.usual < self.most
        if can_grow and (self._grow_next or not can_shrink):
            self._trial = min(2 * self.usual, self.most)
        elif can_shrink:
            self._trial = self.usual // 2
        self._since = 0

    def _judge(self, size: int, cost_s: float, before_s: float) -> None:
        usual_s = (before_s + _typical(self._costs)) / 2.0
        if size < self.usual:
            pays = cost_s <= SLOWER_MAX * usual_s
        else:
            pays = GAIN_MIN * cost_s <= usual_s
        if pays:
            self.usual = size
            self._costs = deque(self._tried, maxlen=TRIAL_STEPS)
        self._end(changed=pays)

    def _end(self, *, changed: bool) -> None:
        if not changed:
            self._grow_next = not self._grow_next
        self._between = STEPS_FIRST if changed else min(2 * self._between, STEPS_MOST)
        self._trial, self._missed, self._since = 0, 0, 0
        self._tried, self._found = [], None


def _typical(costs: Iterable[float]) -> float:
    """The mean without the lowest and the highest eighth."""
    ordered = sorted(costs)
    beside = len(ordered) // 8
    return statistics.fmean(ordered[beside : len(ordered) - beside])


def _is_full(rows: int, size: int) -> bool:
    """Whether a step of that size was divided evenly, not one with what was left."""
    return size // 2 < rows <= size
