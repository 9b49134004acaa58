"""How long this process's threads ran, and how long they were ready to run and had no core.

Linux keeps both for every thread (``/proc/PID/task/TID/schedstat``: nanoseconds on a core,
nanoseconds in a run queue, turns; Documentation/scheduler/sched-stats.rst). They tell an overloaded
machine from slow or hung work, which look the same from outside: a thread that waits for a core has
done nothing wrong, and one that hangs waits for no core.

Two things follow from them:

* the coordinator takes the time without a core off a worker's account (``starved_s``), so that a
  machine that others keep busy makes nobody suspect;
* a step gets fewer threads while they would wait for one another (``contention``).

Elsewhere than on Linux nothing is known, and every figure is 0.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

THREADS = Path("/proc/self/task")


@dataclass(frozen=True, slots=True)
class CoreTimes:
    """Sums over all threads, those that have ended included, seconds since the first look."""

    ran_s: float = 0.0
    waited_s: float = 0.0

    def since(self, before: CoreTimes) -> CoreTimes:
        """What was added."""
        return CoreTimes(self.ran_s - before.ran_s, self.waited_s - before.waited_s)

    @property
    def contention(self) -> float:
        """Which part of the time in which a thread wanted a core it had none, 0 to 1."""
        wanted_s = self.ran_s + self.waited_s
        return self.waited_s / wanted_s if wanted_s > 0 else 0.0

    def starved_s(self, elapsed_s: float) -> float:
        """By how much the want of cores held the process up in ``elapsed_s``, seconds.

        Threads may have waited at the same time: on average as many wanted a core as ``ran_s`` and
        ``waited_s`` make in ``elapsed_s``, and the process as a whole waited as long as one of
        them. Never more than ``elapsed_s``, and next to nothing where nobody wanted a core."""
        if elapsed_s <= 0:
            return 0.0
        wanting = (self.ran_s + self.waited_s) / elapsed_s
        return self.waited_s / max(1.0, wanting)


class CoreClock:
    """Reads the times of all threads of this process. Costs a few microseconds per thread."""

    def __init__(self, threads: Path = THREADS) -> None:
        self._directory = threads
        self._seen: dict[str, tuple[int, int]] = {}
        self._ran_ns = self._waited_ns = 0

    def read(self) -> CoreTimes:
        """The times until now. What a thread did between the last look and its end is lost."""
        seen: dict[str, tuple[int, int]] = {}
        with contextlib.suppress(OSError):
            for entry in self._directory.iterdir():
                with contextlib.suppress(OSError, ValueError):  # it has just ended
                    ran, waited, _turns = (entry / "schedstat").read_text("ascii").split()
                    seen[entry.name] = int(ran), int(waited)
        for thread, (ran_ns, waited_ns) in seen.items():
            ran_before, waited_before = self._seen.get(thread, (0, 0))
            if ran_ns < ran_before or waited_ns < waited_before:
                ran_before = waited_before = 0  # another thread that got the same number
            self._ran_ns += ran_ns - ran_before
            self._waited_ns += waited_ns - waited_before
        self._seen = seen
        return CoreTimes(self._ran_ns / 1e9, self._waited_ns / 1e9)
