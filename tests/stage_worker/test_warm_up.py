"""Before a worker on a GPU serves, every kind of step has been computed once; nothing of it
stays."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from stage_worker import warm_up as warming
from stage_worker.hosting import SpanModel
from stage_worker.row_forward import RowForward
from stage_worker.stage import Stage
from stage_worker.warm_up import ROWS, warm_up
from stagemesh.errors import ComputeFailed
from stagemesh.frame import FrameKind, RowStatus, StepFrame

SPANS = [(0, 6), (0, 3, 6), (0, 1, 4, 6)]


class Watched(Stage):
    """Remembers itself and what it was asked."""

    made: list[Watched] = []  # noqa: RUF012 - emptied by the fixture

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.asked: list[StepFrame] = []
        self.answered: list[StepFrame] = []
        self.most_held = 0
        self.made.append(self)

    def step(self, frame: StepFrame) -> StepFrame:
        self.asked.append(frame)
        self.answered.append(super().step(frame))
        self.most_held = max(self.most_held, self.kv_tokens)
        return self.answered[-1]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Watched]:
    monkeypatch.setattr(warming, "Stage", Watched)
    Watched.made = []
    return Watched.made


def models(spans_of_llama: Any) -> list[SpanModel]:
    return [model for cuts in SPANS for model in spans_of_llama(cuts)]


def test_every_kind_of_step_is_computed_on_every_span_and_no_row_fails(
    spans_of_llama: Any, watched: list[Watched]
) -> None:
    for model in models(spans_of_llama):
        warm_up(model, kv_budget_tokens=1 << 16)
        stage = watched.pop()
        kinds = {FrameKind.PROBE, FrameKind.PREFILL, FrameKind.DECODE}
        assert {frame.kind for frame in stage.asked} == kinds | (
            {FrameKind.SCORE} if model.is_last else set()
        )
        decodes = [frame for frame in stage.asked if frame.kind is FrameKind.DECODE]
        assert tuple(len(frame.rows) for frame in decodes) == ROWS
        assert stage.stage_counters["batches_split"] == 0
        rows = [row for frame in stage.answered for row in frame.rows]
        assert {row.status for row in rows} == {RowStatus.OK}
        assert any(row.digests for row in rows) == (model.has_taps or not model.is_last)
        if model.is_last:
            assert all(row.scores or row.token for row in rows if row.samples)
            assert any(row.scores for row in rows)


def test_nothing_is_held_afterwards(spans_of_llama: Any, watched: list[Watched]) -> None:
    (model,) = spans_of_llama((0, 6))
    warm_up(model, kv_budget_tokens=1 << 16)
    before = mx.get_active_memory()
    warm_up(model, kv_budget_tokens=1 << 16)
    assert mx.get_active_memory() == before
    assert mx.get_cache_memory() == 0
    for stage in watched:
        assert stage.most_held > 0
        assert (stage.kv_tokens, stage.reserved_tokens, stage.requests) == (0, 0, 0)


def test_it_holds_no_more_than_the_worker_promised(
    spans_of_llama: Any, watched: list[Watched]
) -> None:
    (model,) = spans_of_llama((0, 6))
    warm_up(model, kv_budget_tokens=600)
    assert max(len(frame.rows) for frame in watched[0].asked) == 2


def test_a_forward_that_raises_is_a_typed_error_and_nothing_is_held(
    spans_of_llama: Any, watched: list[Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_kernel(*args: Any) -> None:
        raise RuntimeError("cannot compile kernel")

    (model,) = spans_of_llama((0, 6))
    monkeypatch.setattr(RowForward, "_forward_one", no_kernel)
    with pytest.raises(ComputeFailed, match=r"first probe of 1 tokens failed.*cannot compile"):
        warm_up(model, kv_budget_tokens=1 << 16)
    assert watched[0].requests == 0


def test_slow_first_steps_and_the_end_are_told(spans_of_llama: Any) -> None:
    (model,) = spans_of_llama((0, 6))
    clock = iter(range(1000))
    told: list[str] = []
    steps = warm_up(model, kv_budget_tokens=256, tell=told.append, now=lambda: next(clock))
    assert told[0] == "first probe of 1 tokens: 1.0 s"
    assert "first decode of 1 rows: 1.0 s" in told
    assert told[-1] == f"warmed up with {steps} steps in {2 * steps + 1}.0 s"


def test_a_cpu_has_nothing_to_compile() -> None:
    assert mx.default_device().type == mx.DeviceType.cpu
    assert not warming.compiles_late()
