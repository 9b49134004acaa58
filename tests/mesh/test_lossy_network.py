"""Answers between machines that lose, damage, forge and reorder packets are still mlx-lm's.

Network namespaces, the kernel's TCP, mutual TLS with certificates of our own: nothing here is
loopback. Where namespaces may not be made (it takes root), the reason is the skip.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from services.stress import namespaces
from services.stress.history import from_lines

RUN_S_MAX = 300.0
WHY_NOT = namespaces.why_not()
pytestmark = [
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
    pytest.mark.timeout(RUN_S_MAX + 30),
]
LOSSY = ("--network", "lossy", "--stages", "2", "--streams", "2", "--seed", "32")
"""With this seed each stage's first few hundred packets meet everything."""

Stress = Callable[..., CompletedProcess[str]]


def judged(done: CompletedProcess[str]) -> dict[str, Any]:
    """What a flawless run says."""
    assert done.returncode in {0, 1}, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["violations"] == [], done.stderr
    assert done.returncode == 0
    assert (found["lost"], found["duplicated"], found["wrong"], found["hung"]) == (0, 0, 0, 0)
    assert found["tokens"] > 0
    assert found["network"]["lost"] > 0
    assert found["answers"]["asked"] == found["answers"]["ended"] > 0
    return found


def devices() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir()}


def test_answers_with_tls_over_bad_links_while_processes_die(
    tmp_path: Path, stress: Stress, left_behind: Callable[[Path], list[int]]
):
    before, report = devices(), tmp_path / "report"
    run = ("--duration", "10s", "--faults", "sigkill", "--report", str(report))
    found = judged(stress(*LOSSY, *run, limit_s=RUN_S_MAX))
    assert found["faults"]["sigkill"] > 0
    assert found["recoveries"]
    answers, _marks = from_lines((report / "history.jsonl").read_text().splitlines())
    assert any(end.repairs for answer in answers for end in answer.ends)
    logs = [(report / "run" / f"{name}.log").read_text() for name in ("coordinator", "stage-0")]
    assert all("10.77.0." in log and "(TLS)" in log for log in logs)
    assert devices() == before, "no device is left"
    assert not left_behind(report), "no process is left"


def test_forged_bits_meet_our_own_checks_where_there_is_no_tls(tmp_path: Path, stress: Stress):
    report = tmp_path / "report"
    run = ("--duration", "8s", "--faults", "none", "--report", str(report))
    found = judged(stress(*LOSSY, "--plaintext", *run, limit_s=RUN_S_MAX))
    assert found["network"]["forged"] > 0
    assert "(plaintext)" in (report / "run" / "stage-0.log").read_text()
