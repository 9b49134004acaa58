"""Would the referee notice if a guard were missing? Each guard is taken out, one by one."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from coordinator.simulation.campaign import hunt
from coordinator.simulation.planted.bug import Bug
from coordinator.simulation.planted.catalogue import BUGS
from coordinator.simulation.world import simulate
from stagemesh.window import InflightWindow

SEEDS_MAX = 400
KILLED_MIN = 0.95
FOUND_AS = {
    "I1": ("generator not keyed by position", "reroute repeats the last token"),
    "I2": ("two terminals", "a token is emitted again on reroute"),
    "I3": (
        "header checksum not checked",
        "payload checksum not checked",
        "checksum covers the payload only",
        "frames of other hops accepted",
        "parts and payloads not checked",
    ),
    "I4": ("closed routes are not fenced",),
    "I5": (
        "no de-duplication",
        "a gap is accepted",
        "no position check",
        "rewind does not trim, position not checked",
    ),
    "I6": (
        "no terminal",
        "a lost worker is not noticed",
        "nobody notices a route that stands still",
    ),
    "I7": (
        "caches are not closed",
        "links of closed routes are kept",
        "only the first stage is fenced",
    ),
    "I10": ("the barrier passes early", "fingerprints ignored by barrier, worker and link"),
    "I11": ("every refusal is final", "the timer does not adapt"),
    "I12": ("the window is unbounded",),
    "I15": ("acknowledged before accepted", "dropped from the ledger before the ack"),
}
"""Bugs that break one thing, by the invariant that has to say so first: a referee in which another
one happens to notice later has lost this one."""


def _hunt(name: str) -> tuple[str, str]:
    """The bug and the invariant that it was found by, if it was."""
    found = hunt(name, range(SEEDS_MAX))
    return name, found[1].split()[0] if found else ""


@pytest.mark.timeout(600)
def test_nearly_every_planted_bug_is_found():
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        found = dict(pool.map(_hunt, [bug.name for bug in BUGS]))
    survivors = [name for name, invariant in found.items() if not invariant]
    assert len(survivors) <= (1 - KILLED_MIN) * len(BUGS), survivors
    wanted = {name: invariant for invariant, names in FOUND_AS.items() for name in names}
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug.reached_by], ids=lambda bug: bug.name)
def test_a_bug_dies_at_the_seed_that_reaches_its_guard(bug: Bug):
    assert set(bug.reached_by) <= set(range(SEEDS_MAX))
    seed, _ = hunt(bug.name, range(SEEDS_MAX)) or (None, "")
    assert seed == bug.reached_by[0]


def test_a_hunt_tries_no_seed_outside_its_range():
    (bug,) = (bug for bug in BUGS if bug.name == "values that are no numbers pass")
    assert bug.reached_by
    assert hunt(bug.name, range(2)) is None


def test_there_are_enough_planted_bugs_and_pairs_among_them():
    assert len(BUGS) >= 20
    assert len({bug.name for bug in BUGS}) == len(BUGS)
    assert sum(bug.pair for bug in BUGS) >= 3


def test_a_planted_bug_is_gone_behind_its_block():
    before = InflightWindow.fits
    bug = Bug("always fits", ((InflightWindow, "fits", lambda self, size: True),))
    with bug.planted():
        assert InflightWindow.fits is not before
    assert InflightWindow.fits is before


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_changes_something(bug: Bug):
    before = [owner.__dict__[name] for owner, name, _ in bug.changes]
    with bug.planted():
        during = [owner.__dict__[name] for owner, name, _ in bug.changes]
    assert all(one is not other for one, other in zip(before, during, strict=True))


def test_the_same_seeds_without_a_planted_bug_are_clean():
    assert not [seed for seed in range(12) if simulate(seed).violations]
