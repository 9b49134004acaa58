"""Which guard fired, where and why, as events on the spans of the requests it concerns.

What goes wrong is published by the coordinator's core: a token rejected, a row failed, a hop's
fault, a barrier broken, a rung of the ladder taken. Most of it names its request. A hop's fault
names a step, so the requests of the last steps are remembered; a fault may be reported by a worker
after its step has long returned.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from coordinator.instructions import PublishEvent
from stagemesh.frame import StepFrame

STEPS_REMEMBERED_MAX = 1024
TOPICS = frozenset({"integrity", "recovery", "barrier"})
QUIET = frozenset({"BarrierFormed", "BarrierCompleted", "FrameFenced"})
"""Nothing went wrong with a request."""
NAMES = {
    "hop": "mesh.hop",
    "epoch": "mesh.epoch",
    "step": "mesh.step",
    "reason": "error.type",
    "status": "error.type",
    "corruption": "error.type",
    "cause": "error.type",
    "action": "mesh.recovery.action",
    "detail": "mesh.detail",
    "name": "mesh.barrier",
}
"""Event attribute → span event attribute; the first of several that is not empty counts."""

AddEvent = Callable[[bytes, str, dict[str, str]], None]
"""Puts an event on a request's span, if it has one."""


class SpanEvents:
    """See the module. Never raises, never blocks."""

    def __init__(self, add: AddEvent) -> None:
        self._add = add
        self._steps: OrderedDict[tuple[str, str], tuple[bytes, ...]] = OrderedDict()

    def step_sent(self, frame: StepFrame) -> None:
        """Remember whom a step is for."""
        key = (str(frame.epoch), str(frame.step))
        self._steps[key] = tuple([row.request for row in frame.rows])
        if len(self._steps) > STEPS_REMEMBERED_MAX:
            self._steps.popitem(last=False)

    def published(self, event: PublishEvent) -> None:
        """A fact: put it on the spans it concerns."""
        if event.topic not in TOPICS or event.type in QUIET:
            return
        facts = event.attributes
        key = (facts.get("epoch", ""), facts.get("step", ""))
        concerned = (event.request,) if event.request else self._steps.get(key, ())
        if not concerned:
            return
        attributes = {"mesh.worker": event.worker}
        for name, known in NAMES.items():
            if facts.get(name) and known not in attributes:
                attributes[known] = facts[name]
        for request in concerned:
            self._add(request, event.type, attributes)
