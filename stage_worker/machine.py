"""What this machine offers a worker: cores, memory, and the environment a figure was taken in."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

MEMORY_SHARE = 0.8
"""Part of the machine's memory that weights and caches may take; the rest is for everything
else."""
KV_MEMORY_SHARE = 0.5
"""Part of what the weights leave free that KV caches may take."""

_PACKAGES = {"mlx": "mlx", "mlx_lm": "mlx-lm", "numpy": "numpy", "grpcio": "grpcio"}


def core_count() -> int:
    """Cores this process may use: its affinity, and a container's quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = _quota_cores()
    return max(1, min(cores or 1, quota or cores or 1))


def _quota_cores() -> int | None:
    """Whole cores a control group allows, or None for no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return None if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return None


def choose_threads(processes: int, cores: int | None = None) -> int:
    """BLAS threads for each of ``processes`` compute processes that share this machine.

    Processes that share cores use one thread each: threads that wait for a core someone else holds
    make every product slower than one thread would.
    """
    return max(1, (cores or core_count()) // max(1, processes))


def give_way(niceness: int) -> None:
    """Let other processes go first, as ``nice`` does. A session of its own is a group to Linux's
    scheduler, inside of which alone niceness counts; so the group is told as well."""
    if niceness <= 0:
        return
    os.nice(max(0, niceness - os.nice(0)))
    if os.getsid(0) == os.getpid():
        with contextlib.suppress(OSError):  # no such groups here
            Path("/proc/self/autogroup").write_text(str(niceness), encoding="ascii")


def memory_bytes() -> int:
    """Physical memory in bytes, or a container's limit if that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        return total if limit == "max" else min(total, int(limit))
    except (OSError, ValueError):
        return total


def memory_budget_bytes(processes: int = 1) -> int:
    """Bytes that each of ``processes`` workers on this machine may plan with."""
    return int(memory_bytes() * MEMORY_SHARE) // max(1, processes)


def kv_budget_tokens(weight_bytes: int, bytes_per_token: int, processes: int = 1) -> int:
    """Cached positions a worker has room for beside its weights; at least one request's worth."""
    free = memory_budget_bytes(processes) - weight_bytes
    return max(1024, int(free * KV_MEMORY_SHARE) // max(1, bytes_per_token))


def describe_environment() -> dict[str, Any]:
    """Versions, cores, BLAS and threads: what a figure needs beside it to be compared."""
    from stage_worker import blas

    report = blas.describe()
    versions = {key: _version(package) for key, package in _PACKAGES.items()}
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": core_count(),
        "blas": report.title,
        "threads": report.threads,
        "deterministic": report.deterministic,
        **{key: version for key, version in versions.items() if version},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
