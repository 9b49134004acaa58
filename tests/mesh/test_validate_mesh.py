"""``stagemesh validate`` on meshes of real processes: well, killed, and computing otherwise."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from services import certs

if TYPE_CHECKING:
    from tests.mesh.conftest import ProcessMesh

ROOT = Path(__file__).parents[2]
VALIDATE_S_MAX = 560.0


def validate(tmp_path: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    """Exit status and the JSON object."""
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(["The harbour was quiet that morning, and nobody " * 2]))
    command = [sys.executable, "-m", "services", "validate", "--model", "tiny", "--deterministic"]
    done = subprocess.run(
        [*command, "--prompts", str(prompts), "--tokens", "8", "--json", *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=VALIDATE_S_MAX,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_private_mesh_is_bit_exact_alone_together_on_long_prompts_and_through_kills(
    tmp_path: Path, model_home: Path
) -> None:
    status, report = validate(
        tmp_path,
        *("--stages", "2", "--seeds", "3", "--concurrency", "2"),
        *("--needle", "600", "--failover", "--report", str(tmp_path / "report")),
    )
    assert status == 0
    assert (report["ok"], report["mode"], report["score"]) == (True, "exact", 1.0)
    situations = {run["situation"] for run in report["runs"]}
    points = ("prefill", "first-token", "middle", "last-token")
    kills = {f"failover:stage-{stage}@{point}" for stage in (0, 1) for point in points}
    assert situations == {"alone", "together:2", *kills}
    assert {run["prompt_tokens"] for run in report["runs"]} >= {255, 256, 257, 513, 600}
    recovered = [run for run in report["runs"] if run["recoveries"]]
    assert len(recovered) >= 4
    for run in report["runs"]:
        assert run["agreement"] == 1.0
        assert run["max_abs_dlogit"] == run["mean_kl"] == 0.0
        assert run["first_divergence"] is run["culprit"] is None
        assert run["boundaries_compared"] or "failover" in run["situation"]
    assert "passed" in (tmp_path / "report" / "validate.md").read_text()
    assert json.loads((tmp_path / "report" / "validate.json").read_text())["ok"] is True


@pytest.mark.timeout(300)
def test_a_mesh_with_certificates_is_validated_from_outside_with_an_administrators(
    tmp_path: Path, make_mesh: type[ProcessMesh]
) -> None:
    pki = certs.init(tmp_path / "pki").directory
    mesh = make_mesh(tmp_path, tls=pki)
    with contextlib.ExitStack() as stack:
        stack.callback(mesh.stop)
        mesh.coordinator()
        mesh.worker("stage-0", "0-2")
        mesh.worker("stage-1", "2-4")
        mesh.wait_for_routes(["stage-0", "stage-1"])
        flags = ("--quick", "--address", mesh.address, "--client-certs", str(pki))
        status, report = validate(tmp_path, *flags, "--concurrency", "2")
    assert (status, report["ok"], report["mode"], report["score"]) == (0, True, "exact", 1.0)
    assert {run["situation"] for run in report["runs"]} == {"alone", "together:2"}
    assert all(run["boundaries_compared"] for run in report["runs"])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("fault", "kind"), [("wrong layer order", "compute"), ("lost KV of one layer", "state")]
)
def test_a_worker_that_computes_something_else_is_found_and_named(
    tmp_path: Path, mesh: ProcessMesh, fault: str, kind: str
) -> None:
    mesh.coordinator()
    with (mesh.directory / "stage-0.log").open("ab") as log:
        mesh.processes["stage-0"] = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.faults.faulty_worker", fault, "stage-worker"),
                *(*mesh.flags, "--coordinator", mesh.address, "--name", "stage-0"),
                *("--span", "0-2"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
        )
    mesh.worker("stage-1", "2-4")
    mesh.wait_for_routes(["stage-0", "stage-1"])
    status, report = validate(tmp_path, "--address", mesh.address, "--concurrency", "1")
    assert status == 1
    assert (report["ok"], report["mode"]) == (False, "exact")
    assert report["score"] < 1.0
    for run in report["runs"]:
        culprit = run["culprit"]
        assert (culprit["worker"], culprit["kind"], culprit["layers"]) == ("stage-0", kind, "0-2")
        assert culprit["boundary"] == "stage-0→stage-1 (layer 2)"
