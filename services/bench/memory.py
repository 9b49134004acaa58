"""Suite ``memory``: whether processes grow with the requests they have served.

A private mesh answers many short requests, some at a time. Now and then every process's resident
memory is read. What is kept of past requests is bounded, and fills first (allocators, traces,
events, ended generations: the journal's bound is set to a quarter of the requests here); so what
counts is the second half: a straight line through its readings (least squares), as what a thousand
more requests add. The figure is the process that grows most. A reading jitters, so a slope
has an error of its own; the note gives each process's slope with it, and one that is less than
twice its error is noise.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import psutil

from services.bench.results import Result, failed, measured
from services.bench.sides import PROMPT_SEED, Report, Sizes, read_answer
from services.settings import Settings
from services.tokenizer import load_served_model
from services.up import Wishes, local_mesh
from stagemesh.v1 import generation_service_pb2 as pb

CONCURRENT = 16
READINGS = 60
PROMPT_TOKENS, ANSWER_TOKENS = 12, 8
KIB = 1024.0


@dataclass(frozen=True, slots=True)
class Slope:
    """A line's slope and its standard error, in the units of y per unit of x."""

    slope: float
    error: float

    @property
    def is_noise(self) -> bool:
        """Whether it cannot be told from a level line."""
        return abs(self.slope) <= 2 * self.error

    @classmethod
    def of(cls, x: Sequence[float], y: Sequence[float]) -> Slope:
        """Least squares. Raises ValueError for fewer than three points."""
        if len(x) < 3:
            raise ValueError("a slope with its error needs three points")
        middle_x, middle_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
        square = math.fsum((one - middle_x) ** 2 for one in x)
        if square == 0:
            raise ValueError("all points are at one place")
        pairs = list(zip(x, y, strict=True))
        slope = math.fsum((a - middle_x) * (b - middle_y) for a, b in pairs) / square
        rest = math.fsum((b - middle_y - slope * (a - middle_x)) ** 2 for a, b in pairs)
        return cls(slope, math.sqrt(rest / (len(x) - 2) / square))


@dataclass(slots=True)
class Readings:
    """Resident memory of each process in KiB, by how many requests had been answered."""

    answered: list[float] = field(default_factory=list)
    rss_kib: dict[str, list[float]] = field(default_factory=dict)

    def take(self, answered: int, pids: dict[str, int]) -> None:
        """Read every process now."""
        self.answered.append(float(answered))
        for name, pid in pids.items():
            rss = psutil.Process(pid).memory_info().rss / KIB
            self.rss_kib.setdefault(name, []).append(rss)

    def slopes(self) -> dict[str, Slope]:
        """Each process's growth over the second half, KiB per thousand requests."""
        half = len(self.answered) // 2
        thousands = [one / 1000.0 for one in self.answered[half:]]
        return {name: Slope.of(thousands, rss[half:]) for name, rss in self.rss_kib.items()}


async def growth(settings: Settings, sizes: Sizes, report: Report) -> list[Result]:
    """Many requests, and what they leave in memory."""
    kept = min(settings.process.journal_generations_max, max(1, sizes.memory_requests // 4))
    process = replace(settings.process, log_level="warning", journal_generations_max=kept)
    settings = replace(settings, process=process)
    wishes = Wishes(settings, full_worker=True, listen="127.0.0.1:0")
    readings = Readings()
    async with local_mesh(wishes, report=report) as mesh:
        vocab_size = load_served_model(mesh.model.directory, mesh.model.name).vocab_size
        numbers = iter(range(sizes.memory_requests))
        every = max(1, sizes.memory_requests // READINGS)

        async def client() -> None:
            for number in numbers:
                await read_answer(mesh.client.generation, _request(vocab_size, number))
                if number % every == 0:
                    readings.take(number, dict(mesh.supervisor.pids))

        async with asyncio.TaskGroup() as clients:
            for _ in range(CONCURRENT):
                clients.create_task(client())
    return [result_of(readings, sizes.memory_requests)]


def _request(vocab_size: int, number: int) -> pb.GenerateRequest:
    """Greedy and drawn ones in turn, each with a prompt of its own."""
    draw = random.Random(PROMPT_SEED + number)  # noqa: S311 - not for secrets
    prompt = [draw.randrange(vocab_size) for _ in range(PROMPT_TOKENS)]
    return pb.GenerateRequest(
        tokens=pb.TokenPrompt(token_ids=prompt),
        max_tokens=ANSWER_TOKENS,
        ignore_eos=True,
        temperature=0.8 * (number % 2),
        seed=number,
    )


def result_of(readings: Readings, requests: int) -> Result:
    """The process that grows most, and what each does."""
    name, unit = "memory_growth", "KiB per 1,000 requests"
    try:
        slopes = readings.slopes()
    except ValueError as error:
        return failed(name, str(error), unit, higher_is_better=False)
    if not slopes:
        return failed(name, "no process was read", unit, higher_is_better=False)
    said = ", ".join(
        f"{process} {slope.slope:+.0f} ± {slope.error:.0f}{' (noise)' if slope.is_noise else ''}"
        for process, slope in sorted(slopes.items())
    )
    half = len(readings.answered) // 2
    worst = max(slopes, key=lambda process: slopes[process].slope)
    found = measured(
        name,
        [slopes[worst].slope],
        unit=unit,
        higher_is_better=False,
        note=f"second half of {requests} requests, {len(readings.answered) - half} readings: "
        f"{said}; {worst} holds {readings.rss_kib[worst][-1] / KIB:.0f} MiB at the end",
    )
    curves = {f"{process} MiB": [x / KIB for x in rss] for process, rss in readings.rss_kib.items()}
    samples = {**found.samples, "requests answered": readings.answered, **curves}
    return replace(found, samples=samples)
