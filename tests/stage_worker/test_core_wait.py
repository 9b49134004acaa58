"""How long threads wanted a core: read for all of them, and made into one process's delay."""

import os
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stage_worker.core_wait import THREADS, CoreClock, CoreTimes

linux = pytest.mark.skipif(not THREADS.exists(), reason="only Linux keeps these figures")


def put(directory, thread, ran_ns, waited_ns):
    (directory / thread).mkdir(exist_ok=True)
    (directory / thread / "schedstat").write_text(f"{ran_ns} {waited_ns} 7\n")


def test_all_threads_count_and_those_that_ended_stay_counted(tmp_path):
    put(tmp_path, "1", 2_000_000_000, 500_000_000)
    put(tmp_path, "2", 1_000_000_000, 0)
    clock = CoreClock(tmp_path)
    assert clock.read() == CoreTimes(3.0, 0.5)
    (tmp_path / "2" / "schedstat").unlink()
    put(tmp_path, "1", 2_500_000_000, 750_000_000)
    assert clock.read() == CoreTimes(3.5, 0.75)
    assert clock.read().since(CoreTimes(3.0, 0.5)) == CoreTimes(0.5, 0.25)


def test_a_thread_number_that_is_used_again_is_another_thread(tmp_path):
    put(tmp_path, "9", 5_000_000_000, 5_000_000_000)
    clock = CoreClock(tmp_path)
    clock.read()
    put(tmp_path, "9", 1_000_000_000, 2_000_000_000)
    assert clock.read() == CoreTimes(6.0, 7.0)


def test_where_nothing_is_kept_nothing_is_known(tmp_path):
    assert CoreClock(tmp_path / "absent").read() == CoreTimes()
    put(tmp_path, "1", 1, 1)
    (tmp_path / "1" / "schedstat").write_text("nonsense")
    assert CoreClock(tmp_path).read() == CoreTimes()
    assert CoreTimes().contention == 0.0
    assert CoreTimes().starved_s(1.0) == 0.0


@pytest.mark.parametrize(
    ("ran_s", "waited_s", "starved_s"),
    [
        (1.0, 0.0, 0.0),  # it had what it wanted
        (0.1, 0.9, 0.9),  # one thread after the other, on a tenth of a core
        (0.5, 1.5, 0.75),  # two at once, each on a quarter of a core
        (0.01, 0.04, 0.04),  # hung: only its event loop wants a core now and then
    ],
)
def test_a_process_is_held_up_as_long_as_one_of_its_waiting_threads(ran_s, waited_s, starved_s):
    assert CoreTimes(ran_s, waited_s).starved_s(1.0) == pytest.approx(starved_s)


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0, 10))
def test_nobody_is_held_up_longer_than_time_passed(ran_s, waited_s, elapsed_s):
    times = CoreTimes(ran_s, waited_s)
    assert 0.0 <= times.starved_s(elapsed_s) <= min(elapsed_s, waited_s) * (1 + 1e-9)
    assert 0.0 <= times.contention <= 1.0


@linux
def test_two_that_want_one_core_wait_for_it():
    """A child on this thread's core, in its session so that no scheduler group sets it apart."""
    mine = os.sched_getaffinity(0)
    core = min(mine)
    spin = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    child = subprocess.Popen([sys.executable, "-c", spin])
    try:
        os.sched_setaffinity(0, {core})
        clock = CoreClock()
        before, deadline = clock.read(), time.monotonic() + 30
        while (added := clock.read().since(before)).waited_s < 0.05:
            assert time.monotonic() < deadline, added
        assert added.ran_s > 0
    finally:
        os.sched_setaffinity(0, mine)
        child.kill()
        child.wait()
