"""Families of models under faults: whatever befalls the stages, token for token what mlx-lm says.

Real stages compute; the real machine of the coordinator decides, on virtual time. Two requests run
side by side, and three things happen to them, each shown to have happened: a frame is damaged
between two stages, a stage loses the cache of one request, and a stage is killed. The answers must
be those of mlx-lm's own generation loop over the uncut model, which nothing has befallen.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from mlx_lm.utils import load_model

from coordinator.events import WorkerRegistered
from coordinator.memory_worker import MemoryWorker, worker_info
from coordinator.settings import MeshPolicy
from coordinator.testing import MemoryMesh, Received
from stage_worker import model_source
from stage_worker.hosting import SpanModel
from stage_worker.loading import DTypePolicy
from stage_worker.partition import balance
from stage_worker.reference import Reference, unpacked
from stage_worker.stage import Stage
from stagemesh.frame import FrameKind, StepFrame
from stagemesh.topology import COORDINATOR_HOP, Span, WorkerInfo
from tests.mesh.chain import Question
from tests.mesh.test_families import CHUNK, FAMILIES, NARROW, SAMPLED, model_of

COUNT = 20
SHORT, LONG = tuple(range(3, 6)), tuple((29 * i + 133) % 256 for i in range(19))
QUESTIONS = (Question(SHORT, COUNT), Question(LONG, COUNT, SAMPLED))
"""One within a chunk, greedy; one of three chunks, sampled."""
NARROW_CUTS = [(*one, 1 + index % 5) for index, one in enumerate(NARROW)]
"""Every type on one to five stages, each with some families."""
LOSES_AT = 2
"""Tokens of the first answer behind which the second one's cache is lost."""


@functools.lru_cache(maxsize=2)
def expected_of(family: str, kind: str) -> list[list[int]]:
    """What mlx-lm answers to each question by itself."""
    return expected_by(model_of(family, kind)[0])


def expected_by(model: Any) -> list[list[int]]:
    reference = Reference(model)
    return [
        reference.free_run(one.prompt, one.count, one.spec, chunk=CHUNK).token_ids
        for one in QUESTIONS
    ]


class RealMesh(MemoryMesh):
    """A mesh in memory whose workers compute with models."""

    def __init__(self, model: Any, config: dict[str, Any]) -> None:
        self.model, self.config = model, config
        layers = len(model.layers)
        policy = MeshPolicy(
            vocab_size=config["vocab_size"],
            prefill_chunk_tokens=CHUNK,
            prefill_chunk_tokens_shared=CHUNK,
            audit_budget=0.0,
        )
        super().__init__(policy, layer_count=layers)

    def host(self, name: str, span: Span | None) -> MemoryWorker:
        """A worker process with these layers starts and registers."""
        hosted = SpanModel.from_model(self.model, self.config, span, dtype=DTypePolicy.STORED)
        stage = Stage(hosted, name=name, kv_budget_tokens=1 << 16, clock_ns=lambda: 0)
        info = replace(
            worker_info(name, str(hosted.span), layer_count=self.layer_count),
            capabilities=stage.capabilities,
        )
        worker = self.workers[name] = MemoryWorker(info)
        worker.stage_type = partial(_opened, stage)  # type: ignore[assignment]
        self._feed(WorkerRegistered(info))
        self._report_regularly(worker)
        return worker

    def pipeline(self, stages: int) -> list[str]:
        """Workers of a route of so many stages, which is then open."""
        spans: tuple[Span | None, ...] = (None,)
        if stages > 1:
            spans = balance([1.0] * self.layer_count, stages)
        names = [f"stage-{index}" for index in range(stages)]
        for name, span in zip(names, spans, strict=True):
            self.host(name, span)
        assert self.run_until(lambda: self.open_routes() == [tuple(names)])
        return names

    def lose(self, name: str, number: int) -> bool:
        """A worker's cache of one request is gone; whether there was one."""
        stage: Any = self.workers[name].stage
        key = number.to_bytes(16, "big")
        held = key in stage._held.caches
        stage._held.caches.drop(key)
        return held


def _opened(
    stage: Stage, _info: WorkerInfo, epoch: int, stage_index: int, stage_count: int
) -> Stage:
    """The process's one stage takes its place on a route."""
    stage.open(epoch, stage_index, stage_count)
    return stage


class Damage:
    """Flips a bit of the first activation that decodes or prefills on a hop; of the first answer's
    header where there is only one stage."""

    def __init__(self, *, single: bool) -> None:
        self.single = single
        self.done = 0

    def __call__(self, frame: StepFrame) -> StepFrame:
        wanted = frame.hop_to == COORDINATOR_HOP if self.single else frame.tensor is not None
        if self.done or not wanted or frame.kind is FrameKind.PROBE:
            return frame
        self.done += 1
        if frame.tensor is None:
            return replace(frame, header_crc32c=frame.header_crc32c ^ 1)
        payload = bytearray(frame.tensor.payload)
        payload[len(payload) // 2] ^= 4
        return replace(frame, tensor=replace(frame.tensor, payload=bytes(payload)))


def under_faults(
    mesh: RealMesh, expected: list[list[int]], stages: int, struck: int, *, alone: bool = False
) -> None:
    """One run; ``struck`` chooses which stages suffer. ``alone``: the second request only."""
    names = mesh.pipeline(stages)
    damage = Damage(single=stages == 1)
    mesh.tampers.append(damage)
    clients: list[Received] = [
        mesh.request(number, one.prompt, one.count, sampling=one.spec)
        for number, one in list(enumerate(QUESTIONS, 1))[alone:]
    ]
    first, second = clients[0], clients[-1]
    assert mesh.run_until(lambda: len(first.tokens) >= LOSES_AT and bool(second.tokens))
    assert mesh.lose(names[struck % stages], 2)
    mesh.host("full", None)
    kept = len(second.tokens)
    assert mesh.run_until(lambda: ("full",) in mesh.open_routes() and len(second.tokens) > kept + 1)
    assert not first.ends
    mesh.kill(names[(struck + 1) % stages])
    assert mesh.run_to_end()
    assert [one.tokens for one in clients] == expected[alone:]
    assert damage.done == 1
    full: Any = mesh.workers["full"].stage
    side_by_side = "batch" in full.capabilities and not alone
    assert (full.stage_counters["rows_batched"] > 0) is side_by_side
    causes = [record.cause for one in clients for record in one.summary.recoveries]
    assert {"CHECKSUM_MISMATCH", "CACHE_LOST"} <= set(causes), causes
    assert first.summary.recoveries[-1].to_route == ("full",)


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_in_f32_answers_as_mlx_lm_does_whatever_befalls_it(
    family: str, stages: int
) -> None:
    mesh = RealMesh(*model_of(family, "f32"))
    under_faults(mesh, expected_of(family, "f32"), stages, FAMILIES.index(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_that_answers_one_request_alone_does_so_whatever_befalls_it(family: str) -> None:
    mesh = RealMesh(*model_of(family, "f32"))
    under_faults(mesh, expected_of(family, "f32"), 3, FAMILIES.index(family), alone=True)


@pytest.mark.parametrize(("family", "kind", "stages"), NARROW_CUTS)
def test_a_family_in_a_narrow_type_answers_as_mlx_lm_does_whatever_befalls_it(
    family: str, kind: str, stages: int
) -> None:
    mesh = RealMesh(*model_of(family, kind))
    under_faults(mesh, expected_of(family, kind), stages, FAMILIES.index(family))


@pytest.mark.smollm2
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_smollm2_answers_as_mlx_lm_does_whatever_befalls_it() -> None:
    directory = model_source.resolve("smollm2").directory
    model, config = load_model(directory)
    expected = expected_by(unpacked(model, "f32"))
    under_faults(RealMesh(model, config), expected, 3, 1)
