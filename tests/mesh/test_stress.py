"""The stress command itself: real processes, every kind of fault, one seed, judged at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from services.stress.history import from_lines
from services.stress.plan import FaultName

ROOT = Path(__file__).parents[2]
RUN_S_MAX = 420.0


def stress(*flags: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "services", "stress", "--model", "tiny", "--json", *flags)
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=RUN_S_MAX,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.timeout(RUN_S_MAX + 30)
def test_every_fault_fires_and_no_token_is_lost_repeated_or_wrong(tmp_path: Path):
    report = tmp_path / "report"
    done = stress("--duration", "24s", "--seed", "11", "--streams", "4", "--report", str(report))
    assert done.returncode in {0, 1}, done.stderr
    found = json.loads(done.stdout)
    assert found["violations"] == [], done.stderr
    assert done.returncode == 0
    assert found["ok"]
    assert (found["lost"], found["duplicated"], found["wrong"], found["hung"]) == (0, 0, 0, 0)
    assert set(found["faults"]) == {name.value for name in FaultName}
    assert all(found["faults"].values()), found["faults"]
    assert found["recoveries"]
    assert found["tokens"] > 0
    assert found["seed"] == 11
    assert found["recovery_seconds"]["max"] > 0
    assert {"coordinator", "stage-0", "full-worker"} <= found["rss_mib"].keys()
    for name in ("stress.md", "stress.json", "throughput.svg", "latency.svg", "recovery.svg"):
        assert (report / name).stat().st_size > 0
    answers, marks = from_lines((report / "history.jsonl").read_text().splitlines())
    assert len(answers) == found["answers"]["asked"]
    assert {mark.fault for mark in marks if mark.fired} == set(found["faults"])
    assert not left_behind(report), "a process of the run is still there"


def left_behind(report: Path) -> list[int]:
    """Processes whose command line names the run."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if any(str(report) in word for word in process.info["cmdline"] or ())
    ]


def test_a_plan_that_does_not_exist_is_bad_usage():
    done = stress("--faults", "flood")
    assert done.returncode == 2
    assert "flood" in done.stderr
    assert "black-hole" in done.stderr, "it says which faults there are"
