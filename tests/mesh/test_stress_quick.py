"""A minute of the stress command: faults on frames, connections, wires and processes, judged like
an hour of all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from services.stress.history import from_lines

RUN_S_MAX = 300.0
FAULTS = (
    *("drop", "corrupt", "duplicate", "reset", "client-cut"),
    *("black-hole", "sigkill", "coordinator-kill"),
)
PLAN = """
every_s = 2.0
hold_s = 1.0
[workload]
answers = 8
answer_tokens = [24, 64]
[faults]
"""


@pytest.mark.timeout(RUN_S_MAX + 30)
def test_a_mesh_under_stress_loses_nothing_and_the_report_says_how(
    tmp_path: Path,
    stress: Callable[..., CompletedProcess[str]],
    left_behind: Callable[[Path], list[int]],
):
    plan, report = tmp_path / "plan.toml", tmp_path / "report"
    plan.write_text(PLAN + "".join(f"{name} = 1\n" for name in FAULTS))
    done = stress(
        *("--stages", "2", "--streams", "2", "--duration", "15s", "--seed", "4"),
        *("--faults", str(plan), "--report", str(report)),
        limit_s=RUN_S_MAX,
    )
    assert done.returncode in {0, 1}, done.stderr
    found = json.loads(done.stdout)
    assert found["violations"] == [], done.stderr
    assert done.returncode == 0
    assert (found["lost"], found["duplicated"], found["wrong"], found["hung"]) == (0, 0, 0, 0)
    assert found["faults"].keys() == set(FAULTS)
    assert all(found["faults"].values()), found["faults"]
    assert found["recoveries"]
    assert 0 < found["recovery_seconds"]["p50"] <= found["recovery_seconds"]["max"]
    assert found["tokens"] > 0
    for name in ("stress.md", "stress.json", "throughput.svg", "latency.svg", "recovery.svg"):
        assert (report / name).stat().st_size > 0
    answers, marks = from_lines((report / "history.jsonl").read_text().splitlines())
    assert len(answers) == found["answers"]["asked"] == found["answers"]["ended"]
    assert {mark.fault for mark in marks if mark.fired and mark.path} == set(FAULTS)
    assert not left_behind(report), "a process of the run is still there"


def test_a_plan_that_does_not_exist_is_bad_usage(stress: Callable[..., CompletedProcess[str]]):
    done = stress("--faults", "flood")
    assert done.returncode == 2
    assert "flood" in done.stderr
    assert "black-hole" in done.stderr, "it says which faults there are"
