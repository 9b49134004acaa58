"""What the checks cost, as the difference they make: suite ``overhead``, with `switched`.

`overhead` measures each check alone, with everything it touches in the cache. Here the same checks
run where they belong: behind a forward that has read every weight and left nothing else in a cache.

The figure is the median of the differences of neighbouring steps, one with the checks and one
without, so that drift cancels. Its interval covers the true median with 95 % whatever the
distribution: it lies between two order statistics (binomial ranks). What happens once in 64 steps
(proving a frame's encoding, a checkpoint) is in no median; it adds some 5 µs a step.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from services.bench.results import Result, median_interval, paired, percent_of
from services.bench.sides import Report, Sizes, made_up_prompt, stages_of
from services.local_mesh import plan_spans
from services.settings import Settings
from stage_worker import blas
from stage_worker.machine import core_count
from stage_worker.model_source import resolve
from stagemesh.errors import StageError

TENTHS = 10
PROMPT_TOKENS = 32
PROMPT_VOCABULARY = 256
"""Ids below it are in every vocabulary."""


class SwitchedProcessFailed(StageError):
    """The process that measures ended without a figure."""

    reason = "SWITCHED_PROCESS_FAILED"


async def switched(settings: Settings, sizes: Sizes, report: Report) -> list[Result]:
    """A decode step with the checks and without. Raises SwitchedProcessFailed."""
    report("starting a mesh in one process, whose checks can be left out of a step")
    return figures(await _measured(settings, sizes))


def figures(document: dict[str, Any]) -> list[Result]:
    """The three results of what `services.bench.switched` printed."""
    checked, bare, checked_rest, bare_rest = (
        [nanoseconds / 1e6 for nanoseconds in column]
        for column in zip(*document["pairs"], strict=True)
    )
    step_ms = statistics.median(bare)
    steps = document["steps"]
    told = (
        f"{len(bare)} pairs of steps on live streams, one checked and one bare in drawn order; "
        f"{document['blas']}, {document['threads']} threads; same tokens; CRC32C computed "
        f"{document['checksums'][0]} times in checked and {document['checksums'][1]} in bare steps "
        "of the stream that was witnessed"
    )
    apart = (
        f"without the forwards a checked step takes {statistics.median(checked_rest):.3f} ms, a "
        f"bare one {statistics.median(bare_rest):.3f} ms; of a step of {step_ms:.1f} ms"
    )
    turns = f"{steps['checked']} checked steps and {steps['bare']} bare ones"
    return [
        _difference("overhead_switched", checked, bare, step_ms, told),
        _difference("overhead_switched_apart", checked_rest, bare_rest, step_ms, apart),
        paired(
            "decode_step_switched", checked, bare, unit="ms", higher_is_better=False, note=turns
        ),
    ]


def _difference(
    name: str, checked: Sequence[float], bare: Sequence[float], step_ms: float, note: str
) -> Result:
    """How much longer a checked step is than the bare one beside it, in percent of a step."""
    percents = [
        percent_of(mine - theirs, step_ms) for mine, theirs in zip(checked, bare, strict=True)
    ]
    tenths = [percents[start::TENTHS] for start in range(min(TENTHS, len(percents)))]
    return Result(
        name,
        statistics.median(percents),
        None,
        None,
        "% of a decode step",
        higher_is_better=False,
        spread=None,
        samples={"ours": [statistics.median(tenth) for tenth in tenths]},
        note=note,
        interval=median_interval(percents),
    )


async def _measured(settings: Settings, sizes: Sizes) -> dict[str, Any]:
    """Run `services.bench.switched` to its end, with the BLAS that workers have."""
    mesh = settings.mesh
    model = await asyncio.to_thread(resolve, mesh.model)
    spans = plan_spans(model.directory, mesh)
    threads = settings.process.threads or max(1, core_count() // stages_of(settings))
    preload = blas.preload_environment(threads * len(spans), deterministic=mesh.deterministic)
    environment = {**os.environ, **preload}
    if mesh.deterministic:
        environment.pop("LD_PRELOAD", None)
    prompt = made_up_prompt(PROMPT_TOKENS, PROMPT_VOCABULARY, 900)
    read_end, write_end = os.pipe()
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.bench.switched", str(model.directory)),
            *(word for span in spans for word in ("--span", str(span))),
            *("--prompt", ",".join(str(token) for token in prompt)),
            *("--dtype", mesh.dtype),
            *("--streams", str(sizes.switched_streams), "--pairs", str(sizes.switched_pairs)),
            *("--parent-pipe", str(read_end)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=environment,
            pass_fds=(read_end,),
        )
        return await _answer(process)
    finally:
        os.close(read_end)
        os.close(write_end)


async def _answer(process: asyncio.subprocess.Process) -> dict[str, Any]:
    try:
        printed, _ = await process.communicate()
    finally:
        if process.returncode is None:  # given up: it must not compute beside what comes next
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    try:
        document: dict[str, Any] = json.loads(printed)
    except ValueError:
        raise SwitchedProcessFailed(
            f"the process ended with status {process.returncode} and said nothing"
        ) from None
    if "error" in document:
        raise SwitchedProcessFailed(document["error"])
    return document
