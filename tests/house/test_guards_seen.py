"""A guard that no test has seen fire is decoration. Runs last, and only when every test runs."""

from __future__ import annotations

from stagemesh.guards import FAMILIES, GUARDS, unseen


def test_every_guard_has_been_seen_firing_by_some_test(witnessed: set[str]) -> None:
    never = {name: GUARDS[name] for name in sorted(unseen(witnessed))}
    assert not never
    families = {prefix for prefix in FAMILIES if any(n.startswith(prefix) for n in witnessed)}
    assert families == set(FAMILIES)
