"""Verdicts by progress: quick on silence, patient with slowness, blind to the observer's own
stalls."""

from __future__ import annotations

import heapq
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.failure_detector import Cause, DetectorPolicy, FailureDetector, Health
from stagemesh.topology import WorkerName

A, B, C = WorkerName("a"), WorkerName("b"), WorkerName("c")
STEP_S = 0.05


class Bench:
    """A detector that is looked at as often as it asks to be."""

    def __init__(self, policy: DetectorPolicy | None = None, *workers: WorkerName) -> None:
        self.detector = FailureDetector(policy)
        self.now = 0.0
        for worker in workers or (A,):
            self.detector.watch(worker, 0.0)

    def pass_time(self, seconds: float, *, reporting: tuple[WorkerName, ...] = ()) -> None:
        """Let time pass, looking in as asked; ``reporting`` workers report without progress."""
        end = self.now + seconds
        while self.now < end:
            wanted = self.detector.next_deadline(self.now)
            self.now = min(end, wanted if wanted is not None else end, self.now + 0.25)
            for worker in reporting:
                self.detector.alive(worker, self.now)
            self.detector.verdicts(self.now)

    def work(self, steps: int, *, seconds: float = STEP_S, worker: WorkerName = A) -> None:
        """Steps in lock step: owed, reported, settled."""
        for step in range(steps):
            self.detector.owe(worker, step, self.now)
            self.now += seconds
            self.detector.alive(worker, self.now)
            self.detector.settle(worker, step, self.now)

    def health(self, worker: WorkerName = A) -> tuple[Health, Cause]:
        verdict = self.detector.verdict(worker, self.now)
        return verdict.health, verdict.cause


def test_a_stopped_process_is_failed_within_two_seconds_of_its_last_sign():
    bench = Bench()
    bench.work(100)
    last_sign = bench.now
    bench.detector.owe(A, "next", bench.now)
    while bench.health()[0] is not Health.FAILED:
        bench.pass_time(0.05)
    assert bench.health() == (Health.FAILED, Cause.SILENT)
    assert 1.5 < bench.now - last_sign <= 2.0
    assert "silent for" in bench.detector.verdict(A, bench.now).evidence


def test_silence_is_suspect_before_it_is_failure():
    bench = Bench()
    bench.work(20)
    bench.detector.owe(A, "next", bench.now)
    bench.pass_time(1.1)
    assert bench.health() == (Health.SUSPECT, Cause.SILENT)
    since = bench.detector.verdict(A, bench.now).since
    bench.pass_time(0.2)
    assert bench.detector.verdict(A, bench.now).since == since
    bench.detector.alive(A, bench.now)
    bench.detector.settle(A, "next", bench.now)
    assert bench.health() == (Health.HEALTHY, Cause.NONE)


def test_a_slow_worker_that_reports_is_suspect_and_not_failed():
    bench = Bench()
    bench.work(100)
    bench.detector.owe(A, "slow", bench.now)
    bench.pass_time(12.0, reporting=(A,))
    assert bench.health() == (Health.SUSPECT, Cause.SLOW)


def test_time_without_a_core_is_not_held_against_a_worker():
    """The same second and a half: late where the worker had its cores, and in time where it lacked
    them, by its own reports."""
    for starved_s, health in ((0.0, Health.SUSPECT), (0.2, Health.HEALTHY)):
        bench = Bench()
        bench.work(50)
        bench.detector.owe(A, "long", bench.now)
        for _ in range(6):
            bench.now += 0.25
            bench.detector.alive(A, bench.now, starved_s=starved_s)
            verdict = bench.detector.verdict(A, bench.now)
        assert verdict.health is health, verdict
    bench.pass_time(1.5, reporting=(A,))
    said = bench.detector.verdict(A, bench.now)
    assert said.cause is Cause.SLOW
    assert "1.200 s without a core not counted" in said.evidence


def test_nobody_can_excuse_more_time_than_has_passed():
    bench = Bench()
    bench.work(50)
    bench.detector.owe(A, "hung", bench.now)
    for _ in range(8):
        bench.now += 0.25
        bench.detector.alive(A, bench.now, starved_s=1e9)
        bench.detector.alive(A, bench.now, starved_s=-1e9)
    assert bench.health() == (Health.HEALTHY, Cause.NONE)
    bench.pass_time(1.5, reporting=(A,))
    assert bench.health() == (Health.SUSPECT, Cause.SLOW)


def test_a_worker_that_hangs_on_a_busy_machine_is_still_stuck():
    """Only its event loop wants a core, and gets it late."""
    bench = Bench()
    bench.work(50)
    bench.detector.owe(A, "hung", bench.now)
    while bench.health()[0] is not Health.FAILED:
        bench.now += 0.25
        bench.detector.alive(A, bench.now, starved_s=0.1)
        assert bench.now < 60.0
    assert bench.health() == (Health.FAILED, Cause.STUCK)


def test_what_is_learnt_of_durations_is_the_workers_own_time():
    bench = Bench()
    for step in range(50):
        bench.detector.owe(A, step, bench.now)
        bench.now += 2.0
        bench.detector.alive(A, bench.now, starved_s=1.9)
        bench.detector.settle(A, step, bench.now)
    assert bench.detector.deadline_s(A, "decode") == bench.detector.policy.token_deadline_s


def test_a_worker_that_reports_for_ever_without_progress_is_stuck():
    bench = Bench()
    bench.work(100)
    bench.detector.owe(A, "hung", bench.now)
    bench.pass_time(16.0, reporting=(A,))
    assert bench.health() == (Health.FAILED, Cause.STUCK)


def test_progress_short_of_settling_keeps_a_long_step_alive():
    bench = Bench()
    bench.work(10)
    bench.detector.owe(A, "long", bench.now)
    for _ in range(120):
        bench.pass_time(0.5, reporting=(A,))
        bench.detector.progress(A, bench.now)
    assert bench.health()[0] is Health.HEALTHY


def test_a_worker_that_says_it_has_nothing_to_do_is_starved_not_slow():
    bench = Bench()
    bench.work(10)
    bench.detector.owe(A, "lost", bench.now)
    for _ in range(400):
        bench.pass_time(0.25)
        bench.detector.alive(A, bench.now, idle=True)
        assert bench.health()[0] is not Health.FAILED
    assert bench.health() == (Health.SUSPECT, Cause.STARVED)


def test_a_failed_worker_stays_failed_until_it_is_watched_again():
    bench = Bench()
    bench.detector.owe(A, 1, 0.0)
    bench.pass_time(2.0)
    assert bench.health()[0] is Health.FAILED
    bench.detector.alive(A, bench.now)
    bench.detector.settle(A, 1, bench.now)
    assert bench.health()[0] is Health.FAILED
    bench.detector.watch(A, bench.now)
    assert bench.health()[0] is Health.HEALTHY


def test_an_idle_worker_owes_nothing_but_its_reports():
    bench = Bench()
    bench.pass_time(2.5)
    assert bench.health()[0] is Health.HEALTHY
    bench.pass_time(1.0)
    assert bench.health() == (Health.SUSPECT, Cause.IDLE_SILENT)
    bench.pass_time(7.0)
    assert bench.health() == (Health.FAILED, Cause.IDLE_SILENT)


def test_silence_while_idle_is_not_held_against_new_work():
    bench = Bench()
    bench.pass_time(2.0)
    bench.detector.owe(A, 1, bench.now)
    assert bench.health()[0] is Health.HEALTHY
    bench.pass_time(0.9)
    assert bench.health()[0] is Health.HEALTHY


def test_work_may_take_what_the_caller_expected():
    bench = Bench()
    bench.detector.owe(A, "prefill", 0.0, 4.0, phase="prefill", work=2048)
    bench.pass_time(15.0, reporting=(A,))
    assert bench.health()[0] is Health.HEALTHY
    bench.pass_time(2.0, reporting=(A,))
    assert bench.health() == (Health.SUSPECT, Cause.SLOW)


def test_deadlines_are_learnt_per_phase_and_grow_with_the_work():
    detector = FailureDetector()
    for step in range(50):
        detector.owe(A, step, step * 10.0, phase="prefill", work=1000)
        detector.alive(A, step * 10.0 + 0.2)
        detector.settle(A, step, step * 10.0 + 2.0)
    assert 2.0 <= detector.deadline_s(A, "prefill", work=1000) < 4.0
    assert 8.0 <= detector.deadline_s(A, "prefill", work=4000) < 16.0
    assert detector.deadline_s(A, "decode") == detector.policy.first_deadline_s
    assert detector.deadline_s(A, "prefill", work=1) == detector.policy.token_deadline_s
    assert detector.deadline_s(A, "prefill", work=10**9) == detector.policy.deadline_ceiling_s


def test_when_the_observer_itself_stood_still_nobody_is_blamed():
    bench = Bench(None, A, B)
    bench.work(10, worker=A)
    bench.detector.owe(A, "x", bench.now)
    bench.detector.owe(B, "y", bench.now)
    bench.now += 30.0
    assert bench.health(A)[0] is Health.HEALTHY
    assert bench.health(B)[0] is Health.HEALTHY
    assert bench.detector.stalled_s == pytest.approx(29.5)
    assert bench.detector.counters["observer_stalled"] == 1
    bench.pass_time(2.0)
    assert bench.health(A) == (Health.FAILED, Cause.SILENT)


def test_blame_goes_to_the_silent_stage_and_not_to_those_that_wait_for_it():
    bench = Bench(None, A, B, C)
    for worker in (A, B, C):
        bench.detector.owe(worker, 1, bench.now)
    bench.pass_time(1.9, reporting=(A, C))
    blamed = bench.detector.blame([A, B, C], bench.now)
    assert blamed is not None
    assert (blamed.worker, blamed.failed) == (B, True)
    assert str(blamed).startswith("b failed: owes 1 and was silent")
    bench.detector.forget(B)
    assert bench.detector.blame([A, C], bench.now) is None


def test_a_healthy_route_has_nobody_to_blame():
    bench = Bench(None, A, B)
    assert bench.detector.blame([A, B], 0.1) is None


def test_a_worker_nobody_knows_is_failed():
    assert FailureDetector().verdict(A, 0.0).failed
    assert FailureDetector().next_deadline(0.0) is None


def test_cancelled_and_released_work_is_not_owed_any_more():
    bench = Bench()
    bench.detector.owe(A, 1, 0.0)
    bench.detector.owe(A, 1, 0.0)
    bench.detector.owe(A, 2, 0.0)
    assert bench.detector.owed(A) == 2
    bench.detector.cancel(A, 1, 0.1)
    bench.detector.release(A, 0.2)
    bench.detector.cancel(A, 2, 0.2)
    bench.detector.settle(A, 2, 0.2)
    assert bench.detector.owed(A) == 0
    bench.pass_time(2.5)
    assert bench.health()[0] is Health.HEALTHY


def test_suspicions_and_failures_are_counted_once():
    bench = Bench()
    bench.detector.owe(A, 1, 0.0)
    bench.pass_time(5.0)
    assert bench.detector.counters["workers_suspected"] == 1
    assert bench.detector.counters["workers_failed"] == 1


@settings(max_examples=100)
@given(st.floats(0.005, 0.8), st.integers(0, 60), st.integers(0, 2**32))
def test_regular_work_of_any_speed_is_never_suspect_and_a_stop_always_fails(step_s, steps, seed):
    rng = random.Random(seed)
    bench = Bench()
    for step in range(steps):
        bench.detector.owe(A, step, bench.now)
        bench.now += step_s * rng.uniform(0.8, 1.2)
        assert bench.health()[0] is Health.HEALTHY
        bench.detector.alive(A, bench.now)
        bench.detector.settle(A, step, bench.now)
    bench.detector.owe(A, "stopped", bench.now)
    bench.pass_time(8.0)
    assert bench.health() == (Health.FAILED, Cause.SILENT)


def overloaded_mesh(seed: int, minutes: float, *, stop_at: float | None = None):
    """Three stages on a machine whose cores are overloaded four times, seen by an overloaded
    observer.

    Steps take 50 ms times four, with heavy tails and pauses of seconds; reports come every 250 ms
    but late; the observer looks in late and sometimes stands still. Yields (time, detector) at
    every look. Times are virtual; everything is drawn from ``seed``."""
    rng = random.Random(seed)
    detector = FailureDetector()
    queue: list[tuple[float, int, str, int]] = []
    order = 0

    def push(when: float, what: str, stage: int) -> None:
        nonlocal order
        order += 1
        heapq.heappush(queue, (when, order, what, stage))

    def step_time() -> float:
        pause = rng.uniform(1.0, 6.0) if rng.random() < 0.002 else 0.0
        return 4 * STEP_S * rng.lognormvariate(0.0, 0.5) + pause

    workers = (A, B, C)
    for stage in range(3):
        detector.watch(workers[stage], 0.0)
        push(0.25, "report", stage)
    push(0.1, "look", -1)
    push(0.0, "begin", 0)
    step = 0
    now = 0.0
    while queue and now < minutes * 60:
        due, _, what, stage = heapq.heappop(queue)
        now = max(now, due)
        stopped = stop_at is not None and stage == 1 and now >= stop_at
        if what == "begin":
            detector.owe(workers[stage], step, now)
            if not stopped:
                push(now + step_time(), "done", stage)
        elif what == "done" and not stopped:
            detector.progress(workers[stage], now)
            detector.settle(workers[stage], step, now)
            step += stage == 2
            push(now, "begin", (stage + 1) % 3)
        elif what == "report" and not stopped:
            detector.alive(workers[stage], now)
            push(now + 0.25 + rng.expovariate(1 / 0.06), "report", stage)
        elif what == "look":
            if rng.random() < 0.003:
                now += rng.uniform(1.0, 5.0)  # the observer's own process stands still
            yield now, detector
            wanted = detector.next_deadline(now)
            push(min(wanted or now + 1.0, now + 0.25) + rng.expovariate(1 / 0.02), "look", -1)


@pytest.mark.parametrize("seed", range(6))
def test_ten_minutes_of_fourfold_overload_bring_no_false_verdict(seed):
    looks = suspicions = 0
    for now, detector in overloaded_mesh(seed, 10):
        for verdict in detector.verdicts(now):
            assert not verdict.failed, (now, str(verdict))
            suspicions += verdict.health is Health.SUSPECT
            looks += 1
    assert looks > 3 * 2000
    assert suspicions / looks < 0.02
    assert detector.stalled_s > 0


@pytest.mark.parametrize("seed", range(5))
def test_under_overload_a_stopped_stage_is_still_found_and_alone(seed):
    for now, detector in overloaded_mesh(seed, 2, stop_at=60.0):
        failed = [verdict.worker for verdict in detector.verdicts(now) if verdict.failed]
        if failed:
            assert failed == [B]
            assert 60.0 < now < 70.0 + detector.stalled_s
            return
    pytest.fail("the stopped stage was never found")
