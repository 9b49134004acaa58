"""What a worker says of the cores it got, and whom it tells besides the coordinator."""

from __future__ import annotations

import asyncio

import pytest

from services import worker_reports
from services.worker_reports import CORES_READ_EVERY_S, WorkerReports
from stage_worker import core_wait
from stage_worker.core_use import CoreUse
from stage_worker.runner import StageRunner
from stagemesh.guards import Counters


class Threads:
    """One thread's figures, and the clock."""

    def __init__(self, directory):
        self.file = directory / "1" / "schedstat"
        self.file.parent.mkdir()
        self.now = 100.0
        self.ran_s = self.waited_s = 0.0
        self.add(0.0, 0.0, 0.0)

    def add(self, ran_s, waited_s, elapsed_s):
        self.ran_s, self.waited_s = self.ran_s + ran_s, self.waited_s + waited_s
        self.now += elapsed_s
        self.file.write_text(f"{int(self.ran_s * 1e9)} {int(self.waited_s * 1e9)} 1")


@pytest.fixture
def threads(tmp_path, monkeypatch):
    found = Threads(tmp_path)
    monkeypatch.setattr(worker_reports.time, "monotonic", lambda: found.now)
    monkeypatch.setattr(worker_reports, "CoreClock", lambda: core_wait.CoreClock(tmp_path))
    return found


def test_a_report_says_how_long_the_worker_lacked_cores_and_the_compute_thread_hears(threads):
    async def scenario():
        runner = StageRunner(None, lambda *_: None, lambda _: None)
        runner.cores = CoreUse(1, 2, lambda _: None)
        told = []
        runner.cores.notice = lambda *what: told.append(what)
        reports = WorkerReports(runner, Counters())
        assert reports.progress().starved_us == 0
        threads.add(0.1, 0.3, 0.4)
        assert reports.progress().starved_us == 300_000
        threads.add(0.5, 0.5, 0.5)  # two threads, each half of the time without a core
        assert reports.progress().starved_us == 550_000
        threads.add(0.0, 1.0, CORES_READ_EVERY_S / 2)
        assert reports.progress().starved_us == 550_000  # not looked at yet
        assert [round(elapsed_s, 6) for _times, elapsed_s, _now in told] == [0.4, 0.5]
        assert told[0][0].contention == pytest.approx(0.75)

    asyncio.run(scenario())
