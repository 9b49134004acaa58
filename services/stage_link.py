"""The sending side of a hop over gRPC: one long-lived call per route and successor.

``HopSender`` decides what goes on the wire and when; this module keeps a call open, over which
``LinkCarrier`` carries it. ``send`` puts a frame in the ledger and wakes the carrier's writer.

A connection that is refused or reset is noticed when the call fails, and reported at once. A peer
that is merely silent (half open, black hole, stopped) is noticed by missing acknowledgements, and
the carrier then ends the call. In between the link reconnects by itself, with backoff, and resumes
from the step the receiver expects. When that budget is spent, ``on_broken`` is called once with the
reason, and the route's owner decides what comes next; a link never chooses another route.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable

import grpc

from coordinator import backoff
from services import codec
from services.codec import LinkOpening, LinkState
from services.link_carrier import CALL_ENDED, Call, LinkCarrier
from services.rpc_errors import to_mesh_error
from services.stage_service import EXCHANGE
from stagemesh import PROTOCOL_VERSION
from stagemesh.errors import (
    AccessDenied,
    EpochFenced,
    EpochNotOpen,
    FingerprintMismatch,
    FrameError,
    HopMismatch,
    MeshError,
    StageError,
    StageUnreachable,
)
from stagemesh.frame import StepFrame
from stagemesh.guards import Counters
from stagemesh.transport import HopFault, HopLimits, HopSender

OPEN_S_MAX = 10.0
"""A successor may still be opening the route at its end."""
RECONNECT_S_MAX = 3.0
"""A transport may restart in this time; a process that is gone is reported before it ends."""
ANSWER_S_MAX = 2.0
"""From dialling to the successor's answer."""
OPEN_ATTEMPTS_MAX = 200
RECONNECT_ATTEMPTS_MAX = 12
CONNECTIONS_WITHOUT_PROGRESS_MAX = 4
RECONNECT_WAIT_S_INITIAL = 0.02
RECONNECT_WAIT_S_MAX = 0.5
CLOSE_S_MAX = 0.5
"""To end a call in order before it is cancelled."""

_FINAL = (EpochFenced, FingerprintMismatch, HopMismatch, FrameError, AccessDenied)
"""Refusals that dialling again cannot change."""

ChannelFactory = Callable[[str], grpc.aio.Channel]

_log = logging.getLogger(__name__)


class _TryAgain(Exception):
    """A dial failed in a way that another may not."""

    def __init__(self, error: MeshError) -> None:
        super().__init__(str(error))
        self.error = error


class StageLink:
    """The hop ``hop_from`` → ``hop_to`` of one route, as its predecessor. Belongs to one event
    loop.

    ``on_opened`` is called once, when the successor first answers; ``on_fault`` for every
    connection problem; ``on_broken`` at most once, with the reason, after which nothing is sent any
    more. None of them may block or raise.
    """

    def __init__(
        self,
        address: str,
        channel_factory: ChannelFactory,
        *,
        epoch: int,
        hop_from: int,
        hop_to: int,
        fingerprint: bytes,
        worker_name: str,
        peer: str = "",
        limits: HopLimits | None = None,
        counters: Counters | None = None,
        on_fault: Callable[[HopFault], None] | None = None,
        on_opened: Callable[[], None] | None = None,
        on_broken: Callable[[MeshError], None] | None = None,
        open_s_max: float = OPEN_S_MAX,
        reconnect_s_max: float = RECONNECT_S_MAX,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """``worker_name``: who dials. ``peer``: whom, for reports."""
        self.address = address
        self.peer = peer
        self.counters = Counters() if counters is None else counters
        self.sender = HopSender(
            epoch=epoch,
            hop_from=hop_from,
            hop_to=hop_to,
            fingerprint=fingerprint,
            limits=limits,
            counters=self.counters,
        )
        self.opened = asyncio.Event()
        """Set while a connection stands."""
        self._channel_factory = channel_factory
        self._opening = codec.encode_opening(
            LinkOpening(epoch, hop_from, hop_to, fingerprint, PROTOCOL_VERSION, worker_name)
        )
        self._on_fault = on_fault
        self._on_opened = on_opened
        self._on_broken = on_broken
        self._open_s_max = open_s_max
        self._reconnect_s_max = reconnect_s_max
        self._carrier = LinkCarrier(self.sender, self.counters, hop=self.hop, draw=draw)
        self._loop = asyncio.get_running_loop()
        self._channel: grpc.aio.Channel | None = None
        self._call: Call | None = None
        self._run: asyncio.Task[None] | None = None
        self._connections = 0
        self._closing = False
        self._broken = False
        self._reported = False
        """The present outage has been reported."""

    # ---------------------------------------------------------------- what the owner calls

    def open(self) -> None:
        """Begin to dial; returns at once."""
        if self._run is None:
            self._run = asyncio.create_task(self._keep_open(), name=f"link {self.hop}")

    def send(self, frame: StepFrame) -> StepFrame:
        """Seal ``frame``, keep it until it is acknowledged, and put it on the wire as soon as
        possible.

        Never blocks. May be called before the link is open. Raises Overloaded if the ledger is
        full, which a route's scheduler never lets happen (it bounds the steps under way by what the
        stages compute), SequenceGap if it is not the next step, or why the link is broken.
        """
        sealed = self.sender.offer(frame)
        self._carrier.wake_writer()
        return sealed

    @property
    def acknowledged_step(self) -> int:
        return self.sender.acked

    @property
    def hop(self) -> str:
        return f"{self.sender.hop_from}→{self.sender.hop_to} epoch={self.sender.epoch}"

    async def close(self) -> None:
        """End the call in order and give up what was not acknowledged. Idempotent."""
        self._closing = True
        if self._call is not None and self.opened.is_set():
            with contextlib.suppress(Exception):
                async with asyncio.timeout(CLOSE_S_MAX):
                    await self._call.done_writing()
        if self._run is not None and self._run is not asyncio.current_task():
            self._run.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._run

    # ---------------------------------------------------------------- connecting

    async def _keep_open(self) -> None:
        """Dial, carry, dial again, until closed or given up."""
        idle = 0
        try:
            while True:
                acked = self.sender.acked
                call = await self._dial_until_open()
                reason = await self._carrier.carry(call) or await self._reason_of(call)
                call.cancel()
                if self._closing:
                    return
                if self.sender.failure is not None:
                    raise self.sender.failure
                self._report(reason)
                if isinstance(reason, _FINAL):
                    raise reason
                idle = idle + 1 if self.sender.acked == acked else 0
                if idle >= CONNECTIONS_WITHOUT_PROGRESS_MAX:
                    raise reason
        except MeshError as error:
            self._give_up(error)
        except Exception:  # noqa: BLE001 - a link that dies in silence would stop the route
            _log.exception("link %s failed in a way it should not", self.hop)
            self._give_up(MeshError("link failed unexpectedly"))
        finally:
            await self._disconnect()

    async def _dial_until_open(self) -> Call:
        """Raises the MeshError of the last attempt when the budget is spent."""
        first = self._connections == 0
        try:
            return await backoff.retry(
                self._dial,
                on=_TryAgain,
                name=f"link {self.hop}",
                attempts=OPEN_ATTEMPTS_MAX if first else RECONNECT_ATTEMPTS_MAX,
                total_s=self._open_s_max if first else self._reconnect_s_max,
                wait_s_initial=RECONNECT_WAIT_S_INITIAL,
                wait_s_max=RECONNECT_WAIT_S_MAX,
            )
        except _TryAgain as error:
            raise error.error from None

    async def _dial(self) -> Call:
        """One attempt: a fresh channel, the opening, the successor's answer."""
        await self._disconnect()
        self._channel = self._channel_factory(self.address)
        call: Call = self._channel.stream_stream(EXCHANGE)()
        self._call = call
        try:
            async with asyncio.timeout(ANSWER_S_MAX):
                await call.write(self._opening)
                answer = await self._answer(call)
        except TimeoutError:
            error: MeshError = StageUnreachable("no answer to the opening", address=self.address)
        except MeshError as refusal:
            error = refusal
        except CALL_ENDED as failure:
            error = await self._reason_of(call, failure)
        else:
            self._resume(answer)
            return call
        if isinstance(error, _FINAL):
            raise error
        if not isinstance(error, EpochNotOpen):
            self._report(error)
        raise _TryAgain(error)

    async def _answer(self, call: Call) -> LinkState:
        data = await call.read()
        if not isinstance(data, bytes):
            raise await self._reason_of(call)
        answer = codec.decode_response(data)
        if not isinstance(answer, LinkState):
            raise StageUnreachable("successor did not answer the opening", address=self.address)
        return answer

    def _resume(self, state: LinkState) -> None:
        self.sender.on_opened(
            state.next_step,
            self._loop.time(),
            frames_max=state.inflight_frames_max,
            bytes_max=state.inflight_bytes_max,
        )
        self._connections += 1
        self._reported = False
        self.opened.set()
        if self._connections > 1:
            self.counters.count("links_reopened")
        elif self._on_opened is not None:
            self._on_opened()

    async def _disconnect(self) -> None:
        self.opened.clear()
        self._carrier.rest()
        self.sender.on_closed()
        channel, self._channel, self._call = self._channel, None, None
        if channel is not None:
            await channel.close()

    def _give_up(self, error: MeshError) -> None:
        if self._broken or self._closing:
            return
        self._broken = True
        self.sender.abandon(error)
        self._report(error, fatal=True)
        _log.warning("link %s to %s given up: %s", self.hop, self.peer or self.address, error)
        if self._on_broken is not None:
            self._on_broken(error)

    # ---------------------------------------------------------------- reporting

    async def _reason_of(
        self,
        call: Call,
        failure: BaseException | None = None,
    ) -> MeshError:
        """Why a call ended, as an error of the tree; what the transport says becomes
        StageUnreachable."""
        if not isinstance(failure, grpc.RpcError):
            if not call.done():
                return StageUnreachable("connection broke", address=self.address)
            failure = grpc.aio.AioRpcError(
                await call.code(),
                await call.initial_metadata(),
                await call.trailing_metadata(),
                await call.details(),
            )
        error = to_mesh_error(failure)
        if isinstance(error, StageError) or error.metadata or isinstance(error, _FINAL):
            return error
        code = failure.code() if hasattr(failure, "code") else None
        text = error.message or "connection ended"
        return StageUnreachable(text, address=self.address, status=code and code.name)

    def _report(self, error: MeshError, *, fatal: bool = False) -> None:
        if self._on_fault is None or (self._reported and not fatal):
            return
        self._reported = True
        sender = self.sender
        self._on_fault(
            HopFault(
                epoch=sender.epoch,
                step=sender.acked + 1,
                hop_from=sender.hop_from,
                hop_to=sender.hop_to,
                reason=error.reason,
                detail=str(error),
                fatal=fatal,
                peer=self.peer,
            )
        )
