"""Where two features meet: several routes at once, rows of one step, processes that follow each
other, what is heard too late. On virtual time."""

from __future__ import annotations

from coordinator.echo import EchoStage, mix
from coordinator.settings import MeshPolicy
from coordinator.testing import MemoryMesh


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
