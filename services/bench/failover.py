"""Suite ``failover``: how long a client waits when a stage dies, or stops answering.

A stream runs over the pipeline; in the middle of it the last stage is killed (or stopped, which
nothing but missing progress can tell). The figure is the longest pause between two tokens. The
answer must have every token; the chain, which the client checks, leaves no room for another one.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import aclosing

from services.bench.results import Result, measured
from services.bench.sides import STREAM_S_MAX, Sides, Sizes, Timeline, note
from services.local_mesh import COORDINATOR
from services.up import is_whole
from stagemesh.errors import MeshError, RouteUnavailable

TOKENS = 48
STRIKE_AT = 12
"""The signal is sent when this many tokens have arrived."""
HEALED_S_MAX = 120.0


async def failover(sides: Sides, sizes: Sizes) -> list[Result]:
    """Both ways to lose a stage."""
    found = []
    for name, number in (
        ("failover_gap_sigkill", signal.SIGKILL),
        ("failover_gap_sigstop", signal.SIGSTOP),
    ):
        gaps, usual = [], []
        for turn in range(sizes.failover_turns):
            gap, median = await _strike(sides, number, turn)
            gaps.append(gap)
            usual.append(median)
        usual_ms = 1000 * sum(usual) / len(usual)
        text = f"longest pause between two tokens; undisturbed {usual_ms:.0f} ms"
        found.append(measured(name, gaps, unit="s", higher_is_better=False, note=text))
    return found


async def _strike(sides: Sides, number: signal.Signals, turn: int) -> tuple[float, float]:
    """The longest pause of a stream whose last stage gets a signal, and its median pause before."""
    await _healed(sides)
    victim = f"stage-{len(sides.mesh.spans) - 1}"
    pid = sides.mesh.supervisor.pids[victim]
    timeline = Timeline(time.perf_counter())
    request = sides.request(sides.prompt(32, turn), TOKENS)
    struck = 0.0
    try:
        stream = sides.mesh.client.generate(request, timeout_s=STREAM_S_MAX)
        async with aclosing(stream) as responses:
            async for response in responses:
                note(timeline, response)
                if not struck and len(timeline.tokens) >= STRIKE_AT:
                    struck = time.perf_counter()
                    os.kill(pid, number)
    finally:
        if number is signal.SIGSTOP and sides.mesh.supervisor.pids.get(victim) == pid:
            os.kill(pid, signal.SIGCONT)
    if len(timeline.tokens) != TOKENS:
        raise MeshError(f"the answer has {len(timeline.tokens)} of {TOKENS} tokens")
    before = sorted(timeline.gaps(0.0, struck))
    return max(timeline.gaps(struck)), before[len(before) // 2]


async def _healed(sides: Sides) -> None:
    """Wait until every worker is back and the pipeline serves."""
    stages = {spec.name for spec in sides.mesh.specs if spec.name.startswith("stage-")}
    everyone = {spec.name for spec in sides.mesh.specs} - {COORDINATOR}
    deadline = time.monotonic() + HEALED_S_MAX
    while time.monotonic() < deadline:
        if is_whole(await sides.mesh.status(), stages, everyone):
            return
        await asyncio.sleep(0.1)
    raise RouteUnavailable(f"the mesh was not whole again within {HEALED_S_MAX:.0f} s")
