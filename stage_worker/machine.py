"""What this machine offers a worker: cores, memory, and the environment a figure was taken in."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import sys
import sysconfig
from pathlib import Path
from typing import Any

MEMORY_SHARE = 0.8
"""Part of the machine's memory that weights and caches may take; the rest is for everything
else."""
KV_MEMORY_SHARE = 0.2
"""Part of what the weights leave free that one worker may promise to KV caches. Batches hold
padding too and are copied to grow, and several workers may share the machine."""

OPTIMIZED_OPTION = "--enable-optimizations"
"""What CPython is configured with to be compiled for what it was seen to do: distributions, uv
and python.org do, pyenv does if it is told to."""
DISTRIBUTION_PREFIX = "/usr"
"""Where a distribution's own Python lies. Those are compiled that way by rules of their own."""

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
    """Let other processes go first from now on, as ``nice`` does. On Linux every thread has a
    niceness of its own, and a session is a group to the scheduler, inside of which alone it counts;
    so each thread is told, and the group as well."""
    if niceness <= 0:
        return
    try:
        threads = [int(entry.name) for entry in Path("/proc/self/task").iterdir()]
    except OSError:
        threads = [0]  # not Linux: the process as a whole
    for thread in threads:
        with contextlib.suppress(OSError):  # it has ended, or yields more already
            os.setpriority(os.PRIO_PROCESS, thread, niceness)
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


def available_bytes() -> int:
    """Memory that is free now, or could be made free; less where a container's limit says so."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = next(line for line in lines if line.startswith("MemAvailable:"))
        free = int(found.split()[1]) * 1024
    except (OSError, ValueError, StopIteration):
        free = memory_budget_bytes() // 2  # not Linux: the other half is for everything else
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii").strip()
        return free if limit == "max" else max(0, min(free, int(limit) - int(used)))
    except (OSError, ValueError):
        return free


def kv_tokens_that_fit(bytes_per_token: int, available: int | None = None) -> int:
    """Cached positions that a worker can promise, whose weights are loaded; at least one."""
    room = int((available_bytes() if available is None else available) * KV_MEMORY_SHARE)
    return max(1, room // max(1, bytes_per_token))


def python_build() -> str:
    """How this interpreter was compiled, as `build_of` says it."""
    return build_of(sysconfig.get_config_var("CONFIG_ARGS"), sys.base_prefix)


def build_of(configured: str | None, prefix: str) -> str:
    """How a Python was compiled: "optimized" (from a profile), "plain", or "" where it does not say
    how it was configured. ``configured``: its CONFIG_ARGS; ``prefix``: where it lies."""
    if prefix == DISTRIBUTION_PREFIX:
        return "optimized"
    if configured is None:
        return ""
    return "optimized" if OPTIMIZED_OPTION in configured else "plain"


def describe_environment() -> dict[str, Any]:
    """Versions, cores, BLAS and threads: what a figure needs beside it to be compared."""
    from stage_worker import blas

    report = blas.describe()
    versions = {key: _version(package) for key, package in _PACKAGES.items()}
    return {
        "python": platform.python_version(),
        "python_build": python_build(),
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
