"""Counters by name, and the list that says which guards must be seen firing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stagemesh import guards
from stagemesh.frame import RowStatus
from stagemesh.guards import FAMILIES, GUARDS, Counters, unseen

ROOT = Path(__file__).parents[2]
COUNTED = re.compile(r"""\.count\(\s*(f?)"([a-z_.]+)[\"{]""")


@pytest.fixture(autouse=True)
def unwitnessed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted by hand here is no guard that fired."""
    monkeypatch.setattr(Counters, "witness", None)


def test_a_name_never_counted_reads_zero_and_is_not_stored():
    counters = Counters()
    assert counters["frames_checked"] == 0
    assert not counters
    counters.count("frames_checked")
    counters.count("frames_checked", 4)
    assert counters == {"frames_checked": 5}


def test_counters_of_components_are_added_up():
    one, two = Counters(), Counters()
    one.count("frames_checked")
    two.count("frames_checked", 2)
    two.count("frames_fenced")
    total = Counters().merged([one, two, {"frames_fenced": 3}])
    assert total == {"frames_checked": 3, "frames_fenced": 4}
    assert one == {"frames_checked": 1}


def test_names_outside_the_registry_are_shown():
    counters = Counters()
    counters.count("frames_fenced")
    counters.count("frames_enchanted")
    counters.count("rows_failed.cache_lost")
    assert counters.unregistered() == {"frames_enchanted"}


def test_a_witness_sees_every_name_that_is_counted_anywhere(monkeypatch: pytest.MonkeyPatch):
    witness: set[str] = set()
    monkeypatch.setattr(Counters, "witness", witness)
    Counters().count("frames_fenced")
    Counters().count("barriers_broken.expired")
    assert witness == {"frames_fenced", "barriers_broken.expired"}
    assert "frames_fenced" not in unseen(witness)
    assert "frames_checked" in unseen(witness)


def test_every_guard_has_a_bounded_name_and_a_meaning():
    for name, meaning in GUARDS.items():
        assert name.replace("_", "").replace(".", "").isalpha()
        assert meaning
    assert {f"tokens_rejected.{kind}" for kind in guards.CORRUPTIONS} <= set(GUARDS)
    failures = {status.name.lower() for status in RowStatus if status is not RowStatus.OK}
    assert set(guards.ROW_FAILURES) == failures


def test_every_name_that_the_product_counts_is_registered():
    unknown = []
    for room in ("stagemesh", "coordinator", "services", "stage_worker"):
        for path in sorted((ROOT / room).glob("*.py")):
            for formatted, name in COUNTED.findall(path.read_text()):
                whole = not formatted and (name in GUARDS or name.startswith(tuple(FAMILIES)))
                begins = formatted and any(known.startswith(name) for known in (*GUARDS, *FAMILIES))
                if not whole and not begins:
                    unknown.append(f"{path.name}: {name}")
    assert not unknown
