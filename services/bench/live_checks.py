"""What the checks of a running mesh cost, by its own account, and what shadow verification costs.

The workers and the coordinator count the microseconds of CPU time they spend on checking what they
receive, and every stage but the last on checking the size of what it sends on
(``validation_us.…``; one check in eight is timed, and counts for all). It is more than the same
checks take alone: see `on_off`. Over ordinary streams, one after the other, the pipeline always
computes, so those microseconds divided by the time that passed are the share of compute that
checking took. For sampled shadows that is the very share their budget bounds: the full worker's
time for audits, against the time the pipeline was busy. A stream that *asks* for shadow
verification is another matter: whoever allowed it pays for it, and is told here how much slower the
stream is on this machine, whose cores the full worker shares.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from services.bench.results import Result, measured, percent_of
from services.bench.sides import Sides, Sizes, take_turns
from stagemesh.v1 import generation_service_pb2 as pb

PREFIX = "validation_us."
REPORTED_S = 1.5
"""An idle worker reports once a second; then everything it has counted is known."""


async def counted(sides: Sides, sizes: Sizes) -> list[Result]:
    """Ordinary streams at the mesh's default level: what was spent on checking meanwhile."""
    before = await _spent_us(sides)
    busy_s = 0.0
    for turn in range(sizes.counted_streams):
        prompt = sides.prompt(sizes.decode_prompt_tokens, 500 + turn)
        began = time.perf_counter()
        await sides.generate(prompt, sizes.decode_tokens)
        busy_s += time.perf_counter() - began
    await asyncio.sleep(REPORTED_S)
    after = await _spent_us(sides)
    spent = {name: after[name] - before.get(name, 0) for name in after}
    return shares(spent, busy_s, sizes.counted_streams)


def shares(spent_us: dict[str, int], busy_s: float, streams: int) -> list[Result]:
    """The two results, from microseconds by tier and the seconds the pipeline was busy."""
    audits_us = spent_us.get("shadow", 0)
    checks_us = sum(spent_us.values()) - audits_us
    parts = ", ".join(f"{name} {us} µs" for name, us in sorted(spent_us.items()))
    return [
        _share(
            "overhead_shadow",
            percent_of(audits_us / 1e6, busy_s),
            f"audits of streams that did not ask, over {streams} streams and {busy_s:.0f} s; the "
            "default budget is 2 % of compute, from which few can be drawn in so short a time",
        ),
        _share(
            "overhead_counted",
            percent_of(checks_us / 1e6, busy_s),
            f"by the mesh's own counters over the same streams: {parts or 'nothing'}",
        ),
    ]


def _share(name: str, percent: float, note: str) -> Result:
    return measured(name, [percent], unit="% of compute", higher_is_better=False, note=note)


async def _spent_us(sides: Sides) -> dict[str, int]:
    """Microseconds of checking so far by tier, over all processes of the mesh."""
    seen = await sides.mesh.client.diagnostics()
    found: dict[str, int] = {}
    for counters in (seen.counters, *(worker.counters for worker in seen.workers)):
        for name, value in counters.items():
            if name.startswith(PREFIX):
                tier = name.removeprefix(PREFIX)
                found[tier] = found.get(tier, 0) + value
    return found


async def asked(sides: Sides, sizes: Sizes) -> list[Result]:
    """How much slower an answer is that asks for shadow verification, percent."""
    prompt = sides.prompt(sizes.decode_prompt_tokens)

    def rate(level: Any) -> Callable[[int], Any]:
        async def measure(_turn: int) -> float:
            timeline = await sides.generate(prompt, sizes.decode_tokens, verify=level)
            return timeline.decode_tokens_per_s

        return measure

    verified, plain = await take_turns(
        sizes.turns, rate(pb.VERIFICATION_LEVEL_SHADOW), rate(pb.VERIFICATION_LEVEL_NUMERIC)
    )
    slower = [100.0 * (1 - mine / theirs) for mine, theirs in zip(verified, plain, strict=True)]
    return [
        measured(
            "overhead_shadow_asked",
            slower,
            unit="% slower",
            higher_is_better=False,
            note="a stream that asks for it, against one that does not; every token is computed "
            "twice on the same cores",
        )
    ]
