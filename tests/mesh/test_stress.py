"""The stress command itself: real processes, every kind of fault, one seed, judged at the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from services.stress.history import from_lines
from services.stress.plan import FaultName

RUN_S_MAX = 420.0


@pytest.mark.slow
@pytest.mark.timeout(RUN_S_MAX + 30)
def test_every_fault_fires_and_no_token_is_lost_repeated_or_wrong(
    tmp_path: Path,
    stress: Callable[..., CompletedProcess[str]],
    left_behind: Callable[[Path], list[int]],
):
    report = tmp_path / "report"
    done = stress(
        *("--duration", "24s", "--seed", "11", "--streams", "4", "--report", str(report)),
        limit_s=RUN_S_MAX,
    )
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
