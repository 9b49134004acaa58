"""Options every test may ask for, and the witness of every guard that fires in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from stagemesh.guards import Counters

settings.register_profile("stagemesh", deadline=None, print_blob=True)
settings.load_profile("stagemesh")

WITNESSED: set[str] = set()
"""Names of every counter counted by any test so far."""
SHARES_THE_MACHINE = {"mesh", "services"}
"""Folders whose tests run real processes and connections against real deadlines. A machine whose
cores are taken away for seconds can fail one of them, so each gets a second try; pytest reports
every rerun. Everything else runs on virtual time and gets none."""
LONG = {"test_matrix.py", "test_survival.py", "test_stress.py", "test_validate_mesh.py"}
"""Campaigns of many minutes on real processes; `make test-long` runs them with everything else."""
LAST = "test_guards_seen.py"
"""Looks at what all others have done, so it comes behind them, and only when all others run."""


def pytest_addoption(parser):
    parser.addoption(
        "--rewrite",
        action="store_true",
        help="accept the transcripts in tests/scenarios as they come out now",
    )

    parser.addoption(
        "--long",
        action="store_true",
        help="also the long campaigns on real processes (`make test-long`)",
    )


def pytest_configure(config):
    Counters.witness = WITNESSED


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        long = [item for item in items if item.path.name in LONG]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item.path.name not in LONG]
    last = [item for item in items if item.path.name == LAST]
    others = [item for item in items if item.path.name != LAST]
    on_disk = set(Path(__file__).parent.rglob("test_*.py"))
    filtered = config.getoption("keyword") or config.getoption("markexpr")
    alone = not others
    is_whole = not filtered and {item.path for item in items} >= on_disk
    if last and not is_whole and not alone:
        config.hook.pytest_deselected(items=last)
        last = []
    items[:] = [*others, *last]
    for item in items:
        if SHARES_THE_MACHINE & set(item.path.parts):
            item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.fixture(scope="session")
def witnessed():
    """What has been counted so far, by name."""
    return WITNESSED
