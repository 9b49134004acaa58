"""Faults of single messages: noise, and shots that wait for a frame of the right phase."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from coordinator.simulation.network import ORDER_S, Connection, Pipe
from coordinator.simulation.plan import WIRE_FAULTS, Noise, Plan, Shot
from coordinator.simulation.prng import Prng
from coordinator.simulation.virtual import VirtualTime
from coordinator.simulation.wire import DAMAGES, damaged_answer
from stagemesh.errors import StageUnreachable
from stagemesh.frame import FrameKind, StepFrame
from stagemesh.transport import Ack, FramePart, Nack, PartedFrame

Carried = list[tuple[float, Any, bool]]
OLD_FRAMES_KEPT = 256


class MessageTrouble:
    """``network.Trouble``: decides on every message of every hop. ``count`` is told of each fault
    that fired, with its phase."""

    def __init__(
        self, plan: Plan, time: VirtualTime, prng: Prng, count: Callable[[str, str], None]
    ) -> None:
        self.noise: Noise = plan.noise
        self.armed: list[list[Any]] = [
            [shot, shot.skip] for shot in plan.shots if shot.fault in WIRE_FAULTS
        ]
        self.draining = False
        self._time, self._prng, self._count = time, prng, count
        self._ends = {
            ask.demand.request: len(ask.demand.prompt) + ask.demand.max_tokens - 1
            for ask in plan.asks
        }
        self._phase: dict[Connection, str] = {}
        self._old: dict[tuple[int, int, int], StepFrame] = {}

    def stop(self) -> None:
        """Nothing befalls a message any more."""
        self.noise = Noise()
        self.armed.clear()

    @property
    def pending(self) -> bool:
        """Whether a shot still waits for its message."""
        return bool(self.armed)

    def carry(self, pipe: Pipe, message: Any) -> Carried | None:
        """What becomes of a message: copies with (delay, message, keeps its order); None: as it
        is."""
        if isinstance(message, StepFrame | PartedFrame):
            frame = message if isinstance(message, StepFrame) else message.frame
            phase = self.phase_of(frame)
            self._phase[pipe.connection] = phase
            self._remember(message)
        elif isinstance(message, FramePart | Ack | Nack):
            phase = self._phase.get(pipe.connection, "handshake")
        else:
            return None
        fault = self._fault_for(message, phase)
        if fault is None:
            return None
        self._count(fault, phase)
        return self._apply(fault, pipe, message)

    def phase_of(self, frame: StepFrame) -> str:
        """Where in its request's life a frame is."""
        if self.draining:
            return "drain"
        kind, row = frame.kind, frame.rows[0] if frame.rows else None
        if kind is FrameKind.PROBE or row is None:
            return "handshake"
        if kind is FrameKind.PREFILL:
            if row.token is not None:
                return "first_token"
            return "first_prefill" if row.opening is not None else "later_prefill"
        last = any(row.end_position >= self._ends.get(row.request, 2**31) for row in frame.rows)
        return "last_token" if last or kind is FrameKind.CLOSE else "mid_decode"

    def _fault_for(self, message: Any, phase: str) -> str | None:
        is_answer = isinstance(message, Ack | Nack)
        for entry in self.armed:
            shot: Shot = entry[0]
            if shot.phase == phase and shot.fault.startswith("ack_") == is_answer:
                if entry[1] == 0:
                    self.armed.remove(entry)
                    return shot.fault
                entry[1] -= 1
                break
        noise = self.noise
        if not noise.rate or not noise.begins <= self._time.now < noise.ends:
            return None
        if self._prng.random() >= noise.rate:
            return None
        fault = self._prng.choice(noise.faults)
        if fault == "reset":
            return fault if self._prng.chance(0.1) else "drop"
        if fault.startswith("ack_") != is_answer:
            return None
        return fault

    def _apply(self, fault: str, pipe: Pipe, message: Any) -> Carried:
        prng = self._prng
        match fault:
            case "drop" | "ack_drop":
                return []
            case "duplicate" | "ack_duplicate":
                return [(0.0, message, True), (prng.uniform(0.0, 0.05), message, False)]
            case "delay" | "ack_delay":
                return [(prng.uniform(0.005, 0.12), message, True)]
            case "heavy_delay":
                return [(prng.heavy_tail(0.02, 1.2), message, prng.chance(0.5))]
            case "reorder":
                return [(prng.uniform(0.001, 0.03), message, False)]
            case "replay_old":
                return [(0.0, self._old_like(message), True), (ORDER_S, message, True)]
            case "reset":
                error = StageUnreachable("connection reset", address=pipe.receiver.name)
                pipe.connection.cut(error)
                return []
        is_answer = isinstance(message, Ack | Nack)
        damage = damaged_answer if is_answer else DAMAGES[fault]
        return [(0.0, damage(message, prng), True)]

    def _old_like(self, message: Any) -> Any:
        """A frame of earlier that could be taken for this one: the same step of another route or
        of another hop; failing that, any."""
        if not isinstance(message, StepFrame):
            return message
        same_step = [old for old in self._old.values() if old.step == message.step]
        other_route = [
            old
            for old in same_step
            if old.epoch != message.epoch and old.hop_from == message.hop_from
        ]
        other_hop = [
            old
            for old in same_step
            if old.epoch == message.epoch and old.hop_from != message.hop_from
        ]
        found = other_route or other_hop or list(self._old.values())
        return self._prng.choice(found) if found else message

    def _remember(self, message: StepFrame | PartedFrame) -> None:
        if isinstance(message, StepFrame):
            self._old[message.epoch, message.hop_from, message.step] = message
            if len(self._old) > OLD_FRAMES_KEPT:
                del self._old[next(iter(self._old))]
