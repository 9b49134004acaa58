"""The worker's side of the control stream: dial the coordinator, register, and again for ever.

Each attempt is bounded; between attempts ``coordinator.backoff`` waits with full jitter, at most
``WAIT_S_MAX``, so that a restarted coordinator is found again within seconds and not by all workers
at once. What a worker says while nobody listens is dropped: it concerned routes that end with the
stream. Progress has one place, not a queue: only the newest report matters.

One refusal is final: the coordinator has let another process with this name in (``EpochFenced`` at
registration). ``run`` then raises it, and the process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc

from coordinator.backoff import UNBOUNDED, RetryDetails, retry
from services.channel import open_control_channel
from services.credentials import TlsFiles
from services.rpc_errors import to_mesh_error
from stagemesh.errors import EpochFenced, MeshError, StageUnreachable
from stagemesh.v1 import topology_pb2, worker_service_pb2, worker_service_pb2_grpc

WAIT_S_INITIAL = 0.1
WAIT_S_MAX = 3.0
REGISTER_TIMEOUT_S = 10.0
"""From dialling to the coordinator's welcome."""
MESSAGES_QUEUED_MAX = 256
"""Arrivals, results and faults on their way out; the oldest is dropped above this."""
COMPLAINT_INTERVAL_ATTEMPTS = 10
"""Every so many failed attempts one is logged."""

Request = worker_service_pb2.ConnectRequest
Response = worker_service_pb2.ConnectResponse
Call = Any  # grpc.aio.StreamStreamCall, generic for the type checker only

_log = logging.getLogger(__name__)


class _Refused(Exception):
    """An attempt that must not be repeated."""

    def __init__(self, error: MeshError) -> None:
        super().__init__(str(error))
        self.error = error


class ControlStream:
    """See the module. Belongs to one event loop; ``send`` and ``report`` never wait.

    ``describe`` gives the registration; ``on_command`` gets every command after the welcome;
    ``on_welcome`` is called before the first, ``on_lost`` when a stream that was welcomed has
    ended.
    """

    def __init__(
        self,
        address: str,
        *,
        describe: Callable[[], topology_pb2.Worker],
        on_command: Callable[[Response], None],
        on_welcome: Callable[[], None],
        on_lost: Callable[[], None],
        tls: TlsFiles | None = None,
    ) -> None:
        self._address = address
        self._tls = tls
        self._describe = describe
        self._on_command = on_command
        self._on_welcome = on_welcome
        self._on_lost = on_lost
        self._messages: deque[Request] = deque(maxlen=MESSAGES_QUEUED_MAX)
        self._report: worker_service_pb2.ProgressReport | None = None
        self._something = asyncio.Event()
        self._complained = ""
        """Reason of the last failed attempt."""
        self.connected = False
        self.report_interval_s = 1.0
        """What the coordinator asks of an idle worker."""

    def send(self, message: Request) -> bool:
        """Queue a message; False (and nothing done) while there is no coordinator."""
        if not self.connected:
            return False
        self._messages.append(message)
        self._something.set()
        return True

    def report(self, report: worker_service_pb2.ProgressReport) -> None:
        """Replace the report that waits to be sent."""
        if self.connected:
            self._report = report
            self._something.set()

    async def run(self) -> None:
        """Stay registered until cancelled. Raises EpochFenced if another process took the name."""
        while True:
            try:
                await self._one_connection()
            except _Refused as refused:
                raise refused.error from refused

    async def _one_connection(self) -> None:
        channel, call = await retry(
            self._dial,
            on=MeshError,
            name="register",
            attempts=UNBOUNDED,
            total_s=UNBOUNDED,
            wait_s_initial=WAIT_S_INITIAL,
            wait_s_max=WAIT_S_MAX,
            hook=self._complain,
        )
        self._messages.clear()
        self._report = None
        self.connected = True
        self._on_welcome()
        writing = asyncio.ensure_future(self._write(call))
        try:
            await self._read(call)
        finally:
            self.connected = False
            writing.cancel()
            call.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            self._on_lost()
            await channel.close()

    async def _dial(self) -> tuple[grpc.aio.Channel, Call]:
        """Connect and register. Every attempt reads the TLS files again: who waits for a
        coordinator may outlive its own certificate, and has to see the renewed one."""
        channel = open_control_channel(self._address, tls=self._tls)
        try:
            return channel, await self._register(channel)
        except BaseException:
            await channel.close()
            raise

    async def _register(self, channel: grpc.aio.Channel) -> Call:
        make_stub: Any = worker_service_pb2_grpc.WorkerServiceStub
        call = make_stub(channel).Connect()
        try:
            async with asyncio.timeout(REGISTER_TIMEOUT_S):
                with contextlib.suppress(grpc.RpcError):  # Reading tells why.
                    await call.write(Request(register=self._describe()))
                first = await call.read()
        except grpc.RpcError as failed:
            error = to_mesh_error(failed)
            if isinstance(error, EpochFenced):
                raise _Refused(error) from failed
            raise error from failed
        except TimeoutError as late:
            call.cancel()
            raise StageUnreachable(
                "the coordinator does not answer", address=self._address
            ) from late
        welcomed = first is not None and first is not grpc.aio.EOF
        if not welcomed or first.WhichOneof("message") != "registered":
            call.cancel()
            raise StageUnreachable("the coordinator did not welcome this worker")
        self.report_interval_s = max(0.1, first.registered.report_interval_ms / 1000.0)
        _log.info("registered with the coordinator at %s", self._address)
        return call

    async def _read(self, call: Call) -> None:
        try:
            while (command := await call.read()) is not grpc.aio.EOF:
                if command is None:  # what gRPC makes of bytes that are no message
                    _log.warning("a command arrived that cannot be read: registering again")
                    return
                self._on_command(command)
        except grpc.RpcError as failed:
            _log.warning("lost the coordinator: %s", to_mesh_error(failed))
        else:
            _log.info("the coordinator has closed the control stream")

    async def _write(self, call: Call) -> None:
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            while True:
                await self._something.wait()
                self._something.clear()
                while self._messages:
                    await call.write(self._messages.popleft())
                report, self._report = self._report, None
                if report is not None:
                    await call.write(Request(progress=report))

    def _complain(self, details: RetryDetails) -> None:
        """Now and then, and whenever the reason is another one: a refusal is told at once."""
        cause = details.caused_by
        reason = cause.reason if isinstance(cause, MeshError) else type(cause).__name__
        is_news, self._complained = reason != self._complained, reason
        if is_news or details.attempt % COMPLAINT_INTERVAL_ATTEMPTS == 1:
            _log.warning(
                "cannot register with %s yet (attempt %d): %s",
                self._address,
                details.attempt,
                details.caused_by,
            )
