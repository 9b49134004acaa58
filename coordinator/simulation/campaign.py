"""Many runs, counted: what `stagemesh simulate` and the tests report.

Pure: a campaign is a sum of outcomes, and sums of parts can be added, so that the shell may spread
seeds over processes in any order and get the same result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from coordinator.simulation.plan import FAULTS, PHASES
from coordinator.simulation.planted.catalogue import BUGS_BY_NAME
from coordinator.simulation.world import Outcome, simulate

CELLS = tuple(f"{fault}×{phase}" for fault in FAULTS for phase in PHASES)
"""Every fault × phase."""


@dataclass(slots=True)
class Campaign:
    """Sums over runs. ``violations``: (seed, invariant, detail)."""

    seeds: int = 0
    faults: int = 0
    events: int = 0
    tokens: int = 0
    violations: list[tuple[int, str, str]] = field(default_factory=list)
    cells: dict[str, int] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    resumed: int = 0

    def add(self, outcome: Outcome) -> None:
        """Count one run."""
        self.seeds += 1
        self.faults += outcome.faults
        self.events += outcome.events
        self.tokens += outcome.tokens
        self.resumed += outcome.resumed
        self.violations += [
            (outcome.seed, one.invariant, f"{one.detail} (at {one.at:.4f} s)")
            for one in outcome.violations
        ]
        _sum(self.cells, outcome.cells)
        _sum(self.counters, outcome.counters)
        _sum(self.failed, dict.fromkeys(outcome.failed, 1))

    def merge(self, other: Campaign) -> None:
        """Add another part."""
        self.seeds += other.seeds
        self.faults += other.faults
        self.events += other.events
        self.tokens += other.tokens
        self.resumed += other.resumed
        self.violations += other.violations
        _sum(self.cells, other.cells)
        _sum(self.counters, other.counters)
        _sum(self.failed, other.failed)

    def rarest(self, count: int) -> list[tuple[str, int]]:
        """The cells that were hit least, every cell counted."""
        hits = [(cell, self.cells.get(cell, 0)) for cell in CELLS]
        return sorted(hits, key=lambda one: (one[1], one[0]))[:count]


def run_seeds(seeds: Iterable[int]) -> Campaign:
    """Run these seeds, one behind the other."""
    campaign = Campaign()
    for seed in seeds:
        campaign.add(simulate(seed))
    return campaign


def hunt(bug: str, seeds: Sequence[int]) -> tuple[int, str] | None:
    """A seed that exposes a planted bug, and the violation; None if none does."""
    planted = BUGS_BY_NAME[bug]
    likely = [seed for seed in planted.reached_by if seed in seeds]
    for seed in (*likely, *seeds):
        outcome = simulate(seed, changed=planted.planted())
        if outcome.violations:
            return seed, str(outcome.violations[0])
    return None


def _sum(total: dict[str, int], more: dict[str, int]) -> None:
    for name, value in more.items():
        total[name] = total.get(name, 0) + value
