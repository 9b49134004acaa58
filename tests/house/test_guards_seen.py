"""A guard that no test has seen fire is decoration. Runs last, and only when every test runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from stagemesh.guards import FAMILIES, GUARDS, unseen

COUNTS = "from stagemesh.guards import Counters; Counters().count('seen_elsewhere')"


def test_what_another_process_counts_is_known_here(witnessed: Callable[[], set[str]]) -> None:
    assert "seen_elsewhere" not in witnessed()
    subprocess.run([sys.executable, "-c", COUNTS], check=True)
    assert "seen_elsewhere" in witnessed()


def test_every_guard_has_been_seen_firing_by_some_test(witnessed: Callable[[], set[str]]) -> None:
    seen = witnessed()
    never = {name: GUARDS[name] for name in sorted(unseen(seen))}
    assert not never
    families = {prefix for prefix in FAMILIES if any(n.startswith(prefix) for n in seen)}
    assert families == set(FAMILIES)
