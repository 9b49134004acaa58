"""Runs suites one after the other, each on its own: what fails is a result that says so."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil

from services.bench import (
    coordinator_suite,
    failover,
    live_checks,
    memory,
    neighbours,
    on_off,
    overhead,
    report,
    streams,
)
from services.bench.results import Result, failed
from services.bench.sides import Report, Sides, Sizes, open_sides
from services.settings import Settings
from stagemesh.errors import MeshError

MEASUREMENT_S_MAX = 600.0
"""One measurement that takes longer is given up, so that the others get their turn."""
WARM_STREAMS = 4
"""Streams before anything counts: a route's first ones are always audited."""

OnSides = Callable[[Sides, Sizes], Awaitable[list[Result]]]
Alone = Callable[[Settings, Sizes, Report], Awaitable[list[Result]]]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One function and the results it owes. Exactly one of ``on_sides`` and ``alone`` is given."""

    suite: str
    names: tuple[str, ...]
    on_sides: OnSides | None = None
    alone: Alone | None = None


async def _micro(_settings: Settings, sizes: Sizes, _report: Report) -> list[Result]:
    return await overhead.micro(sizes)


MEASUREMENTS = (
    Measurement("single", ("decode_single",), on_sides=streams.decode_single),
    Measurement("single", ("ttft_512", "ttft_1024"), on_sides=streams.time_to_first_token),
    Measurement("prefill", ("prefill_1024",), on_sides=streams.prefill),
    Measurement("batch", ("batch_16",), on_sides=streams.batch_16),
    Measurement("batch", ("batch_32",), on_sides=streams.batch_32),
    Measurement("batch", ("admission_gap",), on_sides=streams.admission_gap),
    Measurement(
        "overhead",
        ("overhead_checks", "overhead_integrity", "overhead_numeric", "overhead_tracing"),
        on_sides=overhead.checks,
    ),
    Measurement("overhead", ("overhead_shadow", "overhead_counted"), on_sides=live_checks.counted),
    Measurement("overhead", ("overhead_shadow_asked",), on_sides=live_checks.asked),
    Measurement(
        "failover",
        ("failover_gap_sigkill", "failover_notice_sigkill"),
        on_sides=failover.sigkill,
    ),
    Measurement(
        "failover",
        ("failover_gap_sigstop", "failover_notice_sigstop"),
        on_sides=failover.sigstop,
    ),
    Measurement(
        "overhead",
        ("overhead_switched", "overhead_switched_apart", "decode_step_switched"),
        alone=on_off.switched,
    ),
    Measurement("overhead", ("codec_and_checksum",), alone=_micro),
    Measurement(
        "coordinator",
        ("coordinator_tokens", "coordinator_tokens_per_cpu_s", "coordinator_linear"),
        alone=coordinator_suite.throughput,
    ),
    Measurement(
        "coordinator",
        (
            "coordinator_latency_p99",
            "coordinator_latency_p99_whole",
            "coordinator_latency_worst",
        ),
        alone=coordinator_suite.latency,
    ),
    Measurement("coordinator", ("idle_streams_1000",), alone=coordinator_suite.idle_streams),
    Measurement("memory", ("memory_growth",), alone=memory.growth),
)
"""In this order: what needs both sides first, the breaking of stages last among them."""

SUITES = tuple(dict.fromkeys(one.suite for one in MEASUREMENTS))


class Bench:
    """One run. ``results`` grows as it goes; ``environment`` is complete at its end."""

    def __init__(self, settings: Settings, sizes: Sizes, *, say: Report) -> None:
        self.settings = settings
        self.sizes = sizes
        self.results: list[Result] = []
        self.environment: dict[str, Any] = report.base_environment()
        self.environment |= {"model": settings.mesh.model, "dtype": settings.mesh.dtype}
        self._say = say
        self._cores = psutil.cpu_count() or 1
        self._others = 0.0

    async def run(self, suites: Sequence[str]) -> None:
        """Every measurement of these suites."""
        wanted = [one for one in MEASUREMENTS if one.suite in suites]
        shared = [one for one in wanted if one.on_sides is not None]
        if shared:
            await self._together(shared)
        for one in wanted:
            if one.alone is not None:
                await self._take(one, one.alone(self.settings, self.sizes, self._say))

    async def _together(self, wanted: Sequence[Measurement]) -> None:
        try:
            async with self._sides() as sides:
                for one in wanted:
                    if one.on_sides is not None:
                        await self._take(one, one.on_sides(sides, self.sizes))
        except (MeshError, OSError, TimeoutError) as error:
            missing = {name for one in wanted for name in one.names}
            missing -= {result.name for result in self.results}
            for name in sorted(missing):
                self._note(failed(name, f"the two sides could not be started: {error}"))

    @contextlib.asynccontextmanager
    async def _sides(self) -> AsyncIterator[Sides]:
        async with open_sides(self.settings, report=self._say) as sides:
            self.environment |= sides.environment
            for turn in range(WARM_STREAMS):
                await sides.generate(sides.prompt(16, turn), 4)
            yield sides

    async def _take(self, one: Measurement, work: Awaitable[list[Result]]) -> None:
        """One measurement's results, or for each result it owes why there is none."""
        self._say(f"{one.suite}: {', '.join(one.names)}")
        before = neighbours.read()
        try:
            async with asyncio.timeout(MEASUREMENT_S_MAX):
                found = await work
        except TimeoutError:
            text = f"not done within {MEASUREMENT_S_MAX:.0f} s"
            found = [failed(name, text) for name in one.names]
        except Exception as error:  # noqa: BLE001 - one measurement must not take the others along
            found = [failed(name, f"{type(error).__name__}: {error}") for name in one.names]
        share = neighbours.others_share(before, neighbours.read(), self._cores)
        # Too short to have measured anything: told from what the one before has measured.
        self._others = self._others if share is None else share
        for result in found:
            self._note(replace(result, others_cpu=self._others))

    def _note(self, result: Result) -> None:
        self.results.append(result)
        self._say(report.line_of(result.as_json()))

    @property
    def ok(self) -> bool:
        """Whether every measurement gave its figures. A missed target is no failure."""
        return not any(result.error for result in self.results)

    def as_json(self) -> dict[str, Any]:
        """The whole run."""
        return {
            "results": [result.as_json() for result in self.results],
            "environment": self.environment,
        }
