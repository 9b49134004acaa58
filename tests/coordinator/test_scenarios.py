"""Transcripts of the machine, in ``tests/scenarios``. They read as documentation.

``pytest tests/coordinator/test_scenarios.py --rewrite`` accepts what comes out now. Commit a
rewritten transcript only if you understand every line that changed, and want it.
"""

from pathlib import Path

import pytest

from coordinator.scenario import Scenario

FOLDER = Path(__file__).resolve().parents[1] / "scenarios"
FILES = sorted(FOLDER.glob("*.txt"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_machine_still_says(path, request):
    written = path.read_text(encoding="utf-8")
    said = Scenario().run(written)
    if request.config.getoption("--rewrite"):
        path.write_text(said, encoding="utf-8")
        return
    assert said == written


def test_there_are_scenarios():
    assert len(FILES) >= 5
