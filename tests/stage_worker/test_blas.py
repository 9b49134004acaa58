"""The BLAS a compute process really has, and the environment that gives it another."""

import json
import logging
import os
import struct
import subprocess
import sys

import pytest

from stage_worker import blas
from stage_worker.machine import (
    available_bytes,
    choose_threads,
    core_count,
    describe_environment,
    kv_tokens_that_fit,
    memory_budget_bytes,
    memory_bytes,
)

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="preloading is for Linux")

REPORT = """
import dataclasses, json
import mlx.core as mx
from stage_worker import blas
a = mx.random.normal((8, 64), key=mx.random.key(0))
b = mx.random.normal((64, 32), key=mx.random.key(1))
report = dataclasses.asdict(blas.describe())
one_by_one = mx.concatenate([a[i : i + 1] @ b for i in range(8)])
report["product"] = (a @ b).tolist()
report["rows_exact"] = mx.array_equal(a @ b, one_by_one).item()
print(json.dumps(report))
"""

REEXEC = """
import json, sys
from stage_worker import blas
blas.reexec_with_fast_blas(1)
print(json.dumps([blas.describe().name, sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


def run(code, *arguments, **variables):
    clean = {
        key: value
        for key, value in os.environ.items()
        if key not in {"LD_PRELOAD", blas._REEXEC_MARK, "OPENBLAS_NUM_THREADS"}
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**clean, **variables},
        capture_output=True,
        check=True,
    )
    return json.loads(done.stdout)


@linux_only
def test_a_process_started_for_the_fast_blas_has_it_with_the_threads_asked_for(home):
    plain = run(REPORT)
    fast = run(REPORT, **blas.preload_environment(1, home=home))
    assert (plain["name"], plain["deterministic"]) == ("reference", True)
    assert (fast["name"], fast["threads"], fast["deterministic"]) == ("OpenBLAS", 1, False)
    assert fast["version"].startswith("0.3.")
    for ours, theirs in zip(fast["product"], plain["product"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


@linux_only
def test_the_deterministic_setting_keeps_rows_bit_identical(home):
    environment = blas.preload_environment(1, deterministic=True, home=home)
    assert "LD_PRELOAD" not in environment
    report = run(REPORT, **environment)
    assert report["deterministic"]
    assert report["rows_exact"]


@linux_only
def test_a_process_starts_itself_again_once_with_its_own_arguments(home):
    assert run(REEXEC, "a b", STAGEMESH_HOME=str(home)) == ["OpenBLAS", ["a b"]]
    marked = {"STAGEMESH_HOME": str(home), blas._REEXEC_MARK: "reference"}
    assert run(REEXEC, **marked) == ["reference", []]


@linux_only
def test_the_library_is_made_once(home):
    library = blas.prepare(home)
    made = library.stat().st_mtime_ns
    assert blas.prepare(home).stat().st_mtime_ns == made


@linux_only
def test_what_is_preloaded_already_stays_behind_ours(home, monkeypatch):
    library = blas.prepare(home)
    monkeypatch.setenv("LD_PRELOAD", f"{library}:libother.so")
    assert blas.preload_environment(1, home=home)["LD_PRELOAD"] == f"{library}:libother.so"


@linux_only
@pytest.mark.parametrize("missing", ["_wheel_library", "_patchelf"])
def test_without_the_means_the_reference_blas_stays_and_the_log_says_why(
    tmp_path, monkeypatch, caplog, missing
):
    def absent(*_):
        raise blas._Unavailable(f"{missing} is not here")

    monkeypatch.setattr(blas, missing, absent)
    with caplog.at_level(logging.WARNING):
        assert "LD_PRELOAD" not in blas.preload_environment(1, home=tmp_path)
    assert f"{missing} is not here" in caplog.text


@linux_only
def test_a_prepared_library_that_does_not_compute_is_not_kept(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(blas, "_CHECK", "import sys; sys.exit(3)")
    with caplog.at_level(logging.WARNING):
        assert blas.prepare(tmp_path) is None
    assert "does not compute (status 3)" in caplog.text
    assert list((tmp_path / "blas").iterdir()) == []


@linux_only
@pytest.mark.parametrize("content", [b"", b"\x7fELF\x01\x01", b"MZ" + bytes(62)])
def test_a_file_that_is_not_a_64_bit_library_has_no_symbols_to_rename(tmp_path, content):
    path = tmp_path / "library.so"
    path.write_bytes(content)
    with pytest.raises(blas._Unavailable):
        list(blas.exported_symbols(path))


def test_a_library_without_a_symbol_table_exports_nothing(tmp_path):
    path = tmp_path / "library.so"
    path.write_bytes(b"\x7fELF\x02\x01" + bytes(34) + struct.pack("<Q", 64) + bytes(16))
    assert list(blas.exported_symbols(path)) == []


def test_the_log_line_says_what_was_wanted_and_what_there_is():
    report = blas.BlasReport("OpenBLAS", "0.3.34", 2, deterministic=False)
    line = blas.summary(report, {blas._REEXEC_MARK: "fast"})
    assert line.startswith("BLAS OpenBLAS 0.3.34 (fast, fast wanted), 2 threads")


@pytest.mark.parametrize(
    ("processes", "cores", "threads"), [(1, 8, 8), (2, 8, 4), (3, 2, 1), (0, 4, 4)]
)
def test_processes_share_the_cores_and_each_has_at_least_one_thread(processes, cores, threads):
    assert choose_threads(processes, cores) == threads


def test_without_mlx_no_blas_is_claimed(monkeypatch):
    found = blas.importlib.util.find_spec
    monkeypatch.setattr(
        blas.importlib.util, "find_spec", lambda name: None if name == "mlx" else found(name)
    )
    described = describe_environment()
    assert described["blas"] == "none (mlx is not installed)"
    assert described["deterministic"] is False


def test_the_environment_description_has_what_a_figure_needs():
    described = describe_environment()
    assert {"python", "mlx", "mlx_lm", "numpy", "cores", "blas", "threads"} <= set(described)
    assert json.loads(json.dumps(described)) == described
    assert described["cores"] == core_count() >= 1


GIVE_WAY = """
import json, os, threading
from pathlib import Path
from stage_worker import machine
gate, seen = threading.Event(), []
def look():
    gate.wait()
    seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
other = threading.Thread(target=look)
other.start()
machine.give_way(0)
before = os.getpriority(os.PRIO_PROCESS, 0)
machine.give_way(9)
gate.set()
other.join()
group = Path("/proc/self/autogroup")
told = group.read_text().split()[-1] if group.exists() else "9"
print(json.dumps([before, os.getpriority(os.PRIO_PROCESS, 0), *seen, told]))
"""


@linux_only
def test_a_process_that_gives_way_does_so_with_all_its_threads_and_its_session():
    done = subprocess.run(
        [sys.executable, "-c", GIVE_WAY], capture_output=True, check=True, start_new_session=True
    )
    before, after, other, group = json.loads(done.stdout)
    assert before < 9
    assert (after, other, group) == (9, 9, "9")


def test_budgets_leave_room_and_never_vanish():
    assert 0 < memory_budget_bytes(2) < memory_bytes() / 2
    assert 0 < available_bytes() <= memory_bytes()
    assert kv_tokens_that_fit(1 << 10, available=1 << 30) == (1 << 20) // 5
    assert kv_tokens_that_fit(1 << 30, available=1 << 20) == 1


SET_THREADS = """
import json
from stage_worker import blas
before = blas.describe().threads
blas.set_threads(2)
print(json.dumps([before, blas.describe().threads]))
"""


@linux_only
def test_the_number_of_threads_can_be_changed_while_a_process_runs(home):
    environment = blas.preload_environment(1, home=home)
    assert run(SET_THREADS, **environment) == [1, 2]
    assert run(SET_THREADS) == [1, 1]  # the reference library has no threads to set


@linux_only
def test_idle_threads_leave_the_core_to_other_stages_soon(home):
    assert int(blas.preload_environment(2, home=home)["OPENBLAS_THREAD_TIMEOUT"]) < 20
