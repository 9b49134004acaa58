"""A long prompt that gets the place of a decode step, on real processes: everybody's tokens are
those of one machine, whatever happens while the running answers have closed up."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio

sys.path.insert(0, str(Path(__file__).parent))

from matrix import Asked, Stream, requests, undisturbed
from wires import FULL, PIPELINE, WiredMesh, wired_mesh, within

from services.fault_proxy import Passing
from stagemesh.frame import FrameKind, StepFrame
from stagemesh.v1 import generation_service_pb2 as pb

MODEL = "tiny:layers=6"
SPANS = ("0-2", "2-4", "4-6")
FLAGS = ("--prefill-chunk-tokens", "32", "--failed-worker-s-max", "0.1", "--route-wait-s-max", "10")
RUNNING, DECODED = 6, 24
"""Answers that run, and tokens that each has before the prompt comes."""
HALF_WAY = 180
REACHED_S_MAX = 30.0

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def asked(model_home: Path) -> list[Asked]:
    """Six that run (of both kinds), and behind them one with the long prompt."""
    both = requests(360, 12, 150)
    mixed = [*both[False][1:4], *both[True][1:4], both[True][0]]
    return undisturbed(MODEL, {False: mixed, True: []})[False]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(
    tmp_path_factory: pytest.TempPathFactory, asked: list[Asked]
) -> AsyncIterator[WiredMesh]:
    async with wired_mesh(tmp_path_factory.mktemp("place"), MODEL, SPANS, *FLAGS) as one:
        yield one


@dataclass
class Seen:
    """Steps on their way into the first stage, from the prompt's first chunk until half of it: how
    many rows decode in each."""

    newcomer: bytes
    rows: list[int] = field(default_factory=list)
    position: int = -1

    def __call__(self, passing: Passing) -> bool:
        if isinstance(passing, StepFrame):
            at = chunk_at(passing, self.newcomer)
            self.position = self.position if at is None else at
            if passing.kind is FrameKind.DECODE and 0 <= self.position < HALF_WAY:
                self.rows.append(len(passing.rows))
        return False


def chunk_at(frame: StepFrame, request: bytes) -> int | None:
    """Where the chunk of a request's prompt begins that this frame is; None for another frame."""
    is_prefill = frame.kind is FrameKind.PREFILL
    mine = [row.first_position for row in frame.rows if is_prefill and row.request == request]
    return mine[0] if mine else None


def half_way(newcomer: bytes) -> Callable[[Passing], bool]:
    def matches(passing: Passing) -> bool:
        at = chunk_at(passing, newcomer) if isinstance(passing, StepFrame) else None
        return at is not None and at >= HALF_WAY

    return matches


async def all_decode(streams: list[Stream]) -> None:
    while not all(len(one.tokens) >= DECODED for one in streams):
        await asyncio.sleep(0.002)


@pytest.mark.parametrize("fault", ["none", "kill", "stop", "leaves"])
async def test_everybody_gets_the_tokens_of_one_machine(
    mesh: WiredMesh, asked: list[Asked], fault: str
):
    await mesh.ready()
    victim = mesh.workers["stage-1"]
    if fault == "kill":
        mesh.expect("stage-1")
    *running, newcomer = [Stream(one) for one in asked]
    seen = Seen(newcomer.request)
    watching = mesh.workers["stage-0"].frames.hold(seen)
    hold = victim.frames.hold(half_way(newcomer.request))
    reading = [asyncio.create_task(one.read(mesh)) for one in running]
    try:
        assert await within(REACHED_S_MAX, all_decode(running))
        reading.append(asyncio.create_task(newcomer.read(mesh)))
        assert await within(REACHED_S_MAX, hold.reached.wait())
        if fault == "kill":
            victim.signal(signal.SIGKILL)
            await mesh.replace("stage-1")
        elif fault == "stop":
            victim.signal(signal.SIGSTOP)
        elif fault == "leaves":
            await mesh.generation.CancelGeneration(
                pb.CancelGenerationRequest(request_id=newcomer.request_id)
            )
        hold.release(drop=fault in ("kill", "stop"))
        await asyncio.gather(*reading)
    finally:
        victim.signal(signal.SIGCONT)
        mesh.workers["stage-0"].frames.forget(watching)
        victim.frames.forget(hold)
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
    for one in running if fault == "leaves" else [*running, newcomer]:
        one.check()
    if fault == "leaves":
        assert newcomer.finishes[0].reason == pb.FINISH_REASON_CANCELLED
    closed_up = seen.rows.count(RUNNING // (len(PIPELINE) - 1))
    assert closed_up > len(seen.rows) // 2 > 4, seen.rows
    if fault in ("kill", "stop"):
        assert {one.worker for one in newcomer.recoveries} == {"stage-1"}
        assert list(newcomer.finishes[0].route) == [FULL]
