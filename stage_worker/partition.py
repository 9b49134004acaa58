"""Layers to contiguous spans: pure arithmetic, no mlx.

A pipeline runs at the pace of its slowest stage, so `balance` minimises the largest stage cost over
all contiguous partitions. The head (final norm and vocabulary projection) runs on the last stage
and counts there; the embedding is a table look-up and counts as nothing. Among optimal partitions
the one with the earliest cuts is chosen, so equal layers give spans whose sizes differ by at most
one, larger ones last only when the head leaves room for it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from stagemesh.errors import InvalidConfiguration
from stagemesh.topology import Span


def balance(costs: Sequence[float], stages: int, *, head_cost: float = 0.0) -> tuple[Span, ...]:
    """Contiguous partition of ``costs`` into ``stages`` spans with the smallest maximum cost.

    ``costs`` holds one non-negative cost per layer in any unit; ``head_cost``, in the same unit, is
    charged to the last span. Ties are broken towards equal layer counts. Raises
    InvalidConfiguration when there are more stages than layers, or a cost is negative or not
    finite.
    """
    count = len(costs)
    if not 1 <= stages <= count:
        raise InvalidConfiguration(
            f"{count} layers cannot be split over {stages} stages", setting="stages"
        )
    if any(not math.isfinite(cost) or cost < 0 for cost in (*costs, head_cost)):
        raise InvalidConfiguration("a layer's cost is negative or not finite", setting="costs")
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)

    def span_cost(first: int, last: int) -> tuple[float, int]:
        head = head_cost if last == count else 0.0
        return (total[last] - total[first] + head, last - first)

    # best[last] is (largest cost, largest layer count, cuts) for layers [0, last) over k stages.
    best: list[tuple[float, int, tuple[int, ...]] | None] = [None] * (count + 1)
    best[0] = (0.0, 0, ())
    for _ in range(stages):
        following: list[tuple[float, int, tuple[int, ...]] | None] = [None] * (count + 1)
        for last in range(1, count + 1):
            for first in range(last):
                before = best[first]
                if before is None:
                    continue
                cost, length = span_cost(first, last)
                candidate = (max(before[0], cost), max(before[1], length), (*before[2], last))
                incumbent = following[last]
                if incumbent is None or candidate < incumbent:
                    following[last] = candidate
        best = following
    found = best[count]
    if found is None:  # unreachable: 1 <= stages <= count was checked
        raise InvalidConfiguration("no partition exists", setting="stages")
    cuts = (0, *found[2])
    return tuple(Span(first, last) for first, last in itertools.pairwise(cuts))


def check_cover(spans: Sequence[Span], layer_count: int) -> None:
    """Raise InvalidConfiguration, naming the layers, unless ``spans`` cover each layer exactly
    once."""
    reached = 0
    for span in sorted(spans):
        if span.first > reached:
            raise InvalidConfiguration(
                f"no stage hosts layers {reached}-{span.first}", setting="spans"
            )
        if span.first < reached:
            raise InvalidConfiguration(
                f"layers {span.first}-{min(reached, span.last)} are hosted by more than one stage",
                setting="spans",
            )
        reached = span.last
    if reached < layer_count:
        raise InvalidConfiguration(
            f"no stage hosts layers {reached}-{layer_count}", setting="spans"
        )
    if reached > layer_count:
        raise InvalidConfiguration(
            f"layers {layer_count}-{reached} do not exist: the model has {layer_count} layers",
            setting="spans",
        )
