"""The answers of one link, on their way back to the predecessor.

Acknowledgements are cumulative, so one may stand for several: each waits a moment for others to
join it, which also keeps it out of the way of the frame just delivered. Nacks, answers to
duplicates, and acknowledgements of a window that is filling up do not wait. Of nacks only the
newest are kept: a predecessor that sends rubbish and reads no answers must not fill this end's
memory, and what an old nack asked for is asked for by a newer one, or found missing by a timer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

from services import codec
from services.grpc_types import ServicerContext
from stagemesh.transport import Ack, Nack, Received

ACK_DELAY_S = 0.04
"""An acknowledgement may wait this long for others to join it: two steps of one stream share one.
As long as TCP's shortest (Linux's TCP_DELACK_MIN), and well below the sender's shortest timer."""
NACKS_MAX = 16
"""Nacks waiting to be written."""


class HopAnswers:
    """What is to be written to one connection. ``run`` writes it, in one task; ``put`` never
    waits."""

    __slots__ = (
        "_ack",
        "_context",
        "_nacks",
        "_unanswered",
        "_urgent",
        "_urgent_at",
        "_work",
        "_writing",
    )

    def __init__(self, context: ServicerContext, *, urgent_at: int) -> None:
        self._context = context
        self._ack: Ack | None = None
        self._nacks: deque[Nack] = deque(maxlen=NACKS_MAX)
        self._unanswered = 0
        self._urgent_at = max(1, urgent_at)
        self._work = asyncio.Event()
        self._urgent = asyncio.Event()
        self._writing = asyncio.Lock()

    def put(self, received: Received) -> None:
        ack, nack = received.ack, received.nack
        if ack is not None:
            self._ack = ack
            self._unanswered += len(received.frames)
            self._work.set()
        if nack is not None:
            self._nacks.append(nack)
            self._work.set()
        if nack or (ack and ack.duplicate) or self._unanswered >= self._urgent_at:
            self._urgent.set()

    def repeat(self, ack: Ack) -> None:
        """A sign of life, at once."""
        self._ack = ack
        self._work.set()
        self._urgent.set()

    async def run(self) -> None:
        while True:
            await self._work.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ACK_DELAY_S):
                    await self._urgent.wait()
            await self.flush()

    async def flush(self) -> None:
        """Write what is due now: the acknowledgement first, since nacks count from it."""
        async with self._writing:
            ack, nacks, self._ack = self._ack, tuple(self._nacks), None
            self._nacks.clear()
            self._unanswered = 0
            self._work.clear()
            self._urgent.clear()
            if ack is not None:
                await self._context.write(codec.encode_ack(ack))
            for nack in nacks:
                await self._context.write(codec.encode_nack(nack))
