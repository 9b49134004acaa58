"""Suites ``single``, ``prefill`` and ``batch``: what the mesh makes of the cores."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
import uuid
from collections.abc import Callable, Sequence

from services.bench.results import Result, failed, measured, paired
from services.bench.sides import PROMPT_SEED, Sides, Sizes, Timeline, note, take_turns
from stagemesh.v1 import generation_service_pb2 as pb

RUNNING_TOKENS_MAX = 1500
"""Most tokens of a stream that runs while another is admitted."""
SETTLED, UNDISTURBED = 8, 40
"""A stream counts as decoding from this token on, and is watched undisturbed until this one."""
SAME_TOKENS_NOTE = "{same} of {all} answers token for token those of mlx-lm"


async def decode_single(sides: Sides, sizes: Sizes) -> list[Result]:
    """One stream: tokens per second behind the first."""
    same = 0
    answers: dict[int, list[int]] = {}

    async def ours(turn: int) -> float:
        prompt = sides.prompt(sizes.decode_prompt_tokens, turn)
        timeline = await sides.generate(prompt, sizes.decode_tokens)
        answers[turn] = timeline.tokens
        return timeline.decode_tokens_per_s

    async def theirs(turn: int) -> float:
        nonlocal same
        prompt = sides.prompt(sizes.decode_prompt_tokens, turn)
        seen = await sides.baseline.ask("single", prompt=prompt, max_tokens=sizes.decode_tokens)
        same += seen["tokens"] == answers.get(turn)
        return float(seen["steps"] / seen["decode_s"])

    mine, others = await take_turns(sizes.turns, ours, theirs)
    text = SAME_TOKENS_NOTE.format(same=same, all=sizes.turns + 1)
    name = "decode_single"
    return [paired(name, mine, others, unit="tokens/s", higher_is_better=True, note=text)]


async def time_to_first_token(sides: Sides, sizes: Sizes) -> list[Result]:
    """From the call to the first token of long prompts, seconds."""
    found = []
    for length in sizes.prompt_tokens:
        name = f"ttft_{length}"
        if not sides.fits(length + 1):
            found.append(failed(name, f"the model's context holds {sides.context_tokens} tokens"))
            continue
        mine, others = await _first_tokens(sides, sizes, length)
        found.append(paired(name, mine, others, unit="s", higher_is_better=False))
    return found


async def prefill(sides: Sides, sizes: Sizes) -> list[Result]:
    """Prompt tokens per second of the longest prompt."""
    length = max(sizes.prompt_tokens)
    name = f"prefill_{length}"
    if not sides.fits(length + 1):
        return [failed(name, f"the model's context holds {sides.context_tokens} tokens")]
    mine, others = await _first_tokens(sides, sizes, length)
    mine, others = [length / value for value in mine], [length / value for value in others]
    return [paired(name, mine, others, unit="tokens/s", higher_is_better=True)]


async def _first_tokens(sides: Sides, sizes: Sizes, length: int) -> tuple[list[float], list[float]]:
    async def ours(turn: int) -> float:
        return (await sides.generate(sides.prompt(length, turn), 1)).ttft_s

    async def theirs(turn: int) -> float:
        prompt = sides.prompt(length, turn)
        return float((await sides.baseline.ask("single", prompt=prompt, max_tokens=1))["ttft_s"])

    if length not in sides.first_tokens:
        sides.first_tokens[length] = await take_turns(sizes.turns, ours, theirs)
    return sides.first_tokens[length]


async def batch_16(sides: Sides, sizes: Sizes) -> list[Result]:
    """Sixteen streams of mixed lengths, all at once: their tokens by the time until the last."""
    return [await _batch(sides, sizes, 16)]


async def batch_32(sides: Sides, sizes: Sizes) -> list[Result]:
    """Thirty-two of them."""
    return [await _batch(sides, sizes, 32)]


def mixed_lengths(sides: Sides, sizes: Sizes, streams: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of different lengths, and how many tokens each is answered with."""
    draw = random.Random(PROMPT_SEED + streams)  # noqa: S311 - not for secrets
    prompts = [
        sides.prompt(draw.randint(*sizes.batch_prompt_tokens), index) for index in range(streams)
    ]
    return prompts, [draw.randint(*sizes.batch_answer_tokens) for _ in range(streams)]


async def _batch(sides: Sides, sizes: Sizes, streams: int) -> Result:
    prompts, answers = mixed_lengths(sides, sizes, streams)

    async def ours(turn: int) -> float:
        began = time.perf_counter()
        await sides.generate_many(prompts, answers)
        return sum(answers) / (time.perf_counter() - began)

    async def theirs(turn: int) -> float:
        seen = await sides.baseline.ask("batch", prompts=prompts, max_tokens=answers)
        return float(seen["tokens"] / seen["seconds"])

    mine, others = await take_turns(sizes.batch_turns, ours, theirs)
    text = f"{sum(map(len, prompts))} prompt tokens, {sum(answers)} answer tokens in all"
    return paired(
        f"batch_{streams}", mine, others, unit="tokens/s", higher_is_better=True, note=text
    )


async def admission_gap(sides: Sides, sizes: Sizes) -> list[Result]:
    """The worst pause of running streams while a long prompt is taken in, against their median."""
    name, length = "admission_gap", sizes.admission_prompt_tokens
    if not sides.fits(length + 1):
        return [
            failed(name, f"the model's context holds {sides.context_tokens} tokens", "x", False)
        ]
    turns = [await _admit(sides, sizes, turn) for turn in range(sizes.admission_turns)]
    worst, during, undisturbed = (list(one) for one in zip(*turns, strict=True))
    text = (
        f"{sizes.admission_streams} streams, {length} prompt tokens admitted; the median is that "
        f"of the undisturbed stream. Against the median during the admission: "
        f"{statistics.median(during):.2f}. The worst pause of undisturbed streams against their "
        f"median: {statistics.median(undisturbed):.2f}"
    )
    return [measured(name, worst, unit="x median gap", higher_is_better=False, note=text)]


async def _admit(sides: Sides, sizes: Sizes, turn: int) -> tuple[float, float, float]:
    """Largest gap of any stream during an admission ÷ its median before, and ÷ its median then;
    and the largest before ÷ the median before."""
    prompts = [sides.prompt(32, 100 * turn + one) for one in range(sizes.admission_streams)]
    # Long enough, and not so long that what is promised to them leaves no room for the newcomer.
    longest = min(sides.context_tokens - 40, RUNNING_TOKENS_MAX)
    running = [_Growing(sides, prompt, longest) for prompt in prompts]
    tasks = [asyncio.create_task(one.run()) for one in running]
    try:
        await _until(
            lambda: all(len(one.timeline.arrivals) >= UNDISTURBED for one in running), tasks
        )
        began = time.perf_counter()
        newcomer = sides.prompt(sizes.admission_prompt_tokens, 1000 + turn)
        first = began + (await sides.read(newcomer, 1)).ttft_s
        await _until(lambda: all(one.timeline.arrivals[-1] > first for one in running), tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(one.end() for one in running))
    strict, loose, alone = [], [], []
    # From when on all of them decode: with fewer, each is faster.
    settled = max(one.timeline.arrivals[SETTLED] for one in running)
    for one in running:
        before = one.timeline.gaps(settled, began)
        disturbed = one.timeline.gaps(began, first) or before
        strict.append(max(disturbed) / statistics.median(before))
        loose.append(max(disturbed) / statistics.median(disturbed))
        alone.append(max(before) / statistics.median(before))
    return max(strict), max(loose), max(alone)


class _Growing:
    """A stream that goes on until it is cancelled, with what arrived so far."""

    def __init__(self, sides: Sides, prompt: list[int], max_tokens: int) -> None:
        self.timeline = Timeline(time.perf_counter())
        self._sides = sides
        self._request = sides.request(prompt, max_tokens, request_id=str(uuid.uuid4()))

    async def end(self) -> None:
        """Now: a reader that only goes away is waited for, and its stream disturbs the next."""
        cancel = pb.CancelGenerationRequest(request_id=self._request.request_id)
        await self._sides.mesh.client.generation.CancelGeneration(cancel)

    async def run(self) -> None:
        async for response in self._sides.mesh.client.generation.Generate(self._request):
            note(self.timeline, response)


async def _until(reached: Callable[[], bool], tasks: Sequence[asyncio.Task[None]]) -> None:
    """Wait for it; a task that fails meanwhile raises what it failed with."""
    while not reached():
        for task in tasks:
            if task.done():
                task.result()
        await asyncio.sleep(0.01)
