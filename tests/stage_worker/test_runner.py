"""The compute thread: order, backpressure, progress numbers, crashes and a clean end."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from stage_worker.core_use import CoreUse
from stage_worker.hosting import SpanModel
from stage_worker.runner import StageRunner
from stage_worker.stage import Stage
from stage_worker.step_account import StepTiming
from stagemesh.errors import EpochFenced, StageUnreachable
from stagemesh.frame import FrameKind, RowStatus, StepFrame, StepRow

PROMPT = (3, 17, 99, 4)
WAIT_S = 30.0


class Bench:
    """A runner, what it put out, and a gate that can hold its thread."""

    def __init__(self, rig: Any, tiny_llama: Any, **options: Any) -> None:
        self.rig = rig
        self.model = tiny_llama
        self.outputs: queue.Queue[tuple[StepFrame, StepTiming, str]] = queue.Queue()
        self.crashes: queue.Queue[Exception] = queue.Queue()
        self.runner = StageRunner(None, self.keep, self.crashes.put, **options)
        self.runner.start()

    def keep(self, frame: StepFrame, timing: StepTiming) -> None:
        self.outputs.put((frame, timing, threading.current_thread().name))

    def build(self) -> Stage:
        model = SpanModel.from_model(self.model, self.rig.TINY_LLAMA)
        return Stage(model, name="w", kv_budget_tokens=1000, clock_ns=lambda: 5)

    def serve(self, epoch: int = 1) -> Stage:
        stage = self.runner.install(self.build).result(WAIT_S)
        self.runner.open(epoch, 0, 1).result(WAIT_S)
        return stage

    def prefill(self, step: int, name: str = "a", epoch: int = 1) -> StepFrame:
        row = StepRow(self.rig.key(name), 0, PROMPT, True, self.rig.opening_for(name, PROMPT))
        return self.frame(FrameKind.PREFILL, step, row, epoch)

    def frame(self, kind: FrameKind, step: int, row: StepRow, epoch: int = 1) -> StepFrame:
        return StepFrame(kind, self.rig.FINGERPRINT, epoch, step, -1, 0, (row,))

    def hold(self) -> threading.Event:
        """Occupy the thread until the returned event is set."""
        begun, gate = threading.Event(), threading.Event()
        self.runner.call(lambda: (begun.set(), gate.wait(WAIT_S)))
        assert begun.wait(WAIT_S)
        return gate


@pytest.fixture
def bench(rig: Any, tiny_llama: Any) -> Iterator[Bench]:
    made = Bench(rig, tiny_llama, queue_frames_max=2)
    yield made
    assert made.runner.stop(WAIT_S)


def test_a_model_loaded_on_the_thread_answers_steps_in_order(bench: Bench) -> None:
    bench.serve()
    bench.runner.submit(bench.prefill(1))
    frame, timing, thread = bench.outputs.get(timeout=WAIT_S)
    token = frame.rows[0].token
    assert token is not None
    assert thread == "stage-compute"
    assert (frame.step, frame.hop_to, timing.step) == (1, -1, 1)
    row = StepRow(bench.rig.key("a"), len(PROMPT), (token.token_id,), True)
    bench.runner.submit(bench.frame(FrameKind.DECODE, 2, row))
    bench.runner.submit(bench.frame(FrameKind.CLOSE, 3, StepRow(bench.rig.key("a"), 0, ())))
    assert [bench.outputs.get(timeout=WAIT_S)[0].step for _ in range(2)] == [2, 3]
    assert bench.runner.call(lambda: None).result(WAIT_S) is None
    assert (bench.runner.accepted_step, bench.runner.computed_step) == (3, 3)
    assert bench.runner.busy_seconds > 0.0
    assert (bench.runner.computing_step, bench.runner.computing_since) == (0, None)


def test_a_full_queue_is_backpressure_and_room_is_announced(bench: Bench) -> None:
    bench.serve()
    gate = bench.hold()
    for step in (1, 2):
        bench.runner.submit(bench.prefill(step, name=f"r{step}"))
    with pytest.raises(queue.Full):
        bench.runner.submit(bench.prefill(3, name="r3"))
    assert (bench.runner.queued, bench.runner.accepted_step) == (2, 2)
    assert not bench.runner.wait_for_room(0.0)
    gate.set()
    assert bench.runner.wait_for_room(WAIT_S)
    bench.runner.submit(bench.prefill(3, name="r3"))
    assert [bench.outputs.get(timeout=WAIT_S)[0].step for _ in range(3)] == [1, 2, 3]


def test_control_actions_keep_their_place_between_frames(bench: Bench) -> None:
    stage = bench.serve()
    gate = bench.hold()
    bench.runner.submit(bench.prefill(1))
    between = bench.runner.call(lambda: stage.requests)
    fenced = bench.runner.fence(1)
    bench.runner.submit(bench.prefill(2))
    gate.set()
    assert between.result(WAIT_S) == 1
    fenced.result(WAIT_S)
    assert bench.runner.call(lambda: stage.requests).result(WAIT_S) == 0
    assert bench.runner.fenced_frames == 1
    assert bench.outputs.get(timeout=WAIT_S)[0].step == 1
    assert bench.outputs.empty()
    assert bench.crashes.empty()


def test_a_new_epoch_counts_steps_from_the_start(bench: Bench) -> None:
    bench.serve()
    bench.runner.submit(bench.prefill(1))
    bench.outputs.get(timeout=WAIT_S)
    bench.runner.open(2, 0, 1).result(WAIT_S)
    assert (bench.runner.accepted_step, bench.runner.computed_step) == (0, 0)
    with pytest.raises(EpochFenced):
        bench.runner.open(1, 0, 1).result(WAIT_S)


def test_the_step_being_computed_is_visible_from_outside(bench: Bench) -> None:
    stage = bench.serve()
    entered, gate = threading.Event(), threading.Event()
    compute = stage.model.forward

    def slow(*args: Any, **options: Any) -> Any:
        entered.set()
        gate.wait(WAIT_S)
        return compute(*args, **options)

    stage.model.forward = slow  # type: ignore[method-assign]
    bench.runner.submit(bench.prefill(7))
    assert entered.wait(WAIT_S)
    assert bench.runner.computing_step == 7
    assert bench.runner.computing_since is not None
    assert bench.runner.queued == 0
    busy = bench.runner.busy_seconds
    assert bench.runner.busy_seconds > busy
    gate.set()
    assert bench.outputs.get(timeout=WAIT_S)[0].rows[0].status is RowStatus.OK


def test_a_crash_is_told_once_and_a_fresh_stage_serves_again(bench: Bench) -> None:
    stage = bench.serve()

    def break_down(_frame: StepFrame) -> StepFrame:
        raise MemoryError("device is gone")

    stage.step = break_down  # type: ignore[method-assign]
    bench.runner.submit(bench.prefill(1))
    assert isinstance(bench.crashes.get(timeout=WAIT_S), MemoryError)
    bench.runner.submit(bench.prefill(2))
    bench.runner.call(lambda: None).result(WAIT_S)
    assert bench.runner.crashed
    assert bench.crashes.empty()
    assert bench.outputs.empty()
    bench.serve()
    assert not bench.runner.crashed
    bench.runner.submit(bench.prefill(1))
    assert bench.outputs.get(timeout=WAIT_S)[0].rows[0].token is not None


def test_an_output_callable_that_raises_is_a_crash_not_a_dead_thread(bench: Bench) -> None:
    bench.serve()
    bench.runner._on_output = lambda _frame, _timing: bench.rig.nothing
    bench.runner.submit(bench.prefill(1))
    assert isinstance(bench.crashes.get(timeout=WAIT_S), AttributeError)
    assert bench.runner.call(lambda: 5).result(WAIT_S) == 5


def test_steps_and_fences_without_a_model_are_refused(bench: Bench) -> None:
    with pytest.raises(StageUnreachable):
        bench.runner.fence(1).result(WAIT_S)
    bench.runner.submit(bench.prefill(1))
    assert isinstance(bench.crashes.get(timeout=WAIT_S), StageUnreachable)


def test_an_action_that_raises_fails_its_future_only(bench: Bench) -> None:
    with pytest.raises(ZeroDivisionError):
        bench.runner.call(lambda: 1 // 0).result(WAIT_S)
    assert bench.runner.call(lambda: 7).result(WAIT_S) == 7
    gate = bench.hold()
    given_up = bench.runner.call(lambda: 1)
    assert given_up.cancel()
    gate.set()
    assert bench.runner.call(lambda: 8).result(WAIT_S) == 8


def test_stopping_finishes_the_work_in_progress_and_cancels_the_rest(bench: Bench) -> None:
    bench.serve()
    gate = bench.hold()
    bench.runner.submit(bench.prefill(1))
    queued = bench.runner.call(lambda: 1)
    assert not bench.runner.stop(0.0)
    gate.set()
    assert bench.runner.stop(WAIT_S)
    assert queued.cancelled()
    assert bench.outputs.empty()
    assert bench.runner.queued == 0
    with pytest.raises(StageUnreachable):
        bench.runner.submit(bench.prefill(2))
    assert bench.runner.call(lambda: 1).cancelled()
    assert bench.runner.wait_for_room(0.0)


def test_the_threads_of_a_step_are_chosen_before_it_and_its_end_is_noted(bench: Bench) -> None:
    noted: list[str] = []

    class Choice(CoreUse):
        def begin(self, frame: StepFrame, stage_count: int, now: float) -> None:
            noted.append(f"{threading.current_thread().name}: step {frame.step} of {stage_count}")
            super().begin(frame, stage_count, now)

        def end(self, now: float) -> None:
            noted.append("ended")
            super().end(now)

    bench.serve()
    bench.runner.cores = Choice(1, 2, lambda threads: noted.append(f"{threads} threads"))
    bench.runner.submit(bench.prefill(1))
    token = bench.outputs.get(timeout=WAIT_S)[0].rows[0].token
    assert token is not None
    row = StepRow(bench.rig.key("a"), len(PROMPT), (token.token_id,), True)
    bench.runner.submit(bench.frame(FrameKind.DECODE, 2, row))
    bench.outputs.get(timeout=WAIT_S)
    bench.runner.call(lambda: None).result(WAIT_S)
    assert noted == [
        "stage-compute: step 1 of 1",
        "ended",
        "stage-compute: step 2 of 1",
        "2 threads",
        "ended",
    ]
