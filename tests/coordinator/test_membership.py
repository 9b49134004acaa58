"""Who is on the list of workers, and for how long. On virtual time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.core import IDLE_TICK_S
from coordinator.events import DrainRequested, WorkerLost
from coordinator.failure_detector import Health
from coordinator.mesh_state import WorkerState
from coordinator.settings import MeshPolicy
from coordinator.testing import MemoryMesh

KEPT_S = 60.0


def booted() -> MemoryMesh:
    mesh = MemoryMesh(MeshPolicy(gone_worker_kept_s=KEPT_S))
    for name, span in (("stage-0", "0-3"), ("stage-1", "3-6"), ("full", "0-6")):
        mesh.join(name, span)
    assert mesh.run_until(lambda: len(mesh.open_routes()) == 2)
    return mesh


def known(mesh: MemoryMesh) -> set[str]:
    return {view.info.name for view in mesh.mesh.snapshot(mesh.now).workers}


def test_a_worker_that_went_away_is_listed_for_a_while_and_then_forgotten():
    mesh = booted()
    mesh.kill("stage-1")
    mesh.run(KEPT_S / 2)
    assert known(mesh) == {"stage-0", "stage-1", "full"}
    mesh.run(KEPT_S)
    assert known(mesh) == {"stage-0", "full"}
    assert [event.worker for event in mesh.events("WorkerLeft")] == ["stage-1"]
    assert "stage-1" not in mesh.mesh.state.recovery.workers


def test_processes_that_never_take_a_name_again_do_not_pile_up():
    mesh = booted()
    for number in range(20):
        name = f"stage-1-{number}"
        mesh.join(name, "3-6")
        mesh.kill(name)
        mesh.run(KEPT_S / 4)
    assert len(known(mesh)) <= 3 + 5
    assert mesh.open_routes()


def test_one_that_comes_back_in_time_was_never_forgotten():
    mesh = booted()
    mesh.kill("stage-1")
    mesh.run(KEPT_S / 2)
    mesh.restart("stage-1", instance="next")
    assert mesh.run_until(lambda: ("stage-0", "stage-1") in mesh.open_routes())
    mesh.run(2 * KEPT_S)
    assert known(mesh) == {"stage-0", "stage-1", "full"}
    assert not mesh.events("WorkerLeft")


def test_one_that_owes_a_reload_cannot_wait_until_that_is_forgotten():
    mesh = booted()
    worker = mesh.workers["stage-1"]
    worker.refuse_commands = True
    record = mesh.mesh.state.workers[worker.info.name]
    mesh.mesh.membership.quarantine(record.name, "it lied", mesh.now)
    mesh.feed(WorkerLost(worker.info.name, worker.info.instance, "connection reset"))
    mesh.run(3 * KEPT_S)
    assert "stage-1" in known(mesh)
    assert mesh.mesh.state.workers[record.name].distrusted == "it lied"


@pytest.mark.parametrize(("starved_s", "health"), [(0.0, Health.SUSPECT), (0.2, Health.HEALTHY)])
def test_what_a_report_says_of_cores_since_the_last_one_is_taken_off(starved_s, health):
    """The report has the sum since the process began, of which only the increase is news."""
    mesh = booted()
    detector, worker = mesh.mesh.state.detector, mesh.workers["full"]
    worker.accepted_step = 1  # which it is computing
    now, sum_s = mesh.now, 1000.0
    detector.owe("full", "an audit", now, expected_s=0.1)
    for _ in range(7):
        mesh.mesh.handle(replace(worker.report(), starved_s=sum_s), now)
        now, sum_s = now + 0.25, sum_s + starved_s
    assert detector.verdict("full", now).health is health


def test_one_that_was_silent_and_then_ends_has_failed_once():
    mesh = booted()
    mesh.stop("stage-1")
    assert mesh.run_until(lambda: bool(mesh.events("WorkerFailed")))
    failures = mesh.mesh.state.recovery.history("stage-1").failures
    mesh.kill("stage-1")
    mesh.run(0.1)
    assert [event.worker for event in mesh.events("WorkerLost")] == ["stage-1"]
    assert mesh.mesh.state.recovery.history("stage-1").failures == failures
    assert mesh.mesh.snapshot(mesh.now).counters["workers_failed_total"] == 1
    mesh.restart("stage-1", instance="next")
    assert mesh.run_until(lambda: ("stage-0", "stage-1") in mesh.open_routes())


def test_one_that_was_silent_was_to_leave_and_ends_has_left():
    mesh = booted()
    mesh.stop("stage-1")
    assert mesh.run_until(lambda: bool(mesh.events("WorkerFailed")))
    mesh.feed(DrainRequested("stage-1", 5.0))
    mesh.kill("stage-1")
    mesh.run(0.1)
    assert [event.worker for event in mesh.events("WorkerLeft")] == ["stage-1"]
    assert known(mesh) == {"stage-0", "full"}


def test_a_route_is_in_doubt_until_none_of_its_workers_is():
    mesh = booted()
    state = mesh.mesh.state
    one, two = (state.workers[name] for name in ("stage-0", "stage-1"))
    live = state.route_of(one)
    verdicts = {two.name: Health.SUSPECT}
    usual = state.detector.verdict

    def verdict(name, now):
        found = usual(name, now)
        return replace(found, health=verdicts[name]) if name in verdicts else found

    state.detector.verdict = verdict
    mesh.mesh.membership.judge(mesh.now)
    assert (two.state, live.suspect) == (WorkerState.SUSPECT, True)
    verdicts |= {one.name: Health.SUSPECT, two.name: Health.HEALTHY}
    mesh.mesh.membership.judge(mesh.now)
    assert [one.state, two.state] == [WorkerState.SUSPECT, WorkerState.READY]
    assert live.suspect
    verdicts[one.name] = Health.HEALTHY
    mesh.mesh.membership.judge(mesh.now)
    assert not live.suspect


def test_a_process_that_another_replaces_has_failed_once():
    mesh = booted()
    mesh.restart("stage-1", instance="next")
    history = mesh.mesh.state.recovery.history("stage-1")
    assert history.failures == 1
    assert history.held_until == mesh.now + mesh.mesh.state.policy.breaker_base_s
    assert [event.worker for event in mesh.events("WorkerLost")] == ["stage-1"]
    assert mesh.run_until(lambda: ("stage-0", "stage-1") in mesh.open_routes())


def test_one_that_was_silent_and_is_to_leave_is_told_so_as_soon_as_it_is_back():
    mesh = booted()
    mesh.stop("stage-1")
    assert mesh.run_until(lambda: mesh.mesh.state.workers["stage-1"].state is WorkerState.FAILED)
    mesh.feed(DrainRequested("stage-1"))
    mesh.run(IDLE_TICK_S / 3)
    mesh.resume("stage-1")
    assert mesh.run_until(lambda: bool(mesh.events("WorkerReturned")))
    back_at = mesh.now
    assert mesh.run_until(lambda: any("let stage-1 go" in line for line in mesh.transcript))
    assert mesh.now == back_at
