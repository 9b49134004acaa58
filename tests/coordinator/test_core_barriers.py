"""Where the mesh meets: opening and reopening a route, checkpoints, leaving. On virtual time."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from coordinator.barrier import BarrierState, Trigger
from coordinator.barrier_book import CHECKPOINTS_KEPT, ENDED_BARRIERS_KEPT
from coordinator.events import BarrierArrived, DrainRequested
from coordinator.instructions import AnnounceBarrier
from coordinator.membership import DRAIN_BARRIER, DRAIN_GRACE_S
from coordinator.memory_worker import MemoryWorker
from coordinator.route import OPEN_ROUTE_BARRIER
from coordinator.settings import MeshPolicy
from coordinator.testing import MemoryMesh
from stagemesh.frame import StepFrame

PROMPT = tuple(range(1, 41))


def booted() -> MemoryMesh:
    mesh = MemoryMesh()
    for name, span in (("stage-0", "0-3"), ("stage-1", "3-6"), ("full", "all")):
        mesh.join(name, "0-6" if span == "all" else span)
    assert mesh.run_until(lambda: len(mesh.open_routes()) == 2)
    return mesh


def barriers(mesh: MemoryMesh, name: str) -> list:
    seen = mesh.mesh.snapshot(mesh.now).barriers
    return [outcome for outcome in seen if outcome.name.startswith(name)]


def test_every_checkpoint_is_a_barrier_of_all_stages_that_operators_can_see():
    mesh = booted()
    client = mesh.request(1, PROMPT, 100)
    assert mesh.run_to_end()
    assert len(client.tokens) == 100
    passed = barriers(mesh, "checkpoint/")
    assert [outcome.name.rpartition("/")[2] for outcome in reversed(passed)] == ["64", "128"]
    assert all(outcome.complete for outcome in passed)
    assert all(outcome.arrived == ("stage-0", "stage-1") for outcome in passed)
    told = [e for e in mesh.events("BarrierCompleted") if e.attributes["name"].startswith("check")]
    assert [event.request for event in told] == [(1).to_bytes(16, "big")] * 2


def test_passed_checkpoints_do_not_push_out_the_barriers_that_matter():
    mesh = booted()
    mesh.request(1, PROMPT, 100)
    assert mesh.run_to_end()
    passed = next(b for b in mesh.mesh.state.barriers._passed)
    for _ in range(3 * ENDED_BARRIERS_KEPT):
        mesh.mesh.state.barriers.record(passed)
    assert len(barriers(mesh, "checkpoint/")) == CHECKPOINTS_KEPT
    assert len(barriers(mesh, OPEN_ROUTE_BARRIER)) == 2


def test_a_checkpoint_at_which_a_stage_differs_is_broken_and_no_token_of_it_is_accepted():
    mesh = booted()
    lies: list[int] = []

    def lie(frame: StepFrame) -> StepFrame:
        marks = frame.rows[0].marks
        if frame.hop_from != 0 or not marks or marks[0].cache_length != 64 or lies:
            return frame
        lies.append(frame.step)
        other = (replace(marks[0], history_digest=marks[0].history_digest ^ 1), *marks[1:])
        return replace(frame, rows=(replace(frame.rows[0], marks=other),)).sealed()

    mesh.tampers.append(lie)
    client = mesh.request(1, PROMPT, 60)
    honest = booted()
    expected = honest.request(1, PROMPT, 60)
    assert mesh.run_to_end()
    assert honest.run_to_end()
    assert lies
    assert client.tokens == expected.tokens
    broken = [outcome for outcome in barriers(mesh, "checkpoint/") if not outcome.complete]
    assert [(outcome.state, outcome.culprits) for outcome in broken] == [
        (BarrierState.BROKEN, ("stage-0",))
    ]
    (told,) = (e for e in mesh.events("BarrierBroken") if "checkpoint" in e.attributes["name"])
    (rejected,) = mesh.events("TokenRejected")
    order = [e for e in mesh.published if e.type in ("BarrierBroken", "ChunkGenerated")]
    at = order.index(told)
    assert [e.attributes["position"] for e in order[at - 1 : at + 2 : 2]] == ["23", "24"]
    assert (told.worker, rejected.worker) == ("stage-0", "stage-0")
    assert rejected.attributes["status"] == "REJECTED"


def test_a_worker_that_leaves_meets_the_coordinator_with_empty_hands():
    mesh = booted()
    client = mesh.request(1, PROMPT, 30)
    mesh.run_until(lambda: len(client.tokens) > 3)
    mesh.feed(DrainRequested("stage-1"))
    assert mesh.run_to_end()
    assert mesh.run_until(lambda: bool(mesh.events("WorkerDrained")))
    (met,) = barriers(mesh, DRAIN_BARRIER)
    assert (met.state, met.participants) == (BarrierState.COMPLETE, ("stage-1",))
    assert len(client.tokens) == 30


def test_a_worker_that_still_holds_something_breaks_the_drain_barrier_and_is_named(monkeypatch):
    mesh = booted()

    def with_a_cache(worker, order):
        facts = {"in_flight": "0", "kv_tokens": "7"}
        return BarrierArrived(worker.info.name, "drain", order.epoch, order.generation, facts)

    monkeypatch.setattr(MemoryWorker, "leave", with_a_cache)
    mesh.feed(DrainRequested("stage-1", 1.0))
    mesh.run(1.0)
    (met,) = barriers(mesh, DRAIN_BARRIER)
    assert (met.state, met.culprits) == (BarrierState.BROKEN, ("stage-1",))
    assert "kv_tokens" in met.detail
    assert not mesh.events("WorkerDrained")


@pytest.mark.parametrize("how", ["never says anything", "dies"])
def test_a_drain_barrier_never_hangs(how: str, monkeypatch):
    mesh = booted()
    tell = mesh._tell

    def tell_nothing_of_leaving(event, *after):
        if not (isinstance(event, BarrierArrived) and event.name == DRAIN_BARRIER):
            tell(event, *after)

    monkeypatch.setattr(mesh, "_tell", tell_nothing_of_leaving)
    mesh.feed(DrainRequested("stage-1", 1.0))
    mesh.run(0.1)
    assert barriers(mesh, DRAIN_BARRIER)[0].state is BarrierState.FORMING
    if how == "dies":
        mesh.kill("stage-1")
    mesh.run(1.0 + DRAIN_GRACE_S)
    (met,) = barriers(mesh, DRAIN_BARRIER)
    assert met.cause is not None
    assert met.cause.value == ("departed" if how == "dies" else "expired")
    assert met.absent == ("stage-1",)
    known = met.last_progress["stage-1"]
    assert re.fullmatch(r"epoch \d, computed step \d+", known.text)
    assert met.formed_at < known.at <= met.ended_at
    assert how == "dies" or known.text in met.detail
    told = [e for e in mesh.events("BarrierBroken") if e.attributes["name"] == DRAIN_BARRIER]
    assert len(told) == 1


def test_an_arrival_at_a_drain_barrier_that_nobody_formed_changes_nothing():
    mesh = booted()
    mesh.feed(BarrierArrived("stage-1", DRAIN_BARRIER, 1, 9, {}))
    assert mesh.mesh.state.counters["arrivals_ignored"] == 1
    assert not barriers(mesh, DRAIN_BARRIER)


def test_reconfiguration_is_a_new_generation_at_a_new_epoch_behind_the_fence_of_the_old():
    mesh = booted()
    mesh.kill("stage-1")
    mesh.run(1.0)
    mesh.restart("stage-1", instance="2")
    assert mesh.run_until(lambda: ("stage-0", "stage-1") in mesh.open_routes())
    opened = [o for o in barriers(mesh, OPEN_ROUTE_BARRIER) if len(o.participants) == 2]
    epochs, generations = zip(*((o.epoch, o.generation) for o in opened), strict=True)
    assert len(set(epochs)) == len(opened) == 2
    assert len(set(generations)) == 2


def test_what_arrives_for_an_attempt_that_broke_moves_nothing_at_the_next(monkeypatch):
    mesh = MemoryMesh(MeshPolicy(barrier_timeout_s=1.0))
    tell, late = mesh._tell, []

    def hold_back(event, *after):
        if isinstance(event, BarrierArrived) and event.worker == "stage-1":
            late.append(event)
        else:
            tell(event, *after)

    monkeypatch.setattr(mesh, "_tell", hold_back)
    mesh.join("stage-0", "0-3")
    mesh.join("stage-1", "3-6")
    assert mesh.run_until(lambda: len(late) > 1, seconds=30)
    new, old = barriers(mesh, OPEN_ROUTE_BARRIER)
    assert (old.generation, old.cause) == (1, Trigger.EXPIRED)
    assert (new.generation, new.state) == (2, BarrierState.FORMING)
    mesh.feed(late[0])
    mesh.feed(replace(late[0], epoch=new.epoch))
    refused = mesh.mesh.state.counters
    assert (refused["arrivals_refused.late"], refused["arrivals_refused.wrong_generation"]) == (
        1,
        1,
    )
    assert barriers(mesh, OPEN_ROUTE_BARRIER)[0].absent == new.absent
    assert "stage-1" in new.absent
    mesh.run(0.1)
    mesh.feed(late[1])
    assert barriers(mesh, OPEN_ROUTE_BARRIER)[0].complete


def test_a_worker_that_has_not_fenced_the_epoch_before_may_not_join():
    mesh = booted()
    mesh.kill("stage-1")
    mesh.run(1.0)
    feed = mesh.mesh.handle

    def behind(event, now):
        if isinstance(event, BarrierArrived) and event.worker == "stage-0" and not refused:
            refused.append(event)
            event = replace(event, facts={**event.facts, "fenced": "0"})
        return feed(event, now)

    refused: list[BarrierArrived] = []
    mesh.mesh.handle = behind
    mesh.restart("stage-1", instance="2")
    mesh.run_until(lambda: bool(refused))
    mesh.run(0.1)
    broken = [o for o in barriers(mesh, OPEN_ROUTE_BARRIER) if not o.complete]
    assert broken[0].culprits == ("stage-0",)
    assert "fenced epochs through 0" in broken[0].detail


def test_who_waits_for_a_worker_that_is_to_leave_is_told_that_the_barrier_broke():
    mesh = MemoryMesh()
    mesh.join("stage-0", "0-3")
    mesh.join("stage-1", "3-6")
    announced = []
    perform = mesh._perform
    mesh._perform = lambda instruction: (announced.append(instruction), perform(instruction))
    mesh.feed(DrainRequested("stage-1"))
    (told,) = mesh.events("BarrierBroken")
    assert (told.attributes["name"], told.attributes["cause"]) == (OPEN_ROUTE_BARRIER, "abandoned")
    (heard,) = [one for one in announced if isinstance(one, AnnounceBarrier)]
    assert heard.participants == ("stage-0", "stage-1")
    assert not heard.complete
