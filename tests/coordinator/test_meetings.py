"""Where two features meet: several routes at once, rows of one step, processes that follow each
other, what is heard too late. On virtual time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.echo import EchoStage, mix, oracle
from coordinator.settings import FallbackPolicy, MeshPolicy
from coordinator.testing import MemoryMesh, Received
from stagemesh.frame import FrameKind, RowStatus

PROMPT = tuple(range(2, 30))
STAGES = {"stage-0": "0-2", "stage-1": "2-4", "stage-2": "4-6"}


def mesh_of(*more: str, **limits) -> MemoryMesh:
    """Three stages, and a full worker of each of these names."""
    mesh = MemoryMesh(MeshPolicy(vocab_size=997, **{"audit_budget": 0.0, **limits}))
    for name, span in STAGES.items():
        mesh.join(name, span)
    for name in more:
        mesh.join(name, "0-6")
    assert mesh.run_until(lambda: len(mesh.open_routes()) == 1 + len(more))
    return mesh


def truth(tokens: int = 60) -> list[int]:
    return oracle(PROMPT, tokens, layer_count=6)


class OtherModel(EchoStage):
    """Computes something else, in probes too."""

    def _forward(self, cache, hidden, taps):
        return [mix(value, 5) for value in super()._forward(cache, hidden, taps)]


def test_a_full_worker_refuses_every_open_pipeline_that_differs_from_it():
    mesh = MemoryMesh(MeshPolicy(vocab_size=997))
    for name, stage_type in (("a", OtherModel), ("b", EchoStage), ("c", OtherModel)):
        mesh.join(f"{name}-0", "0-3")
        mesh.join(f"{name}-1", "3-6").stage_type = stage_type
    assert mesh.run_until(lambda: len(mesh.open_routes()) == 3)
    mesh.join("full", "0-6")
    assert mesh.run_until(lambda: ("full",) in mesh.open_routes())
    assert mesh.open_routes() == [("b-0", "b-1"), ("full",)]
    assert [event.attributes["epoch"] for event in mesh.events("RouteRefused")] == ["1", "3"]


def test_a_step_that_went_wrong_is_one_corruption_however_many_requests_were_in_it():
    mesh = mesh_of("full", microbatches_in_flight=1)
    clients = [mesh.request(number, PROMPT, 60) for number in range(4)]
    assert mesh.run_until(lambda: all(len(client.tokens) >= 10 for client in clients))
    damaged = []

    def damage_one_step(frame):
        if damaged or frame.kind is not FrameKind.DECODE or frame.hop_from != 1:
            return frame
        damaged.append(len(frame.rows))
        rows = tuple(row.failed(RowStatus.NON_FINITE, stage=1) for row in frame.rows)
        return replace(frame, rows=rows).sealed()

    mesh.tampers.append(damage_one_step)
    assert mesh.run_to_end()
    assert damaged == [4]
    assert all(client.tokens == truth() for client in clients)
    assert mesh.mesh.state.recovery.history("stage-1").corruptions == 1
    assert not mesh.events("WorkerQuarantined")


@pytest.mark.parametrize(
    ("fallback", "budget"), [(FallbackPolicy.FORBID, 0), (FallbackPolicy.PREFER_SPARE, 64)]
)
def test_a_full_worker_that_may_not_or_cannot_take_a_request_is_no_other_route_for_it(
    fallback, budget
):
    mesh = mesh_of(fallback=fallback)
    mesh.join("full", "0-6", kv_budget_tokens=budget)
    assert mesh.run_until(lambda: len(mesh.open_routes()) == 2)
    client = mesh.request(0, PROMPT, 60)
    for known in (5, 6):  # lost again before a route change could help
        assert mesh.run_until(lambda count=known: len(client.tokens) >= count)
        mesh.forget("stage-1", 0)
    assert mesh.run_to_end()
    assert client.tokens == truth()
    assert {record.to_route for record in client.summary.recoveries} == {tuple(STAGES)}
    assert [record.cause for record in client.summary.recoveries] == ["CACHE_LOST"] * 2


def loses_its_cache_twice(mesh: MemoryMesh) -> Received:
    """A request that has to leave its pipeline."""
    client = mesh.request(0, PROMPT, 60)
    for known in (5, 6):
        assert mesh.run_until(lambda count=known: len(client.tokens) >= count)
        mesh.forget("stage-1", 0)
    assert mesh.run_until(lambda: [e.worker for e in mesh.events("RowFailed")] == ["stage-1"] * 2)
    return client


def test_a_request_goes_back_where_it_came_from_when_its_second_route_is_lost():
    mesh = mesh_of("full")
    client = loses_its_cache_twice(mesh)
    assert mesh.run_until(lambda: len(client.tokens) >= 10)
    mesh.kill("full")
    assert mesh.run_to_end(seconds=5.0)
    assert client.tokens == truth()
    routes = [record.to_route for record in client.summary.recoveries]
    assert routes == [tuple(STAGES), ("full",), tuple(STAGES)]


def test_so_does_one_that_still_waited_for_room_there():
    mesh = MemoryMesh(MeshPolicy(vocab_size=997, audit_budget=0.0))
    mesh.join("full", "0-6", kv_budget_tokens=len(PROMPT) + 300)
    assert mesh.run_until(mesh.open_routes)
    first = mesh.request(1, PROMPT, 300)
    for name, span in STAGES.items():
        mesh.join(name, span)
    assert mesh.run_until(lambda: len(mesh.open_routes()) == 2)
    client = loses_its_cache_twice(mesh)
    mesh.run(0.5)
    assert mesh.mesh.snapshot(mesh.now).displaced == 1
    assert not first.ends
    mesh.kill("full")
    assert mesh.run_to_end(seconds=10.0)
    assert client.tokens == truth()
    assert first.tokens == truth(300)


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_small_full_worker_does_not_end_what_only_the_lost_pipeline_can_hold(comes_back):
    mesh = mesh_of(fallback_wait_s_max=2.0)
    mesh.join("full", "0-6", kv_budget_tokens=64)
    assert mesh.run_until(lambda: len(mesh.open_routes()) == 2)
    client = mesh.request(0, PROMPT, 60)
    assert mesh.run_until(lambda: len(client.tokens) >= 5)
    mesh.kill("stage-1")
    mesh.run(0.3)
    if comes_back:
        mesh.restart("stage-1", instance="2")
    assert mesh.run_to_end(seconds=4.0)
    if comes_back:
        assert client.tokens == truth()
    else:
        assert client.error.reason == "ROUTE_UNAVAILABLE"
        new = mesh.request(1, PROMPT, 60)
        assert new.error.reason == "CACHE_EXHAUSTED"


@pytest.mark.parametrize("come", [True, False])
def test_in_a_mesh_that_is_just_forming_a_new_request_waits_for_the_stages_to_come(come):
    mesh = MemoryMesh(MeshPolicy(vocab_size=997, route_wait_s_max=5.0))
    mesh.join("full", "0-6", kv_budget_tokens=64)
    assert mesh.run_until(lambda: mesh.open_routes() == [("full",)])
    client = mesh.request(0, PROMPT, 60)
    mesh.run(2.0)
    assert not client.ends
    for name, span in STAGES.items() if come else ():
        mesh.join(name, span)
    assert mesh.run_to_end(seconds=3.1)
    if come:
        assert client.tokens == truth()
    else:
        assert client.error.reason == "CACHE_EXHAUSTED"
        assert mesh.request(1, PROMPT, 60).error.reason == "CACHE_EXHAUSTED"  # no longer forming


def test_a_new_request_waits_for_a_pipeline_that_only_has_to_be_formed_again():
    mesh = mesh_of()
    mesh.join("full", "0-6", kv_budget_tokens=64)
    assert mesh.run_until(lambda: len(mesh.open_routes()) == 2)
    mesh.kill("stage-1")
    mesh.run(0.1)
    mesh.restart("stage-1", instance="2")
    assert mesh.open_routes() == [("full",)]
    client = mesh.request(0, PROMPT, 60)
    assert mesh.run_to_end(seconds=4.0)
    assert client.tokens == truth()
