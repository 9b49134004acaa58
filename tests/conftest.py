"""Options every test may ask for, and the witness of every guard that fires, here or in a process
that a test has started."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

from stagemesh.guards import Counters

settings.register_profile("stagemesh", deadline=None, print_blob=True)
settings.load_profile("stagemesh")

WITNESSED: set[str] = set()
"""Names of every counter counted in this process so far."""
NOTES = pytest.StashKey[Path]()
"""Folder in which other processes note theirs (``tests/witness/sitecustomize.py``)."""
SHARES_THE_MACHINE = {"mesh", "services"}
"""Folders whose tests run real processes and connections against real deadlines. A machine whose
cores are taken away for seconds can fail one of them, so each gets a second try; pytest reports
every rerun. Everything else runs on virtual time and gets none."""
LONG = {"test_smollm2_types.py", "test_stress.py"}
"""Campaigns of many minutes; `make test-long` runs them with everything else."""
LAST = "test_guards_seen.py"
"""Looks at what all others have done, so it comes behind them, and only when all others run: those
of `make test`, or with ``--long`` those of `make test-long`."""


def pytest_addoption(parser):
    parser.addoption(
        "--rewrite",
        action="store_true",
        help="accept the transcripts in tests/scenarios as they come out now",
    )

    parser.addoption(
        "--long",
        action="store_true",
        help="also the long campaigns (`make test-long`)",
    )


def pytest_configure(config):
    Counters.witness = WITNESSED
    notes = config.stash[NOTES] = Path(tempfile.mkdtemp(prefix="stagemesh-witness-"))
    before = os.environ.get("PYTHONPATH", "")
    witness = str(Path(__file__).parent / "witness")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (witness, before)))
    os.environ["STAGEMESH_INTERNAL_WITNESS"] = str(notes)


def pytest_unconfigure(config):
    shutil.rmtree(config.stash[NOTES], ignore_errors=True)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        long = [item for item in items if item.path.name in LONG]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item.path.name not in LONG]
    last = [item for item in items if item.path.name == LAST]
    others = [item for item in items if item.path.name != LAST]
    on_disk = set(Path(__file__).parent.rglob("test_*.py"))
    if not config.getoption("--long"):
        on_disk = {path for path in on_disk if path.name not in LONG}
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
def witnessed(request):
    """Gives what has been counted so far, by name, in every process."""
    folder = request.config.stash[NOTES]

    def names() -> set[str]:
        found = set(WITNESSED)
        for notes in folder.iterdir():
            # A name that is only half there was counted by somebody else as well, or is missed.
            found.update(notes.read_text(encoding="utf-8").splitlines())
        return found

    return names
