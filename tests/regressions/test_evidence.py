"""What users of other systems ran into, row by row: which tests show that it cannot happen here.

Each row of ``evidence.toml`` names the tests that make the trouble happen. They are looked up by
name, so that a test that is renamed or removed leaves its row without cover and this file fails.
Rows whose matter is cheap to show are shown here as well.
"""

from __future__ import annotations

import ast
import functools
import tomllib
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from coordinator.events import FrameReturned
from coordinator.memory_worker import worker_info
from coordinator.route import plan_pipeline
from coordinator.testing import MemoryMesh
from stage_worker.hosting import SpanModel
from stage_worker.stage import Stage
from stage_worker.tiny_models import write_tiny_model
from stagemesh.checksum import crc32c
from stagemesh.frame import FrameKind, RowStatus, StepFrame, StepRow, verify
from stagemesh.sampling import RowOpening, SamplingSpec
from stagemesh.topology import COORDINATOR_HOP, Span

TESTS = Path(__file__).parents[1]

HELD: dict[str, list[str]] = tomllib.loads(
    Path(__file__).with_name("evidence.toml").read_text(encoding="utf-8")
)
"""Row → tests, ``FILE::NAME`` below ``tests/``."""
ROWS = 17


def collected_in(source: str) -> frozenset[str]:
    """Names of what pytest collects from a module: neither helpers nor what stands inside of one
    of its functions."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    names = [node.name for node in ast.parse(source).body if isinstance(node, functions)]
    return frozenset(name for name in names if name.startswith("test"))


@functools.cache
def names_in(path: str) -> frozenset[str]:
    return collected_in((TESTS / path).read_text(encoding="utf-8"))


def test_only_a_test_holds_a_row() -> None:
    inside = "def helper():\n def test_inside(): ...\n"
    assert collected_in(f"{inside}async def test_it(): ...\ntest_value = 1") == {"test_it"}


@pytest.mark.parametrize("row", HELD)
def test_the_tests_that_hold_this_row_exist(row: str) -> None:
    missing = []
    for held in HELD[row]:
        path, _, name = held.partition("::")
        if name not in names_in(path):
            missing.append(held)
    assert not missing


def test_every_row_is_held() -> None:
    assert {int(row.split()[0]) for row in HELD} == set(range(1, ROWS + 1))


def booted(**policy: object) -> MemoryMesh:
    mesh = MemoryMesh()
    for name, span in (("stage-0", "0-3"), ("stage-1", "3-6")):
        mesh.join(name, span)
    assert mesh.run_until(lambda: bool(mesh.open_routes()))
    return mesh


def test_3_what_waits_to_be_sent_keeps_its_bytes_whatever_is_computed_next(tmp_path: Path) -> None:
    """An activation travels as a view of the array's own memory. Frames that wait for their hop
    hold theirs while the stage goes on, with other shapes, and frees what it no longer needs."""
    write_tiny_model(tmp_path, "llama", layers=4)
    stage = Stage(
        SpanModel.load(tmp_path, Span(0, 2)), name="s", kv_budget_tokens=1 << 16, clock_ns=lambda: 0
    )
    stage.open(1, 0, 2)
    waiting: list[StepFrame] = []
    for step in range(1, 41):
        key, length = step.to_bytes(16, "big"), 1 + step % 13
        prompt = tuple((7 * step + i) % 250 for i in range(length))
        row = StepRow(key, 0, prompt, opening=RowOpening(SamplingSpec(), length, bytes(16), 20))
        frame = StepFrame(FrameKind.PREFILL, bytes(8), 1, step, COORDINATOR_HOP, 0, (row,))
        waiting.append(stage.step(frame).sealed())
        mx.clear_cache()
    for frame in waiting:
        verify(frame, fingerprint=bytes(8))
        assert frame.tensor is not None
        assert frame.rows[0].marks[-1].output_crc32c == crc32c(frame.tensor.payload)


def test_4_a_step_that_returns_before_an_earlier_one_ends_the_route_and_mixes_nothing() -> None:
    mesh = booted()
    client = mesh.request(1, (1, 2, 3), 20)
    mesh.run_until(lambda: len(client.tokens) == 5)
    (live,) = mesh.mesh.state.routes.values()
    oldest = live.scheduler.steps.oldest
    assert oldest is not None
    ahead = replace(oldest.frame, step=oldest.frame.step + 1)
    mesh.feed(FrameReturned(ahead))
    assert mesh.mesh.state.counters["frames_unexpected"] == 1
    assert mesh.run_to_end()
    honest = booted()
    expected = honest.request(1, (1, 2, 3), 20)
    assert honest.run_to_end()
    assert client.tokens == expected.tokens


def test_9_text_is_derived_at_one_place_from_ids_that_are_the_truth() -> None:
    root = TESTS.parent
    users = {
        path.relative_to(root).as_posix()
        for room in ("stagemesh", "coordinator", "stage_worker", "services")
        for path in (root / room).rglob("*.py")
        if "import Detokenizer" in path.read_text() or "Detokenizer(" in path.read_text()
    }
    assert not {path for path in users if path.startswith(("stage_worker/", "coordinator/"))}
    assert "services/detokenizer.py" in users


def test_13_a_stage_that_is_a_position_off_is_never_asked_again_without_a_rewind_or_replay() -> (
    None
):
    mesh = booted()
    client = mesh.request(1, (1, 2, 3), 20)
    assert mesh.run_until(lambda: len(client.tokens) == 5)
    mesh.forget("stage-1", 1)
    seen: list[StepFrame] = []
    mesh.tampers.append(lambda frame: seen.append(frame) or frame)
    assert mesh.run_to_end()
    failed = next(f.step for f in seen if any(row.status is not RowStatus.OK for row in f.rows))
    kinds = [f.kind for f in seen if f.step > failed and f.hop_from == -1]
    asked = [kind for kind in kinds if kind is not FrameKind.CLOSE]
    assert asked[0] in (FrameKind.REWIND, FrameKind.PREFILL)
    assert client.summary.recoveries


@pytest.mark.parametrize("spans", [("0-3", "4-6"), ("0-4", "3-6"), ("0-3", "3-5"), ("1-3", "3-6")])
def test_15_spans_that_drop_or_double_a_layer_form_no_route(spans: tuple[str, str]) -> None:
    workers = [worker_info(f"stage-{index}", span) for index, span in enumerate(spans)]
    assert plan_pipeline(workers, cost={}) is None


def test_17_a_request_that_no_cache_can_hold_fails_alone_and_the_process_lives() -> None:
    mesh = MemoryMesh()
    for name, span in (("stage-0", "0-3"), ("stage-1", "3-6")):
        mesh.join(name, span, kv_budget_tokens=64)
    assert mesh.run_until(lambda: bool(mesh.open_routes()))
    doomed = mesh.request(1, tuple(range(1, 60)), 100)
    modest = mesh.request(2, (1, 2, 3), 20)
    assert mesh.run_to_end()
    assert doomed.error is not None
    assert doomed.error.reason == "CACHE_EXHAUSTED"
    assert len(modest.tokens) == 20
    assert all(worker.alive for worker in mesh.workers.values())
