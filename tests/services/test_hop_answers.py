"""What waits to be written to a predecessor that does not read."""

from __future__ import annotations

import asyncio

from services import codec
from services.hop_answers import NACKS_MAX, HopAnswers
from stagemesh.transport import Ack, Action, Nack, Received


class Deaf:
    """A connection whose other end reads only when told to."""

    def __init__(self) -> None:
        self.reads = asyncio.Event()
        self.heard: list[object] = []

    async def write(self, data: bytes) -> None:
        await self.reads.wait()
        self.heard.append(codec.decode_response(data))


async def test_nacks_that_nobody_reads_are_few_and_the_newest() -> None:
    deaf = Deaf()
    answers = HopAnswers(deaf, urgent_at=4)
    for step in range(1, 1001):
        answers.put(Received(Action.REFUSE, nack=Nack(1, step, "FRAME_MALFORMED")))
    answers.put(Received(Action.DUPLICATE, ack=Ack(1, 7, duplicate=True)))
    deaf.reads.set()
    await answers.flush()
    assert deaf.heard[0] == Ack(1, 7, duplicate=True)
    assert [nack.next_step for nack in deaf.heard[1:]] == list(range(1001 - NACKS_MAX, 1001))
