"""What goes over one connection of a hop, while it stands.

``HopSender`` decides what goes on the wire and when; ``carry`` does it over the call it is given,
until that ends. One writer and one reader run, no task per frame: whoever has given the sender a
frame wakes the writer (``wake_writer``), acknowledgements wake it only if there is something to do.
A timer that does not depend on the writer, which may itself be stuck in a write, asks the sender
whether its patience is at an end; a sender that has given up ends the call.

Which call, and what follows when it has ended, is ``stage_link``'s business. A carrier outlives its
connections, because what was encoded for one may be sent again over the next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from services import codec
from services.codec import LinkState
from stagemesh.errors import FrameError, MeshError
from stagemesh.frame import StepFrame
from stagemesh.guards import Counters
from stagemesh.transport import Ack, HopSender, Nack

PROVED_EVERY_STEPS = 64
"""Encoding is checked by decoding on one first copy in so many, from the first on: it costs 30 to
50 µs, so on every frame it would take as long as all other checks together."""

CALL_ENDED = (grpc.RpcError, asyncio.InvalidStateError)
"""What reading or writing raises once a call is over."""

Call = Any  # grpc.aio.StreamStreamCall[bytes, bytes], generic for the type checker only


class LinkCarrier:
    """See the module. Belongs to one event loop. ``hop`` names its tasks; ``draw`` gives numbers in
    [0, 1) for the sender's jitter."""

    def __init__(
        self, sender: HopSender, counters: Counters, *, hop: str, draw: Callable[[], float]
    ) -> None:
        self._sender = sender
        self._counters = counters
        self._hop = hop
        self._draw = draw
        self._loop = asyncio.get_running_loop()
        self._call: Call | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._wake: asyncio.Future[None] | None = None
        self._encoded_step = 0
        """Highest step that was encoded."""

    async def carry(self, call: Call) -> MeshError | None:
        """Until the connection ends; returns why, where that is not the transport's to say."""
        self._call = call
        tasks = {
            asyncio.create_task(self._write(call), name=f"link writer {self._hop}"),
            asyncio.create_task(self._read(call), name=f"link reader {self._hop}"),
        }
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        reason = self._sender.failure
        for result in results:
            if isinstance(result, MeshError):
                reason = reason or result
            elif isinstance(result, Exception) and not isinstance(result, CALL_ENDED):
                raise result
        return reason

    def rest(self) -> None:
        """There is no connection any more."""
        self._call = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def wake_writer(self) -> None:
        """The sender has something to send."""
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    # -- inside -----------------------------------------------------------------------------------

    async def _write(self, call: Call) -> None:
        sender, loop = self._sender, self._loop
        while sender.failure is None:
            for frame in sender.transmissions(loop.time()):
                for message in self._encoded(frame):
                    await call.write(message)
            self._arm()
            if not sender.due(loop.time()):
                self._wake = loop.create_future()
                await self._wake

    def _encoded(self, frame: StepFrame) -> Iterator[bytes]:
        """The frame as it travels. Decoded and verified again before it goes out: every frame that
        goes out a second time (it may have been this end that spoilt it), and one in so many
        others. Raises the FrameError of the check that fails."""
        step, known = frame.step, self._encoded_step
        self._encoded_step = max(step, known)
        proved = step <= known or step % PROVED_EVERY_STEPS == 1
        try:
            yield from codec.encode_frame(frame, check=proved)
        except FrameError:
            self._counters.count("frames_misencoded")
            raise

    async def _read(self, call: Call) -> None:
        while True:
            data = await call.read()
            if not isinstance(data, bytes):
                return
            try:
                answer = codec.decode_response(data)
            except FrameError:
                self._counters.count("acks_ignored")
                continue
            self._heed(answer)

    def _heed(self, answer: LinkState | Ack | Nack) -> None:
        sender, now = self._sender, self._loop.time()
        if isinstance(answer, Ack):
            sender.on_ack(answer.step, now, epoch=answer.epoch, duplicate=answer.duplicate)
        elif isinstance(answer, Nack):
            sender.on_nack(
                answer.next_step,
                answer.reason,
                answer.retransmit,
                now,
                epoch=answer.epoch,
                draw=self._draw(),
            )
        if sender.failure is not None or sender.due(now):
            self.wake_writer()
        else:
            self._arm()

    def _arm(self) -> None:
        """Make sure the timer fires at the sender's next deadline or before."""
        due = self._sender.next_deadline(self._loop.time())
        if due is None or (self._timer is not None and self._timer.when() <= due):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(due, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        sender, now = self._sender, self._loop.time()
        sender.on_time(now, draw=self._draw())
        if sender.failure is not None and self._call is not None:
            self._call.cancel()
        if sender.failure is not None or sender.due(now):
            self.wake_writer()
        self._arm()
