"""The compute thread: everything that touches mlx happens here, in the order it was asked for.

mlx's streams belong to a thread, and a forward must never hold up the event loop; so a worker has
exactly one thread that loads the model, opens epochs and computes steps. Others hand it frames with
`submit` (bounded: `queue.Full` is backpressure, see `wait_for_room`) and control actions with
`call`, which keep their place between the frames and return a future. What comes out goes through
plain callables *on this thread*; an event loop wraps them with ``call_soon_threadsafe``.

The numbers a progress report needs (accepted, computed and computing step, since when, seconds
busy) may be read from any thread at any time; each is a single reference, replaced whole.

A frame of a fenced epoch is dropped and counted. Anything else that `Stage.step` raises is a defect
or a broken device: `on_crash` hears of it once, frames are dropped from then on, and calls still
run, so that the worker can install a fresh stage. `stop` lets the work in progress finish and drops
what is queued.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from stage_worker.core_use import CoreUse
from stage_worker.step_account import StepTiming
from stagemesh.errors import EpochFenced, StageUnreachable
from stagemesh.frame import StepFrame
from stagemesh.guards import Counters

log = logging.getLogger(__name__)

QUEUE_FRAMES_MAX = 64
"""Frames accepted and not yet computed: more than any window lets through, so a full queue means a
predecessor that ignores its window."""

Result = TypeVar("Result")


class Computing(Protocol):
    """What the compute thread drives: `Stage`, or a stand-in that has others compute."""

    epoch: int
    stage_count: int
    last_timings: StepTiming | None
    stage_counters: Counters
    kv_tokens: int
    requests: int

    def open(self, epoch: int, stage_index: int, stage_count: int) -> None:
        """Take a place on a route."""

    def fence(self, epoch: int) -> None:
        """Refuse an epoch and everything older."""

    def step(self, frame: StepFrame) -> StepFrame:
        """Compute one step."""

    def close(self) -> None:
        """End what it has started. From any thread; once it is not called any more, or to end a
        call that does not return."""


Built = TypeVar("Built", bound=Computing)


class StageRunner:
    """Owns the compute thread. ``stage`` may be None until a `call` has loaded and installed
    one."""

    def __init__(
        self,
        stage: Computing | None,
        on_output: Callable[[StepFrame, StepTiming], None],
        on_crash: Callable[[Exception], None],
        *,
        queue_frames_max: int = QUEUE_FRAMES_MAX,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stage = stage
        self.accepted_step = 0
        """Highest step submitted in the current epoch."""
        self.computed_step = 0
        """Highest step whose output was handed on, in the current epoch."""
        self.fenced_frames = 0
        self.cores: CoreUse | None = None
        """Chooses the threads of each step; None leaves them as they are."""
        self._on_output = on_output
        self._on_crash = on_crash
        self._queue_frames_max = queue_frames_max
        self._now = now
        self._computing: tuple[int, float] | None = None
        self._busy_s = 0.0
        self._items: deque[StepFrame | tuple[Callable[[], Any], Future[Any]]] = deque()
        self._queued_frames = 0
        self._changed = threading.Condition()
        self._stopping = False
        self._crashed = False
        self._thread = threading.Thread(target=self._run, name="stage-compute", daemon=True)

    # -- from any thread --------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread; once."""
        self._thread.start()

    def submit(self, frame: StepFrame) -> None:
        """Queue a frame. Raises queue.Full at the limit, StageUnreachable after `stop`."""
        with self._changed:
            if self._stopping:
                raise StageUnreachable("the compute thread is stopping")
            if self._queued_frames >= self._queue_frames_max:
                raise queue.Full
            self._items.append(frame)
            self._queued_frames += 1
            self.accepted_step = frame.step
            self._changed.notify_all()

    def call(self, action: Callable[[], Result]) -> Future[Result]:
        """Run ``action`` on the compute thread, after everything queued before it. Never full. The
        future is cancelled if the thread stops first."""
        future: Future[Result] = Future()
        with self._changed:
            if self._stopping:
                future.cancel()
            else:
                self._items.append((action, future))
                self._changed.notify_all()
        return future

    def open(self, epoch: int, stage_index: int, stage_count: int) -> Future[None]:
        """`Stage.open`, in order; step counting starts over."""
        return self.call(lambda: self._open(epoch, stage_index, stage_count))

    def fence(self, epoch: int) -> Future[None]:
        """`Stage.fence`, in order."""
        return self.call(lambda: self._present().fence(epoch))

    def install(self, build: Callable[[], Built]) -> Future[Built]:
        """Build a stage on the compute thread (load the model there) and serve it in the place of
        the one before, which is closed first; clears a crash."""
        return self.call(lambda: self._install(build))

    def wait_for_room(self, timeout_s: float) -> bool:
        """Block until `submit` would not raise queue.Full; False when ``timeout_s`` passed
        first."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._stopping or self._queued_frames < self._queue_frames_max, timeout_s
            )

    def stop(self, timeout_s: float = 10.0) -> bool:
        """Finish the work in progress, drop the rest, end the thread; False if it did not end in
        time."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        if self.stage is not None:
            self.stage.close()
        return not self._thread.is_alive()

    @property
    def queued(self) -> int:
        """Frames accepted and not yet begun."""
        return self._queued_frames

    @property
    def computing_step(self) -> int:
        """Step being computed now; 0 when idle."""
        computing = self._computing
        return computing[0] if computing else 0

    @property
    def computing_since(self) -> float | None:
        """When the step being computed began, on the ``now`` clock; None when idle."""
        computing = self._computing
        return computing[1] if computing else None

    @property
    def busy_seconds(self) -> float:
        """Time spent computing since the start, the step in progress included."""
        computing = self._computing
        return self._busy_s + (self._now() - computing[1] if computing else 0.0)

    @property
    def crashed(self) -> bool:
        """A step raised; frames are dropped until a stage is installed."""
        return self._crashed

    # -- on the compute thread --------------------------------------------------------------------

    def _run(self) -> None:
        while (item := self._next()) is not None:
            if isinstance(item, StepFrame):
                self._step(item)
            else:
                self._act(*item)
            item = None

    def _next(self) -> StepFrame | tuple[Callable[[], Any], Future[Any]] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._items)
            if self._stopping:
                for left in self._items:
                    if not isinstance(left, StepFrame):
                        left[1].cancel()
                self._items.clear()
                self._queued_frames = 0
                return None
            item = self._items.popleft()
            if isinstance(item, StepFrame):
                # Set together: a frame is always either queued or being computed for who looks.
                self._computing = (item.step, self._now())
                self._queued_frames -= 1
                self._changed.notify_all()
            return item

    def _step(self, frame: StepFrame) -> None:
        begun = self._now()
        try:
            if self._crashed:
                return
            stage = self._present()
            if self.cores is not None:
                self.cores.begin(frame, stage.stage_count, begun)
            output = stage.step(frame)
            timing = stage.last_timings
            self.computed_step = frame.step
            if timing is not None:
                self._on_output(output, timing)
        except EpochFenced:
            self.fenced_frames += 1
            return
        except Exception as error:
            log.exception("step %d of epoch %d crashed", frame.step, frame.epoch)
            self._crashed = True
            self._on_crash(error)
            return
        finally:
            ended = self._now()
            self._busy_s += ended - begun
            self._computing = None
            if self.cores is not None:
                self.cores.end(ended)

    def _act(self, action: Callable[[], Any], future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(action())
        except Exception as error:  # noqa: BLE001 - it belongs to whoever waits for the future
            future.set_exception(error)

    def _present(self) -> Computing:
        if self.stage is None:
            raise StageUnreachable("no model is loaded")
        return self.stage

    def _open(self, epoch: int, stage_index: int, stage_count: int) -> None:
        stage = self._present()
        newer = epoch > stage.epoch
        stage.open(epoch, stage_index, stage_count)
        if newer:
            self.accepted_step = self.computed_step = 0

    def _install(self, build: Callable[[], Built]) -> Built:
        before, self.stage = self.stage, None
        if before is not None:
            before.close()
        del before  # Both in memory at once may be one too many.
        self.stage = stage = build()
        self._crashed = False
        return stage
