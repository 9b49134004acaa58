"""Answers between machines that lose, damage, forge and reorder packets are still mlx-lm's.

Network namespaces, the kernel's TCP, mutual TLS with certificates of our own: nothing here is
loopback. Where namespaces may not be made (it takes root), the reason is the skip.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from services.stress import namespaces
from services.stress.history import from_lines

ROOT = Path(__file__).parents[2]
RUN_S_MAX = 240.0
WHY_NOT = namespaces.why_not()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


def stress(report: Path, *flags: str) -> tuple[dict, subprocess.CompletedProcess[str]]:
    command = (
        *(sys.executable, "-m", "services", "stress", "--model", "tiny", "--network", "lossy"),
        *("--stages", "2", "--json", "--report", str(report), *flags),
    )
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=RUN_S_MAX,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode in {0, 1}, done.stderr
    return json.loads(done.stdout), done


def is_flawless(found: dict, done: subprocess.CompletedProcess[str]) -> bool:
    assert found["violations"] == [], done.stderr
    counts = [found[name] for name in ("lost", "duplicated", "wrong", "hung")]
    return done.returncode == 0 and found["ok"] and counts == [0, 0, 0, 0] and found["tokens"] > 0


def everywhere() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir()}


def left_behind(report: Path) -> list[int]:
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if any(str(report) in word for word in process.info["cmdline"] or ())
    ]


@pytest.mark.timeout(RUN_S_MAX + 30)
def test_answers_over_bad_links_with_tls_while_processes_die(tmp_path: Path):
    before, report = everywhere(), tmp_path / "report"
    found, done = stress(
        report, "--streams", "3", "--duration", "20s", "--seed", "5", "--faults", "sigkill"
    )
    assert is_flawless(found, done)
    assert found["network"]["lost"] > 0
    assert found["faults"] == {"sigkill": found["faults"]["sigkill"]}
    assert found["faults"]["sigkill"] > 0
    assert found["recoveries"]
    answers, _marks = from_lines((report / "history.jsonl").read_text().splitlines())
    assert all(answer.ends for answer in answers)
    assert {path.name for path in (report / "run" / "certs").iterdir()} >= {"ca.pem", "stage.key"}
    assert "TLS" in (report / "run" / "stage-0.log").read_text()
    assert everywhere() == before, "no device is left"
    assert not left_behind(report), "no process is left"
