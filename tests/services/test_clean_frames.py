"""No false alarm: clean frames of every kind through every check of a hop."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "clean_frames.py"


def test_clean_frames_of_every_kind_raise_no_alarm() -> None:
    command = [sys.executable, SCRIPT, "3000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = json.loads(done.stdout)
    assert (done.returncode, said["alarms"], said["other_counters"]) == (0, 0, {})
    assert said["frames"] == 3000
    assert said["missing"] == []
    hops = [count for kind, count in said["kinds"].items() if kind.startswith("hop ")]
    assert hops == [1000, 1000, 1000]


@pytest.mark.parametrize(
    ("module", "check"),
    [
        ("stagemesh.hop_receiver", "TokenTransferValidator.check"),
        ("stagemesh.hop_receiver", "Boundary.check"),
        ("stagemesh.parts", "PartAssembler.add"),
        ("services.finite", "rows_are_finite"),
    ],
)
def test_a_check_that_refuses_everything_is_reached_and_raises_an_alarm(module, check) -> None:
    code = (
        f"import runpy, sys, {module}\n"
        "from stagemesh.errors import FrameMalformed\n"
        "def refuse(*facts):\n"
        "    raise FrameMalformed('refused on purpose')\n"
        f"{module}.{check} = refuse\n"
        "sys.argv = ['clean_frames.py', '400']\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    said = json.loads(done.stdout)
    assert (done.returncode, said["alarms"] > 0) == (1, True)
    assert "refused on purpose" in said["first"][0]
