"""``--calibrate``: the tolerance of a pair is measured, kept, used, and used for no other pair."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from services import settings
from services.client import MeshClient
from services.validate import calibration
from services.validate.play import Validation
from services.validate.report import Report
from stage_worker.model_source import ResolvedModel
from stage_worker.tiny_models import write_tiny_model
from stagemesh.sampling import LOGPROBS_MAX
from stagemesh.v1 import admin_service_pb2
from tests.mesh.own_loop_mesh import own_loop_mesh

COUNT = 4


def _validation(directory: Path, **changes: Any) -> Validation:
    usual = Validation(
        model=ResolvedModel(directory, "tiny", "tiny"),
        settings=settings.load(environment={}),
        entries=[{"prompt": "The tide came in and the boats rose with it."}],
        seeds=(7,),
        count=COUNT,
        needle=0,
        needle_count=0,
        concurrency=1,
        failover=False,
        calibrate=False,
        tau=None,
        note=lambda _line: None,
    )
    return replace(usual, **changes)


def _tau(validation: Validation, report: Report, status: Any) -> tuple[float, str]:
    """What a further run on the same pair would be judged by."""
    return validation._tau(report.session.reference, status, deterministic=False)


async def test_a_measured_tolerance_is_kept_and_used_for_its_pair_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mesh here multiplies with mlx's own BLAS and does not say so; the reference with the fast
    one where there is one: a pair that differs in the last bits."""
    monkeypatch.setenv("STAGEMESH_HOME", str(tmp_path / "home"))
    directory = tmp_path / "tiny"
    directory.mkdir()
    write_tiny_model(directory, "llama", layers=4)
    usual = _validation(directory)
    measuring = _validation(directory, calibrate=True)
    async with (
        own_loop_mesh(directory) as mesh,
        MeshClient(mesh.coordinator.server.address) as client,
    ):
        status = await client.mesh()
        first = await measuring.of_running(client)
        second = await usual.of_running(client)

    measured = first.calibration
    assert measured is not None
    assert first.tau_source == "calibration"
    assert measured["samples"] == 2 * COUNT * LOGPROBS_MAX
    assert measured["tau"] == 2.0 * measured["largest"]
    assert (tmp_path / "home" / measured["file"]).is_file()
    tau = max(measured["tau"], calibration.TAU_MIN)
    # What was measured is what the pair is then held to, and the measuring run is well by it.
    assert (first.ok, first.session.tolerance.tau) == (True, tau)
    assert (second.ok, second.tau_source, second.session.tolerance.tau) == (
        True,
        "calibrated",
        tau,
    )
    assert second.calibration is None

    # What was given goes before what was measured, and measuring before both.
    assert _tau(replace(usual, tau=0.25), second, status) == (0.25, "given")
    assert _tau(replace(measuring, tau=0.25), second, status)[1] == "calibration"
    default = (calibration.TAU_DEFAULT["f32"], "default")
    assert _tau(replace(usual, model=ResolvedModel(directory, "other", "")), second, status) == (
        default
    )
    elsewhere = admin_service_pb2.GetMeshResponse()
    elsewhere.CopyFrom(status)
    for one in elsewhere.workers:
        one.worker.environment["blas"] = "Accelerate"
    assert _tau(usual, second, elsewhere) == default


@pytest.mark.parametrize(
    ("mesh_is", "reference_is", "source"),
    [(True, True, "exact"), (True, False, "default"), (False, True, "default")],
)
def test_only_two_exact_sides_are_held_to_every_bit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mesh_is: bool,
    reference_is: bool,
    source: str,
) -> None:
    monkeypatch.setenv("STAGEMESH_HOME", str(tmp_path))
    facts = {"dtype": "bf16", "environment": {"deterministic": reference_is}}
    reference: Any = SimpleNamespace(facts=facts)
    status = admin_service_pb2.GetMeshResponse()
    validation = _validation(tmp_path)
    tau, found = validation._tau(reference, status, deterministic=mesh_is)
    assert (found, tau == 0.0) == (source, source == "exact")
    # A tolerance that was measured does not soften what can be exact.
    calibration.store_tau(tmp_path, validation._key(reference, status), 0.5)
    tau, found = validation._tau(reference, status, deterministic=mesh_is)
    assert (tau, found) == ((0.0, "exact") if source == "exact" else (0.5, "calibrated"))
    assert replace(validation, tau=0.25)._tau(reference, status, mesh_is) == (0.25, "given")
