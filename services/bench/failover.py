"""Suite ``failover``: how long a client waits when a stage dies, or stops answering.

A stream runs over the pipeline; in the middle of it the last stage is killed (or stopped, which
nothing but missing progress can tell). The figures are the longest pause between two tokens, and
how long the coordinator took to give the worker up; of all turns the worst. The answer must have
every token; the chain, which the client checks, leaves no room for another one.
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import time
from contextlib import aclosing
from dataclasses import dataclass

from services.bench.results import Result, measured
from services.bench.sides import STREAM_S_MAX, Sides, Sizes, Timeline, note
from services.local_mesh import COORDINATOR
from services.up import is_whole
from stagemesh.errors import MeshError, RouteUnavailable
from stagemesh.v1 import event_service_pb2

TOKENS = 48
STRIKE_AT = 12
"""The signal is sent when this many tokens have arrived."""
HEALED_S_MAX = 120.0
NOTICED_S_MAX = 10.0
GIVEN_UP = frozenset({"WorkerLost", "WorkerFailed"})
"""Events that say so."""


@dataclass(frozen=True, slots=True)
class Strike:
    """What one signal did. Seconds. ``gap_s``: the longest pause of the stream; ``usual_s``: its
    median before; ``noticed_s``: until the coordinator had given the worker up."""

    gap_s: float
    usual_s: float
    noticed_s: float


async def sigkill(sides: Sides, sizes: Sizes) -> list[Result]:
    """The stage dies."""
    return await _strikes(sides, sizes, signal.SIGKILL)


async def sigstop(sides: Sides, sizes: Sizes) -> list[Result]:
    """The stage stops, and goes on when it has been given up."""
    return await _strikes(sides, sizes, signal.SIGSTOP)


async def _strikes(sides: Sides, sizes: Sizes, number: signal.Signals) -> list[Result]:
    """The worst pause, and the longest time to notice."""
    way = number.name.lower()
    strikes = [await _strike(sides, number, turn) for turn in range(sizes.failover_turns)]
    gaps = [one.gap_s for one in strikes]
    usual_ms = 1000 * statistics.mean(one.usual_s for one in strikes)
    said = f"the longest of {len(gaps)} pauses; their median {statistics.median(gaps):.3f} s, "
    said += f"undisturbed {usual_ms:.0f} ms"
    noticed = [one.noticed_s for one in strikes]
    told = f"from the signal to the event; median {statistics.median(noticed):.3f} s"
    return [
        _worst(f"failover_gap_{way}", gaps, said),
        _worst(f"failover_notice_{way}", noticed, told),
    ]


def _worst(name: str, samples: list[float], said: str) -> Result:
    return measured(name, samples, unit="s", higher_is_better=False, note=said, pick=max)


async def _strike(sides: Sides, number: signal.Signals, turn: int) -> Strike:
    """A stream whose last stage gets a signal in the middle of it."""
    await _healed(sides)
    victim = f"stage-{len(sides.mesh.spans) - 1}"
    pid = sides.mesh.supervisor.pids[victim]
    timeline = Timeline(time.perf_counter())
    request = sides.request(sides.prompt(32, turn), TOKENS)
    struck, struck_unix_ns = 0.0, 0
    try:
        stream = sides.mesh.client.generate(request, timeout_s=STREAM_S_MAX)
        async with aclosing(stream) as responses:
            async for response in responses:
                note(timeline, response)
                if not struck and len(timeline.tokens) >= STRIKE_AT:
                    struck, struck_unix_ns = time.perf_counter(), time.time_ns()
                    os.kill(pid, number)
        noticed_s = await _noticed(sides, victim, struck_unix_ns)
    finally:
        if number is signal.SIGSTOP and sides.mesh.supervisor.pids.get(victim) == pid:
            os.kill(pid, signal.SIGCONT)
    if len(timeline.tokens) != TOKENS:
        raise MeshError(f"the answer has {len(timeline.tokens)} of {TOKENS} tokens")
    before = sorted(timeline.gaps(0.0, struck))
    return Strike(max(timeline.gaps(struck)), before[len(before) // 2], noticed_s)


async def _noticed(sides: Sides, victim: str, struck_unix_ns: int) -> float:
    """How long after the signal the coordinator gave the worker up (both on one wall clock)."""
    topics = (event_service_pb2.TOPIC_MEMBERSHIP,)
    async with (
        asyncio.timeout(NOTICED_S_MAX),
        aclosing(sides.mesh.client.follow(topics, 1)) as responses,
    ):
        async for response in responses:
            event = response.event
            is_it = event.worker == victim and event.type in GIVEN_UP
            if is_it and event.time_unix_ns >= struck_unix_ns:
                return (event.time_unix_ns - struck_unix_ns) / 1e9
    raise MeshError("the coordinator's events ended")


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
