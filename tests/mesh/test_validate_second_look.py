"""The validator's second look in margin mode: who is to blame when bits depend on shapes.

A fast matrix library picks its kernels by the shape of a product, so that the same tokens give
other bits when they are computed in other numbers. Here every MLP does so by construction: it
scales what it puts out by a little more the more tokens it is given at once. So the mesh's bits are
found again only by whoever cuts the prompt where the mesh cut it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import llama

from coordinator.settings import MeshPolicy
from coordinator.validation.evidence import Culprit, Tolerance
from services.client import MeshClient
from services.validate.cases import Case
from services.validate.mesh_side import chunk_of, observe, route_under_test
from services.validate.reference_side import ReferenceSide
from services.validate.session import Session
from stage_worker.hosting import SpanModel
from stage_worker.reference import CHUNK_TOKENS, Reference
from stage_worker.reference_process import ReferenceServer
from stage_worker.tiny_models import write_tiny_model
from stagemesh.sampling import SamplingSpec
from stagemesh.v1 import admin_service_pb2
from tests.faults import planted
from tests.mesh.own_loop_mesh import own_loop_mesh

PROMPT = tuple(3 + index * 7 % 250 for index in range(200))
"""Two chunks of a mesh, one of a reference left to itself."""
CASE = Case("long", {"token_ids": PROMPT}, SamplingSpec(logprobs=20), 6)
TAU = 0.01
PER_TOKEN = 2.0**-22
"""The last bits of an MLP's output, for each token that it computes at once."""


Plant = Callable[[str, int], None]


class ReferenceHere(ReferenceSide):
    """The reference in the test's own process, so that it computes with the same kernels."""

    def __init__(self, directory: Path, folder: Path) -> None:
        super().__init__(directory, dtype="auto", deterministic=False)
        self.server = ReferenceServer(Reference.load(directory), folder)

    async def _ask(self, operation: str, **fields: Any) -> dict[str, Any]:
        return self.server.answer({"operation": operation, **fields})


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder, "llama", layers=4, seed=4)
    return folder


@pytest.fixture(autouse=True)
def _kernels_by_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not the layer's own class: a span keeps what it derived from that for the next model.
    exact = llama.MLP.__call__

    def by_shape(self: Any, x: mx.array) -> mx.array:
        output: mx.array = exact(self, x)
        return output * (1.0 + PER_TOKEN * x.shape[1])

    monkeypatch.setattr(llama.MLP, "__call__", by_shape)


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Plants a fault into the stage whose first layer is ``first``, once it is loaded."""
    load = SpanModel.load

    def planting(name: str, first: int) -> None:
        def loaded(*args: Any, **options: Any) -> SpanModel:
            span = load(*args, **options)
            if span.span.first == first:
                planted.plant(name, span)
            return span

        monkeypatch.setattr(SpanModel, "load", loaded)

    return planting


async def _judged(
    directory: Path, folder: Path, *, private: bool = True, policy: MeshPolicy | None = None
) -> tuple[bool, Culprit | None]:
    async with (
        own_loop_mesh(directory, policy=policy) as mesh,
        MeshClient(mesh.coordinator.server.address) as client,
    ):
        status = await client.mesh()
        reference = ReferenceHere(directory, folder)
        session = Session(
            reference, Tolerance(TAU), (2,), chunk_of(status), lambda _line: None, private
        )
        stages = await route_under_test(client)
        seen, finish = await observe(client, CASE, stages)
        run = await session.judge(client, CASE, seen, finish, situation="alone")
    return run.verdict.ok, run.verdict.culprit


async def test_bits_that_depend_on_the_cuts_are_within_tau(directory: Path, tmp_path: Path) -> None:
    assert await _judged(directory, tmp_path) == (True, None)


@pytest.mark.parametrize("chunk", [MeshPolicy().prefill_chunk_tokens, 48])
async def test_a_fault_behind_a_prompt_of_several_chunks_is_its_own_stages(
    directory: Path, tmp_path: Path, plant: Plant, chunk: int
) -> None:
    plant("wrong layer order", 2)
    assert CHUNK_TOKENS >= len(PROMPT) > chunk
    policy = MeshPolicy(prefill_chunk_tokens=chunk, prefill_chunk_tokens_shared=min(chunk, 48))
    ok, culprit = await _judged(directory, tmp_path, policy=policy)
    assert not ok
    assert culprit is not None
    assert (culprit.stage, culprit.worker, culprit.kind) == (1, "stage-1", "logits")
    assert culprit.certain


@pytest.mark.parametrize(
    ("fault", "kind", "private", "certain"),
    [
        ("wrong layer order", "compute", True, False),
        ("lost KV of one layer", "state", True, True),
        ("lost KV of one layer", "state", False, False),
    ],
)
async def test_the_first_stage_is_blamed_for_certain_only_when_nothing_else_looks_like_it(
    directory: Path,
    tmp_path: Path,
    plant: Plant,
    fault: str,
    kind: str,
    private: bool,
    certain: bool,
) -> None:
    plant(fault, 0)
    ok, culprit = await _judged(directory, tmp_path, private=private)
    assert not ok
    assert culprit is not None
    assert (culprit.stage, culprit.kind, culprit.certain) == (0, kind, certain)
    assert ("--deterministic" in culprit.cause) is not certain


def test_a_mesh_that_does_not_tell_its_chunk_is_taken_to_have_the_usual_one() -> None:
    status = admin_service_pb2.GetMeshResponse()
    usual = MeshPolicy().prefill_chunk_tokens
    assert chunk_of(status) == usual
    status.environment["prefill_chunk_tokens"] = "0"
    assert chunk_of(status) == usual
    status.environment["prefill_chunk_tokens"] = "48"
    assert chunk_of(status) == 48
