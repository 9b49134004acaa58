"""No false alarm: clean frames of every kind through every check of a hop."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "clean_frames.py"


def test_clean_frames_of_every_kind_raise_no_alarm() -> None:
    command = [sys.executable, SCRIPT, "3000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = json.loads(done.stdout)
    assert (done.returncode, said["alarms"], said["other_counters"]) == (0, 0, {})
    assert said["frames"] == 3000
