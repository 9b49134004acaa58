"""One member of a ``device_group``: joins the ring, meets the others, answers commands.

``MLX_HOSTFILE`` and ``MLX_RANK`` say where the others are. Commands are JSON objects, one a line.
A group is proved with the first three before it is used; the others are one stage's life:

* ``barrier`` (name, generation, state), ``all_sum`` and ``all_gather`` (tag, dtype, values);
* ``load`` (model, span, dtype, name, kv_budget_tokens): hold this member's part of the span;
* ``open`` (epoch, stage_index, stage_count) and ``fence`` (epoch);
* ``step`` (frame, now_unix_ns).

Every member runs a whole `Stage` on its part of each layer, under the same commands in the same
order, with the coordinator's and the worker's clock handed in: so all of them come to the same
frame, bit for bit. That is not trusted but compared. A command of a stage's life stands between two
barriers. Before it, all must hold the same command (its CRC32C is their state); behind it, all must
have come to the same answer (the output frame's two checksums, which cover its every field). Then
one member's frame is as good as any, and only the first hands it out.

Answers: the result; ``{"refused": …}`` for what all members refuse alike; ``{"broken": …}``, behind
which the process ends: its ring is of no more use. It also ends, whatever it does, when standard
input does: then nobody wants its answer.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import queue
import sys
import threading
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from stage_worker.hosting import SpanModel
from stage_worker.kv_cache import bytes_per_position
from stage_worker.loading import DTypePolicy
from stage_worker.mx_barrier import EXIT_BARRIER_BROKEN, Meeting, canonical, digest, frame_state
from stage_worker.stage import Stage
from stage_worker.tensor_parallel import CheckedCollectives, result_digest
from stagemesh.errors import BarrierBroken, InvalidConfiguration, MeshError, StageUnreachable
from stagemesh.frame import StepFrame, verify
from stagemesh.topology import Span

_DTYPES = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16, "i32": mx.int32}


class FrameCodec(Protocol):
    """A whole frame as bytes and back; how is the wire's business, not this room's."""

    def encode(self, frame: StepFrame) -> bytes:
        """One frame."""

    def decode(self, data: bytes) -> StepFrame:
        """The frame of these bytes. Raises FrameMalformed."""


class DeviceMember:
    """Carries out commands on one meeting. ``codec`` is needed for steps only."""

    def __init__(self, meeting: Meeting, codec: FrameCodec | None = None) -> None:
        self.meeting = meeting
        self.collectives = CheckedCollectives(meeting)
        self.stage: Stage | None = None
        self._codec = codec
        self._commands = 0
        self._now_unix_ns = 0

    def handle(self, command: dict[str, Any]) -> dict[str, Any]:
        """Carry out one command. Raises BarrierBroken, InvalidConfiguration."""
        match command:
            case {"do": "barrier", "name": name, "generation": generation}:
                self.meeting.barrier(name, generation, command.get("state"))
                return {"met": name}
            case {"do": "all_sum", "values": values, "tag": tag}:
                result = self.collectives.all_sum(_array(command, values), tag=tag)
            case {"do": "all_gather", "values": values, "tag": tag}:
                result = self.collectives.all_gather(_array(command, values), tag=tag)
            case {"do": "load" | "open" | "fence" | "step"}:
                return self._together(command)
            case _:
                raise InvalidConfiguration("no such command", setting=str(command.get("do")))
        return {"digest": result_digest(result), "values": result.astype(mx.float32).tolist()}

    # -- one stage's life -------------------------------------------------------------------------

    def _together(self, command: dict[str, Any]) -> dict[str, Any]:
        """Between two barriers; see the module."""
        self._commands += 1
        asked = {"command": f"{digest(json.dumps(command, sort_keys=True).encode()):08x}"}
        self.meeting.barrier("command", self._commands, asked)
        try:
            answer, state = self._act(command)
        except BarrierBroken:
            raise
        except (MeshError, OSError, RuntimeError, ValueError, MemoryError) as error:
            reason = error.reason if isinstance(error, MeshError) else type(error).__name__
            answer = {"refused": str(error), "reason": reason}
            state = {"refused": reason}
        if self.meeting.broken is not None:  # A row or a probe has caught it and gone on.
            raise self.meeting.broken
        self.meeting.barrier("answer", self._commands, state)
        return {**answer, "digest": digest(canonical(state))}

    def _act(self, command: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """The answer, and the part of it that must be every member's."""
        match command:
            case {"do": "load"}:
                return self._load(command)
            case {"do": "open"}:
                place = (command["epoch"], command["stage_index"], command["stage_count"])
                self._present().open(*place)
                return {}, {"open": repr(place)}
            case {"do": "fence"}:
                self._present().fence(command["epoch"])
                return {}, {"fenced": str(command["epoch"])}
            case _:
                return self._step(command)

    def _present(self) -> Stage:
        if self.stage is None:
            raise StageUnreachable("no model is loaded")
        return self.stage

    def _load(self, command: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        span = Span.parse(command["span"]) if command["span"] else None
        model = SpanModel.load(
            Path(command["model"]),
            span,
            dtype=DTypePolicy(command["dtype"]),
            verify=True,
            collectives=self.collectives,
        )
        self.stage = Stage(
            model,
            name=command["name"],
            kv_budget_tokens=command["kv_budget_tokens"],
            clock_ns=lambda: self._now_unix_ns,
        )
        facts = {
            "span": str(model.span),
            "layer_count": model.layer_count,
            "fingerprint": model.fingerprint,
            "span_fingerprint": model.span_fingerprint,
            "dtype": str(model.dtype),
            "capabilities": sorted(self.stage.capabilities),
        }
        state = {key: str(value) for key, value in facts.items()}
        own = {"nbytes": model.nbytes, "kv_bytes_per_position": bytes_per_position(model)}
        return {**facts, **own}, state

    def _step(self, command: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        stage, codec = self._present(), self._codec
        if codec is None:
            raise InvalidConfiguration("this member cannot read frames", setting="codec")
        self._now_unix_ns = command["now_unix_ns"]
        frame = codec.decode(base64.b64decode(command["frame"]))
        verify(frame, fingerprint=frame.fingerprint)
        output = stage.step(frame).sealed()
        state = frame_state(output)
        if self.meeting.group.rank() != 0:
            return {}, state
        timing = stage.last_timings
        answer = {
            "frame": base64.b64encode(codec.encode(output)).decode(),
            "timing": None if timing is None else dataclasses.asdict(timing),
            "held": [stage.kv_tokens, stage.reserved_tokens, stage.requests],
            "counters": dict(stage.stage_counters),
        }
        return answer, state


def _array(command: dict[str, Any], values: Any) -> mx.array:
    return mx.array(values, _DTYPES[command.get("dtype", "f32")])


# -- the process ----------------------------------------------------------------------------------


def answer(document: Mapping[str, Any]) -> None:
    """One JSON line on standard output."""
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


def join(epoch: int, timeout_s: float, *, join_s_max: float = 30.0) -> Meeting:
    """Join the ring that the environment names and meet everybody. Raises BarrierBroken."""
    try:
        group = mx.distributed.init(strict=True, backend="ring")
    except RuntimeError as error:
        raise BarrierBroken(f"the ring could not be joined: {error}") from error
    meeting = Meeting(group, epoch=epoch, timeout_s=timeout_s)
    with meeting.patience(join_s_max):
        meeting.barrier("join", 1, {"mlx": version("mlx")})
    return meeting


def commands() -> Iterator[str]:
    """Lines of standard input, read on a thread of its own; its end ends the process at once."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True, name="device-commands").start()
    while True:
        yield lines.get()


def serve(member: DeviceMember) -> int:
    """Answer commands until a barrier breaks; the exit status."""
    with contextlib.suppress(BrokenPipeError):
        answer({"ready": member.meeting.group.rank()})
        for line in commands():
            try:
                answer(member.handle(json.loads(line)))
            except BarrierBroken as error:
                answer({"broken": {"cause": error.reason, "detail": str(error)}})
                break
            except MeshError as error:
                answer({"refused": str(error), "reason": error.reason})
    return EXIT_BARRIER_BROKEN


def join_and_serve(epoch: int, timeout_s: float, codec: FrameCodec | None = None) -> int:
    """A member's whole life; the exit status."""
    try:
        meeting = join(epoch, timeout_s)
    except BarrierBroken as error:
        answer({"broken": {"cause": error.reason, "detail": str(error)}})
        return EXIT_BARRIER_BROKEN
    return serve(DeviceMember(meeting, codec))
