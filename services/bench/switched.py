"""Decode steps with the checks and without, in turn, on one live stream. *Benchmarks only.*

``python -m services.bench.switched DIRECTORY --span 0-17 --span 17-30 …`` stands up a mesh in its
own process (`one_process`), makes one answer as shipped, and then the same answer again while
`check_switch` leaves the checks out of every other step. Steps go in pairs, one checked and one
bare, in an order that is drawn: a step is a little longer than the one before it, and what happens
once in 64 steps must not always meet the same side.

What is taken of a step: its time on the clock, from the moment the coordinator works out what its
row must look like to the same moment of the next step; and that time without the two forwards
(their own timers'), in which the noise of a step lies, and none of its checks but one look at a
cache's length.

It fails, and gives no figure, unless every check ran in checked steps and none in bare ones (by the
turnstiles' count, by that of CRC32C itself in a stream that is not timed, and by the mesh's own
count of rows it judged), and unless all answers have the same tokens. The result is one JSON object
on stdout.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from services.bench.check_switch import CheckSwitch, Plan, SwitchFailed
from services.bench.one_process import OneProcessMesh, one_process_mesh
from services.collector import calm_collector
from services.lifecycle import StopSignal
from stage_worker import blas
from stage_worker.stage import Stage
from stagemesh.errors import MeshError
from stagemesh.topology import Span

WARM_STEPS = 8
TAIL_STEPS = 4
"""Checked steps behind the last pair, so that nothing of a bare one is still under way."""
PROVED_PAIRS = 8
SEED = 20_240_607


@dataclass(frozen=True, slots=True)
class Moment:
    """A decode step begins. ``forward_ns``: of the step before it, on all stages."""

    checked: bool
    clock_ns: int
    forward_ns: int


@dataclass(frozen=True, slots=True)
class Timing:
    """What one step took. ``rest``: without the forwards."""

    checked: bool
    whole_ns: int
    rest_ns: int


Pair = tuple[Timing, Timing]
"""Neighbouring steps: the checked one, the bare one."""


@dataclass(slots=True)
class Stopwatch:
    """Looks at the clock whenever a step of the plan begins."""

    stages: Sequence[Stage]
    moments: list[Moment] = field(default_factory=list)

    def on_step(self, checked: bool) -> None:
        """The coordinator expects a row of the next step; everything of the one before is done."""
        timings = [stage.last_timings for stage in self.stages]
        forward_ns = sum(one.compute_ns for one in timings if one is not None)
        self.moments.append(Moment(checked, time.perf_counter_ns(), forward_ns))


def plan_of(pairs: int, draw: random.Random) -> Plan:
    """Warm-up, pairs in an order that is drawn, tail."""
    order = [checked for _ in range(pairs) for checked in _either(draw)]
    return (*[True] * WARM_STEPS, *order, *[True] * TAIL_STEPS)


def _either(draw: random.Random) -> tuple[bool, bool]:
    return (True, False) if draw.random() < 0.5 else (False, True)


def pairs_of(moments: Sequence[Moment]) -> list[Pair]:
    """The pairs of one stream. Raises SwitchFailed if its steps are not those of a plan."""
    steps = [_timing(begun, ended) for begun, ended in pairwise(moments)]
    steps = steps[WARM_STEPS : len(steps) - TAIL_STEPS]
    found = []
    for first, second in zip(steps[::2], steps[1::2], strict=True):
        if first.checked is second.checked:
            raise SwitchFailed("a pair of steps is not one checked and one bare")
        found.append((first, second) if first.checked else (second, first))
    return found


def _timing(begun: Moment, ended: Moment) -> Timing:
    whole_ns = ended.clock_ns - begun.clock_ns
    return Timing(begun.checked, whole_ns, whole_ns - ended.forward_ns)


async def measure(
    mesh: OneProcessMesh, prompt: Sequence[int], *, streams: int, pairs: int
) -> dict[str, Any]:
    """Every pair of every stream. Raises SwitchFailed, and MeshError for an answer that fails."""
    draw = random.Random(SEED)  # noqa: S311 - not for secrets
    watch = Stopwatch(mesh.stages)
    switch = CheckSwitch(watch.on_step)
    whole = WARM_STEPS + 2 * pairs + TAIL_STEPS
    plain = (await mesh.generate(prompt, _tokens(whole))).tokens
    found: list[Pair] = []
    judged = mesh.rows_judged
    planned: list[Plan] = []

    async def stream(count: int) -> list[Moment]:
        plan = plan_of(count, draw)
        planned.append(plan)
        switch.follow(plan, len(prompt))
        watch.moments = []
        tokens = (await mesh.generate(prompt, _tokens(len(plan)))).tokens
        if tokens != plain[: len(tokens)]:
            raise SwitchFailed("an answer with bare steps has other tokens than one without")
        return watch.moments

    with switch.installed():
        with switch.witnessed():
            await stream(min(PROVED_PAIRS, pairs))
        switch.require_witnessed()
        for _ in range(streams):
            found += pairs_of(await stream(pairs))
        await mesh.settled()  # or a frame would meet the check that it went past
    if not found:
        raise SwitchFailed("no pair of steps was timed")
    checked_steps = sum(step for plan in planned for step in plan)
    bare_steps = sum(not step for plan in planned for step in plan)
    switch.require_honest(checked_steps, bare_steps)
    if mesh.rows_judged - judged != switch.expected.checked:
        raise SwitchFailed(
            f"{mesh.rows_judged - judged} rows were judged in {switch.expected.checked} checked "
            f"and {switch.expected.bare} bare steps"
        )
    return {
        "pairs": [
            [checked.whole_ns, bare.whole_ns, checked.rest_ns, bare.rest_ns]
            for checked, bare in found
        ],
        "steps": {"checked": checked_steps, "bare": bare_steps},
        "calls": {name: [one.checked, one.bare] for name, one in switch.calls.items()},
        "checksums": [switch.checksums.checked, switch.checksums.bare],
        "tokens": len(plain),
    }


def _tokens(steps: int) -> int:
    """The prefill makes the first, and one step more ends the plan's last."""
    return steps + 2


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole measurement."""
    StopSignal().follow_parent(options.parent_pipe)
    spans = [Span.parse(text) for text in options.span]
    prompt = [int(word) for word in options.prompt.split(",")]
    async with one_process_mesh(Path(options.directory), spans, dtype=options.dtype) as mesh:
        calm_collector()
        found = await measure(mesh, prompt, streams=options.streams, pairs=options.pairs)
    return found | {"blas": blas.describe().title, "threads": blas.describe().threads}


def main(arguments: Sequence[str] | None = None) -> int:
    """One run; its JSON, or why there is none."""
    parser = argparse.ArgumentParser(prog="python -m services.bench.switched")
    parser.add_argument("directory")
    parser.add_argument("--span", action="append", required=True)
    parser.add_argument("--prompt", required=True, help="token ids with commas between")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--parent-pipe", type=int, default=-1)
    options = parser.parse_args(arguments)
    try:
        document = asyncio.run(run(options))
    except MeshError as error:
        document = {"error": f"{error.reason}: {error}"}
    sys.stdout.write(json.dumps(document) + "\n")
    return int("error" in document)


if __name__ == "__main__":
    sys.exit(main())
