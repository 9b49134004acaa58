"""The only source of chance in the simulator: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).

A run is a pure function of its seed. The generator is written out here, so that neither the
interpreter's version nor anything else that draws can change a run that was recorded. ``fork``
gives each concern a stream of its own: a fault that draws more does not move the workload.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


class Prng:
    """Uniform draws from one 64-bit state."""

    __slots__ = ("_state",)

    def __init__(self, seed: int) -> None:
        self._state = (seed * 0xD1342543DE82EF95 + _GOLDEN) & _MASK

    def bits(self) -> int:
        """64 uniform bits."""
        self._state = (self._state + _GOLDEN) & _MASK
        value = self._state
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        return value ^ (value >> 31)

    def random(self) -> float:
        """Uniform in [0, 1)."""
        return (self.bits() >> 11) * 2.0**-53

    def below(self, count: int) -> int:
        """Uniform in 0 … ``count`` - 1; the bias of the remainder is far below what a run could
        show."""
        return self.bits() % count

    def between(self, low: int, high: int) -> int:
        """Uniform in ``low`` … ``high``, both included."""
        return low + self.below(high - low + 1)

    def uniform(self, low: float, high: float) -> float:
        """Uniform in [``low``, ``high``)."""
        return low + (high - low) * self.random()

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.random() < probability

    def choice(self, items: Sequence[Item]) -> Item:
        """One of ``items``, which must not be empty."""
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """``items`` in another order."""
        order = list(items)
        for index in range(len(order) - 1, 0, -1):
            other = self.below(index + 1)
            order[index], order[other] = order[other], order[index]
        return order

    def heavy_tail(self, typical: float, longest: float) -> float:
        """Pareto with shape 1.2: mostly near ``typical``, sometimes up to ``longest``."""
        return float(min(longest, typical * (1.0 - self.random()) ** (-1 / 1.2)))

    def fork(self) -> Prng:
        """An independent stream."""
        return Prng(self.bits())
