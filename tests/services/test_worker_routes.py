"""A compute thread that stands still holds off the predecessor: reading stops, nothing is lost, and
nobody is blamed."""

from __future__ import annotations

import asyncio
import threading

from services.worker_routes import WorkerRoutes
from stage_worker.runner import StageRunner
from stagemesh.frame import StepFrame
from stagemesh.guards import Counters
from stagemesh.transport import HopLimits
from tests.services.test_stage_link import EPOCH, a_hop

QUEUE, READ_AHEAD, WINDOW, FRAMES = 2, 3, 4, 24
LIMITS = HopLimits(
    inflight_frames_max=WINDOW,
    silence_s_max=1.5,
    retransmit_wait_s_min=0.2,
    retransmit_wait_s_initial=0.2,
)


class Stalled:
    """A stage that computes nothing until it is let go."""

    epoch, stage_count, kv_tokens, requests = EPOCH, 2, 0, 0
    last_timings = None

    def __init__(self) -> None:
        self.stage_counters = Counters()
        self.go = threading.Event()
        self.computed: list[int] = []

    def open(self, epoch: int, stage_index: int, stage_count: int) -> None: ...
    def fence(self, epoch: int) -> None: ...
    def close(self) -> None: ...

    def step(self, frame: StepFrame) -> StepFrame:
        self.go.wait()
        self.computed.append(frame.step)
        return frame


async def test_a_stalled_compute_thread_stops_the_reading_and_loses_nothing():
    stage, crashed = Stalled(), []
    runner = StageRunner(stage, lambda *_: None, crashed.append, queue_frames_max=QUEUE)
    runner.start()
    try:
        async with a_hop(
            proxied=False,
            deliver=lambda frame: routes._deliver(frame),
            limits=LIMITS,
            queue_frames_max=READ_AHEAD,
        ) as hop:
            routes = WorkerRoutes(
                runner,
                hop.servicer,
                name="w1",
                instance="1",
                tls=None,
                on_fault=hop.seen.append,
                on_step=lambda _: None,
            )
            routes.epoch = EPOCH
            hop.send(FRAMES)
            await hop.wait_delivered(1 + QUEUE + 1)
            await asyncio.sleep(2 * LIMITS.silence_s_max)
            assert len(hop.delivered) == 1 + QUEUE + 1, "one computes, some wait, one has no room"
            assert hop.link.sender.acked <= len(hop.delivered) + READ_AHEAD
            assert hop.link.sender.cursor - 1 <= len(hop.delivered) + READ_AHEAD + WINDOW
            assert hop.link.sender.unacknowledged >= FRAMES - len(hop.delivered) - READ_AHEAD
            assert (stage.computed, hop.seen, hop.felt, hop.broken) == ([], [], [], [])
            stage.go.set()
            await hop.wait_delivered(FRAMES)
            async with asyncio.timeout(20):
                while len(stage.computed) < FRAMES:
                    await asyncio.sleep(0.01)
            assert stage.computed == list(range(1, FRAMES + 1))
            assert (hop.seen, hop.felt, hop.broken, crashed) == ([], [], [], [])
    finally:
        stage.go.set()
        runner.stop()
