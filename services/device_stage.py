"""A stage whose layers are divided over the processes of a device group (tensor parallelism).

`DeviceStage` stands where a ``stage_worker.stage.Stage`` stands and is called as one, on the
compute thread; it holds no weights. Each call is one command to all members
(``stage_worker.device_member`` says what they do with it and how they prove to be of one mind), and
each step's output is checked again here: the first member's frame must verify, and its checksums
must be those that every member came to.

When the group breaks, whatever the cause (a member died, hangs, or came to something else), every
member has been ended by then, and the call raises BarrierBroken. To the worker that is a crash of
its stage as any other: it is reported, so that the mesh reroutes, and a fresh stage is built, which
is a new group of new processes with the weights read and verified again. No collective is repeated.
"""

from __future__ import annotations

import base64
import itertools
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services import codec
from stage_worker.device_group import DeviceGroup
from stage_worker.loading import DTypePolicy
from stage_worker.mx_barrier import canonical, digest, frame_state
from stage_worker.step_account import StepTiming
from stagemesh.errors import (
    BarrierBroken,
    EpochFenced,
    FrameCorrupted,
    FrameMalformed,
    MeshError,
    by_reason,
)
from stagemesh.frame import FrameKind, StepFrame, verify
from stagemesh.guards import Counters
from stagemesh.topology import Span

START_S_MAX = 60.0
"""For interpreters to start and a ring to form, on a machine that is busy."""
LOAD_S_MAX = 3600.0
STEP_S_MAX = 600.0
"""For one step and nothing else: whoever hangs is found by the others, in ``collective_s_max``."""
MEMBER_PROGRAM = (sys.executable, "-m", "services.run_device_member")
PROOF = (1.5, -2.0)
"""What each member adds up once, before anything depends on sums."""

_generations = itertools.count(1)


@dataclass(frozen=True, slots=True)
class DeviceOptions:
    """What a device group is made of. ``threads`` is for all its members together."""

    size: int
    collective_s_max: float = 10.0
    threads: int = 0
    log_level: str = "info"
    log_format: str = "auto"


@dataclass(frozen=True, slots=True)
class SpanFacts:
    """What the members say of the span they hold together; as ``SpanModel`` says it.
    ``kv_bytes_per_position``: what a cached position of one request takes in all of them."""

    span: Span
    layer_count: int
    fingerprint: str
    span_fingerprint: str
    dtype: str
    nbytes: int
    kv_bytes_per_position: int


class DeviceStage:
    """See the module. Started and loaded by its constructor, which raises what loading a span may
    raise, and BarrierBroken."""

    def __init__(
        self,
        model: Path,
        span: Span | None,
        options: DeviceOptions,
        *,
        name: str,
        dtype: DTypePolicy,
        kv_budget_tokens: int,
    ) -> None:
        self.epoch = self.stage_index = self.stage_count = 0
        self.last_timings: StepTiming | None = None
        self.kv_tokens = self.reserved_tokens = self.requests = 0
        self.stage_counters = Counters()
        facts = (str(next(_generations)), str(options.collective_s_max), name)
        self.group = DeviceGroup(
            (*MEMBER_PROGRAM, *facts, options.log_level, options.log_format),
            options.size,
            start_s_max=START_S_MAX,
            environment=_threads_of(options),
        )
        self._size = options.size
        try:
            self.group.start()
            self._prove()
            self.model, self.capabilities = self._load(model, span, name, dtype, kv_budget_tokens)
        except BaseException:
            self.group.end()
            raise

    def _prove(self) -> None:
        """One sum of known values. Raises BarrierBroken."""
        command = {"do": "all_sum", "values": list(PROOF), "tag": "proof"}
        wanted = [value * self._size for value in PROOF]
        for rank, found in enumerate(self._run(command, START_S_MAX)):
            if found["values"] != wanted:
                raise BarrierBroken(f"member {rank} adds {PROOF} up to {found['values']}")

    def _load(
        self, model: Path, span: Span | None, name: str, dtype: DTypePolicy, kv_budget_tokens: int
    ) -> tuple[SpanFacts, frozenset[str]]:
        command = {
            "do": "load",
            "model": str(model),
            "span": str(span) if span is not None else "",
            "dtype": dtype.value,
            "name": name,
            "kv_budget_tokens": kv_budget_tokens,
        }
        answers = self._run(command, LOAD_S_MAX)
        first = answers[0]
        facts = SpanFacts(
            Span.parse(first["span"]),
            int(first["layer_count"]),
            str(first["fingerprint"]),
            str(first["span_fingerprint"]),
            str(first["dtype"]),
            sum(int(answer["nbytes"]) for answer in answers),
            sum(int(answer["kv_bytes_per_position"]) for answer in answers),
        )
        return facts, frozenset(first["capabilities"])

    @property
    def pids(self) -> tuple[int, ...]:
        """The members' processes; empty when they have been ended."""
        return self.group.pids

    # -- as a stage -------------------------------------------------------------------------------

    def open(self, epoch: int, stage_index: int, stage_count: int) -> None:
        """`Stage.open`, on every member."""
        place = {"epoch": epoch, "stage_index": stage_index, "stage_count": stage_count}
        self._run({"do": "open", **place})
        if epoch > self.epoch:
            self.kv_tokens = self.reserved_tokens = self.requests = 0
        self.epoch, self.stage_index, self.stage_count = epoch, stage_index, stage_count

    def fence(self, epoch: int) -> None:
        """`Stage.fence`, on every member. A group that has ended holds nothing."""
        if self.group.pids:
            self._run({"do": "fence", "epoch": epoch})
        if epoch >= self.epoch:
            self.epoch, self.stage_index, self.stage_count = epoch, 0, 0
            self.kv_tokens = self.reserved_tokens = self.requests = 0

    def step(self, frame: StepFrame) -> StepFrame:
        """`Stage.step`, on every member. Raises BarrierBroken if they are not of one mind."""
        if frame.epoch != self.epoch or self.stage_count == 0:
            raise EpochFenced("step of another epoch", epoch=frame.epoch, current=self.epoch)
        encoded = base64.b64encode(codec.encode_whole(frame)).decode()
        command = {"do": "step", "frame": encoded, "now_unix_ns": time.time_ns()}
        began = time.perf_counter_ns()
        answers = self._run(command, STEP_S_MAX)
        first = answers[0]
        output = codec.decode_request(base64.b64decode(first["frame"]))
        if not isinstance(output, StepFrame):
            raise FrameMalformed("a device answered with something else than a frame")
        verify(output, fingerprint=frame.fingerprint)
        if digest(canonical(frame_state(output))) != first["digest"]:
            raise FrameCorrupted("not the frame that the devices agreed on", step=frame.step)
        self.kv_tokens, self.reserved_tokens, self.requests = first["held"]
        counters = Counters(first["counters"])
        counters["device_steps"] = self.stage_counters["device_steps"] + 1
        self.stage_counters = counters
        self.last_timings = _timing(first["timing"], time.perf_counter_ns() - began)
        return output

    def close(self) -> None:
        """End every member; from any thread, and for good."""
        self.group.end()

    def _run(self, command: Mapping[str, Any], answer_s_max: float = 60.0) -> list[dict[str, Any]]:
        """Every member's answer. Raises what they all refused with, or BarrierBroken."""
        answers = self.group.run(command, answer_s_max=answer_s_max)
        if len({answer.get("digest") for answer in answers}) != 1:
            self.group.close()
            raise BarrierBroken(f"members answer {command['do']} differently")
        refused = answers[0].get("refused")
        if refused is not None:
            kind = by_reason().get(str(answers[0].get("reason")), MeshError)
            raise kind(str(refused))
        return answers


def _threads_of(options: DeviceOptions) -> dict[str, str]:
    """Members compute at the same time, so they share out the worker's threads."""
    threads = str(max(1, options.threads // options.size))
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {name: threads for name in names if options.threads or name in os.environ}


def _timing(stated: Mapping[str, Any] | None, took_ns: int) -> StepTiming | None:
    """The first member's account; what lies between it and ours (pipes, barriers) is input."""
    if stated is None:
        return None
    facts = dict(stated)
    facts["kind"] = FrameKind(facts["kind"])
    timing = StepTiming(**facts)
    between = max(0, took_ns - timing.total_ns)
    facts["input_ns"] = timing.input_ns + between
    return StepTiming(**facts)
