"""Row 5: where another system fell over at eight requests and stood still at thirty-two, forty at
once, over real connections: each gets the answer it would have got alone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from coordinator.settings import MeshPolicy
from stage_worker.tiny_models import write_tiny_model
from tests.mesh.own_loop_mesh import own_loop_mesh

REQUESTS, COUNT = 40, 6
DEMANDS = [
    {"text": text, "seed": 7, "temperature": temperature}
    for text in ("one request", "another request, longer than a chunk of its prompt", "\u5c71", "x")
    for temperature in (0.0, 0.8)
]
LIMITS_S = 50.0
"""For all of it; a deadlock is silent."""


@pytest.mark.timeout(120)
async def test_5_forty_requests_at_once_are_answered_as_each_would_be_alone(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama", layers=4, seed=2)
    policy = MeshPolicy(prefill_chunk_tokens=16, prefill_chunk_tokens_shared=16)
    async with own_loop_mesh(tmp_path, policy=policy) as mesh:
        alone = [(await mesh.generate(COUNT, **demand))[0] for demand in DEMANDS]
        async with asyncio.timeout(LIMITS_S):
            together = await asyncio.gather(
                *(mesh.generate(COUNT, **DEMANDS[i % len(DEMANDS)]) for i in range(REQUESTS))
            )
        assert [tokens for tokens, _ in together] == [
            alone[i % len(DEMANDS)] for i in range(REQUESTS)
        ]
        assert all(finish.reason == 2 and not finish.recoveries for _, finish in together)
        assert max(len(frame.rows) for frame in mesh.sent) > 1
        await mesh.settled()
        assert not mesh.coordinator.mesh.state.sessions
