"""When which fault happens where: a pure function of plan, seed, duration and stages.

Faults come in rounds. A round is a shuffled deck that holds every fault of the plan as often as its
weight says, so that a run of one round has met them all. Times are jittered around the plan's
distance; if the run is too short for one round, the distance shrinks until it fits. A time is when
a fault is due: one that must wait (for a whole mesh, or for a frame to come by) happens later.

Draws are SHA-256 of (seed, purpose, number), not a generator's state: the n-th fault does not
depend on how many draws the one before it took.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from services.stress.plan import BETWEEN_STAGES, FRAME_FAULTS, FaultName, Plan

JITTER = 0.4
"""Share of the distance by which a time may be off, either way."""
LEAD_S = 1.0
"""Nothing happens before this."""
EVERY_S_MIN = 0.05
FRAMES_MAX = 3
"""Frames that one frame fault meets, one after the other."""

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class Injection:
    """One fault. ``at_s``: seconds after the start. ``place``: for frame faults the hop (0 is into
    the first stage, ``stages`` is back to the coordinator), for others the worker (``stages`` is
    the full worker). ``variant``: which of a fault's forms. ``order``: wires of a swizzle, first as
    they stop, then as they come back."""

    number: int
    at_s: float
    fault: FaultName
    place: int
    frames: int = 1
    variant: int = 0
    order: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    def __str__(self) -> str:
        return f"#{self.number} {self.fault.value} at {self.at_s:.1f} s, place {self.place}"


class Draws:
    """Numbers that depend on the seed and their names only."""

    def __init__(self, seed: int, *names: object) -> None:
        self._prefix = "/".join(str(part) for part in (seed, *names))

    def integer(self, name: object, below: int) -> int:
        """Uniform in [0, below), for any ``below`` far under 2^64."""
        digest = hashlib.sha256(f"{self._prefix}/{name}".encode()).digest()
        return int.from_bytes(digest[:8], "little") % below

    def share(self, name: object) -> float:
        """Uniform in [0, 1)."""
        return self.integer(name, 1 << 53) / float(1 << 53)

    def shuffled(self, name: object, items: Sequence[_Item]) -> list[_Item]:
        """All items in a drawn order."""
        order = sorted(range(len(items)), key=lambda at: self.integer(f"{name}/{at}", 1 << 62))
        return [items[at] for at in order]


def schedule(plan: Plan, seed: int, duration_s: float, stages: int) -> tuple[Injection, ...]:
    """Every fault of the run, in time order."""
    deck = [name for name, weight in plan.faults.items() for _ in range(weight)]
    if not deck:
        return ()
    kinds = len(plan.faults)
    every_s = max(EVERY_S_MIN, min(plan.every_s, (duration_s - LEAD_S) / (kinds + 0.5)))
    count = max(kinds, int((duration_s - LEAD_S) / every_s))
    draws = Draws(seed, "schedule")
    found: list[Injection] = []
    waiting: list[FaultName] = []
    rounds = 0
    for number in range(count):
        jitter = (2.0 * draws.share(f"{number}/jitter") - 1.0) * JITTER * every_s
        at_s = LEAD_S + every_s * (number + 0.5) + jitter
        if not waiting:
            waiting = _round(draws, plan, deck, rounds)
            rounds += 1
        spares_full = rounds == 1
        fault, draw = waiting.pop(0), Draws(seed, "fault", number)
        found.append(_injection(draw, number, at_s, fault, stages, spares_full=spares_full))
    return tuple(found)


def _round(draws: Draws, plan: Plan, deck: Sequence[FaultName], number: int) -> list[FaultName]:
    """A shuffled deck; the first begins with each fault once."""
    if number:
        return draws.shuffled(f"round {number}", deck)
    rest = list(deck)
    for name in plan.faults:
        rest.remove(name)
    return draws.shuffled("first", list(plan.faults)) + draws.shuffled("rest", rest)


def _injection(
    draws: Draws,
    number: int,
    at_s: float,
    fault: FaultName,
    stages: int,
    *,
    spares_full: bool,
) -> Injection:
    """``spares_full``: a kill of the first round meets a stage. The full worker may stand idle, and
    a run with one kill would then prove no recovery."""
    variant = draws.integer("variant", 1 << 16)
    if fault in BETWEEN_STAGES:
        place = 1 + draws.integer("place", max(1, stages - 1))
    elif fault in FRAME_FAULTS or (fault is FaultName.SIGKILL and not spares_full):
        place = draws.integer("place", stages + 1)
    else:
        place = draws.integer("place", stages)
    frames = 1 + draws.integer("frames", FRAMES_MAX) if fault in FRAME_FAULTS else 1
    order: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    if fault is FaultName.SWIZZLE_CLOG:
        count = 1 + draws.integer("wires", stages)
        chosen = draws.shuffled("stop", range(stages))[:count]
        order = (tuple(chosen), tuple(draws.shuffled("return", chosen)))
    return Injection(number, at_s, fault, place, frames, variant, order)
