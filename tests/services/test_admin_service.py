"""What operators are told of a rendezvous that does not come about: who, why, and what was last
known."""

from __future__ import annotations

import pytest

from coordinator.barrier import BarrierState
from coordinator.route import OPEN_ROUTE_BARRIER
from coordinator.settings import MeshPolicy
from coordinator.snapshot import MeshSnapshot
from coordinator.testing import MemoryMesh
from services.admin_service import AdminService
from services.answer_book import AnswerBook
from services.worker_codec import worker_to_proto
from stagemesh.v1 import admin_service_pb2 as pb

TIMEOUT_S = 1.0


class Driver:
    """A mesh on virtual time, as the service sees it."""

    def __init__(self, mesh: MemoryMesh) -> None:
        self.mesh = mesh
        self.feed = mesh.feed

    def snapshot(self) -> MeshSnapshot:
        return self.mesh.mesh.snapshot(self.mesh.now)


@pytest.fixture
def mesh() -> MemoryMesh:
    """Two stages are to open a route; one was stopped behind its first report."""
    mesh = MemoryMesh(MeshPolicy(barrier_timeout_s=TIMEOUT_S))
    mesh.join("stage-0", "0-3")
    mesh.join("stage-1", "3-6")
    mesh.stop("stage-1")
    mesh.run(0.2)
    mesh.mesh.state.barriers.note_progress("stage-1", "epoch 1, computed step 0", mesh.now)
    return mesh


async def barrier_of(mesh: MemoryMesh) -> pb.BarrierStatus:
    service = AdminService(
        driver=Driver(mesh),
        book=AnswerBook(ended_max=1),
        describe=worker_to_proto,
        traces=lambda _: b"",
        clock=lambda: mesh.now,
    )
    seen = await service.GetDiagnostics(pb.GetDiagnosticsRequest(), None)
    return next(one for one in seen.barriers if (one.name, one.epoch) == (OPEN_ROUTE_BARRIER, 1))


async def test_a_barrier_that_forms_is_shown_with_who_is_missing_and_the_time_left(mesh):
    seen = await barrier_of(mesh)
    assert seen.state == BarrierState.FORMING.value
    assert (list(seen.participants), list(seen.arrived)) == (["stage-0", "stage-1"], ["stage-0"])
    assert list(seen.absent) == ["stage-1"]
    assert dict(seen.last_progress) == {"stage-1": "epoch 1, computed step 0"}
    assert (seen.cause, list(seen.culprits), seen.detail) == ("", [], "")
    assert seen.age_ms + seen.remaining_ms == pytest.approx(1000 * TIMEOUT_S, abs=2)
    assert 700 < seen.remaining_ms < 900


async def test_a_barrier_that_expired_is_shown_with_cause_culprit_and_last_progress(mesh):
    mesh.run(2 * TIMEOUT_S)
    seen = await barrier_of(mesh)
    assert (seen.state, seen.cause) == (BarrierState.BROKEN.value, "expired")
    assert (list(seen.absent), list(seen.culprits)) == (["stage-1"], ["stage-1"])
    assert list(seen.arrived) == ["stage-0"]
    assert dict(seen.last_progress) == {"stage-1": "epoch 1, computed step 0"}
    assert "stage-1 (last: epoch 1, computed step 0" in seen.detail
    assert seen.age_ms == pytest.approx(1000 * TIMEOUT_S, abs=10)
    assert (seen.generation, seen.remaining_ms) == (1, 0)
