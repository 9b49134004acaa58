"""An honest worker in memory: what it holds, what it does with a frame, and what it says of itself.

Nothing happens by itself here, and nothing is sent: ``MemoryMesh`` brings orders and frames, in the
order of virtual time, and carries the answers. The model is ``EchoStage``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from coordinator import instructions as do
from coordinator.echo import EchoStage
from coordinator.events import BarrierArrived, CommandFinished, WorkerProgressed
from stagemesh.frame import StepFrame
from stagemesh.topology import EXACT, Span, WorkerInfo, WorkerName

STEP_S = 0.010
"""Virtual time of a step on a stage, beside what its tokens cost."""
TOKEN_S = 0.0005


@dataclass(slots=True)
class MemoryWorker:
    """One process. A killed one is gone; a stopped one answers when it is resumed."""

    info: WorkerInfo
    alive: bool = True
    stopped: bool = False
    stage: EchoStage | None = None
    fenced: int = 0
    busy_until: float = 0.0
    accepted_step: int = 0
    computed_step: int = 0
    waiting: list[Callable[[], None]] = field(default_factory=list)
    """What arrived while it was stopped."""
    refuse_commands: bool = False
    stage_type: type[EchoStage] = EchoStage
    """What it computes with from its next route on."""
    steps_computed: int = 0

    def take_place(self, order: do.OpenRoute, index: int) -> BarrierArrived:
        """Its place on a route, unless the epoch is fenced."""
        epoch, info = order.route.epoch, self.info
        facts = {
            "fingerprint": info.fingerprint,
            "dtype": info.dtype,
            "layer_count": str(info.layer_count),
            "span": str(info.span),
        }
        refusal = "epoch is fenced" if epoch <= self.fenced else ""
        if not refusal:
            self.fenced = epoch - 1
            self.stage = self.stage_type(info, epoch, index, order.route.stage_count)
            self.accepted_step = self.computed_step = 0
        return BarrierArrived(
            info.name, "open-route", epoch, order.generation, facts, refusal=refusal
        )

    def fence(self, epoch: int) -> None:
        """Nothing of this epoch, or of an older one, is computed any more."""
        self.fenced = max(self.fenced, epoch)
        if self.stage is not None and self.stage.epoch <= epoch:
            self.stage = None

    def leave(self, order: do.DrainWorker) -> BarrierArrived:
        """What it still holds when it is asked to leave."""
        facts = {"in_flight": str(self.queued), "kv_tokens": str(self.kv_tokens)}
        return BarrierArrived(self.info.name, "drain", order.epoch, order.generation, facts)

    def reinitialise(self, command_id: str) -> CommandFinished:
        """It has loaded again, or refuses to."""
        return CommandFinished(self.info.name, command_id, not self.refuse_commands, info=self.info)

    def expects(self, frame: StepFrame) -> bool:
        """Whether it is the next one of the epoch that is served."""
        return (
            self.stage is not None
            and self.stage.epoch == frame.epoch
            and frame.step == self.accepted_step + 1
        )

    def accept(self, frame: StepFrame, now: float) -> float:
        """Into the queue; the seconds until it is computed."""
        self.accepted_step = frame.step
        begin = max(now, self.busy_until)
        self.busy_until = begin + STEP_S + TOKEN_S * frame.token_count
        return self.busy_until - now

    def compute(self, stage: EchoStage, frame: StepFrame) -> StepFrame:
        """The sealed result of an accepted step."""
        self.steps_computed += 1
        result = stage.step(frame).sealed()
        self.computed_step = frame.step
        return result

    @property
    def queued(self) -> int:
        """Steps accepted on this route and not computed."""
        return self.accepted_step - self.computed_step if self.stage else 0

    @property
    def kv_tokens(self) -> int:
        return self.stage.kv_tokens if self.stage else 0

    def report(self) -> WorkerProgressed:
        """Its progress."""
        queued = self.queued
        return WorkerProgressed(
            worker=self.info.name,
            instance=self.info.instance,
            epoch=self.stage.epoch if self.stage else 0,
            accepted_step=self.accepted_step,
            computed_step=self.computed_step,
            acknowledged_step=self.computed_step,
            queued=max(queued - 1, 0),
            kv_tokens=self.kv_tokens,
            computing_step=self.computed_step + 1 if queued else 0,
            computing_s=0.0,
        )


def worker_info(
    name: str,
    span: str,
    *,
    layer_count: int = 6,
    fingerprint: str = "ab" * 32,
    instance: str = "1",
    batch: bool = True,
    exact: bool = True,
    kv_budget_tokens: int = 0,
    dtype: str = "f32",
) -> WorkerInfo:
    """A worker's description with sensible defaults."""
    return WorkerInfo(
        name=WorkerName(name),
        address=f"{name}:1",
        span=Span.parse(span),
        layer_count=layer_count,
        fingerprint=fingerprint,
        span_fingerprint=f"{span}/{fingerprint[:8]}",
        dtype=dtype,
        instance=instance,
        kv_budget_tokens=kv_budget_tokens,
        capabilities=frozenset(
            {"trim", "score", "boundaries"}
            | ({"batch"} if batch else set())
            | ({EXACT} if exact else set())
        ),
    )
