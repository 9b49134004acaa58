"""The compute thread of a worker in memory: one item at a time, in order.

Follows ``stage_worker.runner``: frames, and control actions that keep their place between the
frames; so many frames may wait and no more, which is backpressure; a frame of a fenced epoch is
dropped. The model is ``EchoStage``, and a step takes as long as the context says, times
``slowness``.

It may tell *lies*: one-shot changes of a result before it is sealed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from coordinator.echo import EchoStage
from coordinator.simulation.context import Context
from coordinator.simulation.virtual import Action, Process
from stagemesh.frame import StepFrame
from stagemesh.topology import WorkerInfo

QUEUE_FRAMES_MAX = 3
"""Frames that wait for the compute thread; small, so that backpressure happens."""

Lie = Callable[[EchoStage, StepFrame], StepFrame]
Control = Callable[[], float]
"""A control action; it returns how long it takes."""


class SimRunner:
    """See the module. ``on_step`` hears of each step that was carried out: the frame, the honest
    result and the one that is told. ``on_free``: there may be room again, and whether that is
    because a step was carried out."""

    def __init__(
        self,
        process: Process,
        context: Context,
        *,
        on_step: Callable[[StepFrame, StepFrame, StepFrame], None],
        on_free: Callable[[bool], None],
    ) -> None:
        self.stage: EchoStage | None = None
        self.queued = 0
        self.accepted_step = 0
        self.computed_step = 0
        self.computing_step = 0
        self.slowness = 1.0
        self.lies: list[Lie] = []
        self._process, self._context = process, context
        self._on_step, self._on_free = on_step, on_free
        self._items: deque[StepFrame | Control] = deque()
        self._since = 0.0
        self._busy = False

    @property
    def computing_s(self) -> float:
        """For how long it has been computing the step it is at."""
        return self._context.time.now - self._since if self.computing_step else 0.0

    def submit(self, frame: StepFrame) -> bool:
        """Queue a frame; False if there is no room."""
        if self.queued >= QUEUE_FRAMES_MAX:
            return False
        self._items.append(frame)
        self.queued += 1
        self.accepted_step = frame.step
        self._turn()
        return True

    # Control actions

    def open(
        self, info: WorkerInfo, epoch: int, index: int, stage_count: int, opened: Action
    ) -> None:
        """Take a place on a route, behind what is queued; then ``opened``, on the loop."""

        def act() -> float:
            if self.stage is None or epoch > self.stage.epoch:
                self.stage = EchoStage(info, epoch, index, stage_count)
                self.accepted_step = self.computed_step = 0
            self._process.after(0.0, opened)
            return 0.0

        self._call(act)

    def fence(self, epoch: int) -> None:
        """Free what belongs to ``epoch`` or an older one, behind what is queued."""

        def act() -> float:
            if self.stage is not None and self.stage.epoch <= epoch:
                self.stage = None
            return 0.0

        self._call(act)

    def reload(self, seconds: float, reloaded: Action) -> None:
        """Have the model loaded again, which takes so long; then ``reloaded``."""

        def act() -> float:
            self.stage = None
            self._process.after(seconds, reloaded)
            return seconds

        self._call(act)

    def _call(self, action: Control) -> None:
        self._items.append(action)
        self._turn()

    # The thread

    def _turn(self) -> None:
        """Take the next item, if it is free."""
        while self._items and not self._busy:
            item = self._items.popleft()
            if not isinstance(item, StepFrame):
                seconds = item()
                if seconds:
                    self._busy = True
                    self._process.after(seconds, self._free)
                continue
            self.queued -= 1
            self._busy, self.computing_step = True, item.step
            self._since = self._context.time.now
            seconds = self._context.step_s + self._context.token_s * item.token_count
            self._compute(item, seconds * self.slowness)

    def _compute(self, frame: StepFrame, seconds: float) -> None:
        self._process.after(seconds, lambda: self._computed(frame))

    def _computed(self, frame: StepFrame) -> None:
        stage = self.stage
        if stage is None or not self.may_compute(stage, frame):
            self._free()
            return
        told = honest = stage.step(frame)
        if self.lies and frame.kind.name in ("PREFILL", "DECODE"):
            told = self.lies.pop(0)(stage, honest)
        self.computed_step = frame.step
        self._on_step(frame, honest, told)
        self._free(computed=True)

    def may_compute(self, stage: EchoStage, frame: StepFrame) -> bool:
        """Whether the frame is of the route that the stage is on."""
        return stage.epoch == frame.epoch

    def _free(self, *, computed: bool = False) -> None:
        self._busy = False
        self.computing_step = 0
        self._turn()
        self._on_free(computed)
