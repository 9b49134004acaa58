"""What the processes of a mesh measure while it answers, read from their own metrics readers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest

from coordinator.settings import MeshPolicy
from stage_worker.tiny_models import write_tiny_model
from stagemesh.v1 import generation_service_pb2 as pb
from tests.mesh.own_loop_mesh import OwnLoopMesh, own_loop_mesh

COUNT = 12
LIMIT_S = 60.0
STAGES = ("stage-0", "stage-1")


class Measured:
    """A mesh behind one quiet answer of COUNT tokens."""

    def __init__(self, runner: asyncio.Runner, mesh: OwnLoopMesh) -> None:
        self.runner, self.mesh = runner, mesh

    def points(self, process: str, metric: str) -> dict[tuple[str, ...], object]:
        return self.runner.run(self.mesh.points(process, metric))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Measured]:
    directory = tmp_path_factory.mktemp("tiny")
    write_tiny_model(directory, "llama", layers=4)
    policy = MeshPolicy(canary_interval_s=3600.0, audit_budget=0.0)
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        entered = stack.enter_async_context(own_loop_mesh(directory, policy=policy, full=True))
        mesh = runner.run(entered)
        runner.run(mesh.generate(COUNT, text="measure"))
        runner.run(mesh.settled())
        try:
            yield Measured(runner, mesh)
        finally:
            runner.run(stack.aclose())


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_says_what_its_time_went_into(measured: Measured, stage: int) -> None:
    name = f"stage-{stage}"
    spent = measured.points(name, "mesh.stage.time")
    by_activity = {key[0]: point.value for key, point in spent.items()}
    assert set(by_activity) == {"compute", "queue", "transfer", "wait"}
    assert all(value > 0.0 for value in by_activity.values()), by_activity
    assert {key[1:] for key in spent} == {(str(stage), name)}
    compute = measured.points(name, "mesh.stage.compute.duration")
    counts = {key[0]: point.count for key, point in compute.items()}
    assert counts == {"prefill": 1, "decode": COUNT - 1}
    assert by_activity["compute"] == pytest.approx(sum(p.sum for p in compute.values()))


def test_bytes_and_time_of_every_hop_are_measured_and_both_ends_agree(measured: Measured) -> None:
    moved = {
        (name, key[0]): point.value
        for name in ("coordinator", *STAGES)
        for key, point in measured.points(name, "mesh.hop.io").items()
    }
    for sent, received in (
        (("coordinator", "coordinator-out"), ("stage-0", "stage-in")),
        (("stage-0", "stage-out"), ("stage-1", "stage-in")),
        (("stage-1", "stage-out"), ("coordinator", "coordinator-in")),
    ):
        assert moved[sent] >= moved[received] > 0, (sent, moved)
    assert moved["stage-0", "stage-out"] == moved["stage-1", "stage-in"]
    for name in STAGES:
        times = measured.points(name, "mesh.stage.transfer.duration")
        assert sum(point.sum for point in times.values()) > 0.0


def test_a_step_of_one_request_has_one_row(measured: Measured) -> None:
    rows = measured.points("coordinator", "mesh.step.rows")
    assert {key: (point.count, point.sum) for key, point in rows.items()} == {
        ("prefill",): (1, 1),
        ("decode",): (COUNT - 1, COUNT - 1),
    }


def test_requests_caches_watermark_and_the_cost_of_each_tier_are_read_while_it_answers(
    measured: Measured,
) -> None:
    mesh = measured.mesh
    wanted = {
        "running": ("mesh.requests", ("running",)),
        "largest lag": ("mesh.watermark.lag", ("largest",)),
        "sum of lags": ("mesh.watermark.lag", ("sum",)),
        **{f"cached at {name}": ("mesh.kv.tokens", (name,)) for name in (*STAGES, "full")},
        **{
            f"{tier} at {name}": ("mesh.validation.time", (tier, name))
            for tier, name in (
                ("integrity", "coordinator"),
                ("integrity", "stage-1"),
                ("numeric", "stage-0"),
                ("shadow", "full"),
            )
        },
    }

    async def seen_while_it_answers() -> set[str]:
        level = pb.VERIFICATION_LEVEL_SHADOW
        answering = asyncio.create_task(mesh.generate(100_000, text="lag", verify=level))
        seen: set[str] = set()
        try:
            async with asyncio.timeout(LIMIT_S):
                while seen != set(wanted) and not answering.done():
                    for what, (metric, labels) in wanted.items():
                        point = (await mesh.points("coordinator", metric)).get(labels)
                        if point is not None and point.value > 0:
                            seen.add(what)
        except TimeoutError:
            pass
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
        return seen

    assert measured.runner.run(seen_while_it_answers()) == set(wanted)
    limits = measured.points("coordinator", "mesh.kv.limit")
    promised = mesh.coordinator.mesh.state.workers
    assert {key[0]: point.value for key, point in limits.items()} == {
        name: record.info.kv_budget_tokens for name, record in promised.items()
    }
