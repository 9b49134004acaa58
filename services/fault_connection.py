"""A TCP relay whose connections can be made to fail in the ways networks fail.

What it does it does to bytes, below gRPC: HTTP/2, keepalive and reconnects meet it as they would
meet the real thing.

    black hole    one direction is not carried any further. What was sent arrives when the hole is
                  closed again, as TCP's own retransmission would deliver it: late, and whole.
    half-open     the target's end of every connection is closed; the dialler is not told, and what
                  it sends goes nowhere.
    reset         both ends get RST.
    slow reader   the target takes only so many bytes a second; the dialler's writes back up.

It listens on loopback only and has no remote control: whoever runs it owns the object. Belongs to
one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

CHUNK_BYTES = 65_536
SLOW_CHUNK_BYTES = 256
DIAL_WAIT_S = 2.0
_RST_ON_CLOSE = struct.pack("ii", 1, 0)
"""SO_LINGER: on, for no time."""


class Direction(enum.Enum):
    FORWARD = "forward"
    """From who dialled to the target."""
    BACK = "back"

    @property
    def opposite(self) -> Direction:
        """The other one."""
        return Direction.BACK if self is Direction.FORWARD else Direction.FORWARD


@dataclass(slots=True)
class _Flow:
    """One direction of the proxy, all connections together."""

    is_open: asyncio.Event = field(default_factory=asyncio.Event)
    bytes_per_s: float = 0.0
    """0: as fast as they come."""
    carried: int = 0
    held: int = 0
    """Bytes that met a closed flow."""
    slowed: int = 0


@dataclass(slots=True, eq=False)
class _Connection:
    near: asyncio.StreamWriter
    far: asyncio.StreamWriter
    is_half_open: bool = False
    swallowed: int = 0
    """Bytes sent into it since."""


class ConnectionProxy:
    """Relays to ``target`` (host:port, may change between connections). See the module."""

    def __init__(self, target: str = "") -> None:
        self.target = target
        self.address = ""
        self.accepted = 0
        """Connections carried so far."""
        self.resets = 0
        self.half_opened = 0
        self.swallowed = 0
        """Bytes sent into half-open connections."""
        self._flows = {direction: _Flow() for direction in Direction}
        for flow in self._flows.values():
            flow.is_open.set()
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> str:
        """Returns the address to dial."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        return self.address

    async def stop(self) -> None:
        """Close everything."""
        if self._server is not None:
            self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- faults -----------------------------------------------------------------------------

    def black_hole(self, direction: Direction) -> None:
        """Carry nothing more in this direction, on old and new connections."""
        self._flows[direction].is_open.clear()

    def heal(self) -> None:
        """Carry everything again at full speed, what was held back first."""
        for flow in self._flows.values():
            flow.bytes_per_s = 0.0
            flow.is_open.set()

    def slow_down(self, direction: Direction, bytes_per_s: float) -> None:
        """Carry at most this much."""
        self._flows[direction].bytes_per_s = bytes_per_s

    def half_open(self) -> Callable[[], int]:
        """Close the target's end of every present connection and keep the dialler's open. What is
        returned says how many bytes were sent into these so far."""
        chosen = [one for one in self._connections if not one.is_half_open]
        for connection in chosen:
            connection.is_half_open = True
            self.half_opened += 1
            connection.far.close()
        return lambda: sum(one.swallowed for one in chosen)

    def reset(self) -> None:
        """RST to both ends of every present connection."""
        for connection in tuple(self._connections):
            self.resets += 1
            for writer in (connection.near, connection.far):
                _reset(writer)

    def held(self, direction: Direction) -> int:
        """Bytes that met a black hole in this direction."""
        return self._flows[direction].held

    def slowed(self, direction: Direction) -> int:
        """Bytes that had to wait for a slow reader."""
        return self._flows[direction].slowed

    @property
    def connections(self) -> int:
        """Present connections."""
        return len(self._connections)

    # -- inside -----------------------------------------------------------------------------

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None:
            return
        self._tasks.add(task)
        try:
            await self._relay(reader, writer)
        except (OSError, TimeoutError):
            _reset(writer)
        except asyncio.CancelledError:
            _reset(writer)
        finally:
            self._tasks.discard(task)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.target.rpartition(":")
        async with asyncio.timeout(DIAL_WAIT_S):
            far_reader, far = await asyncio.open_connection(host, int(port))
        connection = _Connection(writer, far)
        self._connections.add(connection)
        self.accepted += 1
        for one in (writer, far):
            one.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        forward = asyncio.create_task(self._carry(connection, reader, far, Direction.FORWARD))
        back = asyncio.create_task(self._carry(connection, far_reader, writer, Direction.BACK))
        both = {forward, back}
        try:
            done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if connection.is_half_open and forward not in done:
                await forward  # the dialler's end stays until the dialler lets go
        finally:
            self._connections.discard(connection)
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)
            for one in (writer, far):
                one.close()

    async def _carry(
        self,
        connection: _Connection,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        direction: Direction,
    ) -> None:
        """Until either end closes. A broken end is a closed one."""
        flow = self._flows[direction]
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                if not flow.is_open.is_set():
                    flow.held += len(data)
                    await flow.is_open.wait()
                if connection.is_half_open:
                    self.swallowed += len(data)
                    connection.swallowed += len(data)
                    continue
                await self._write(flow, writer, data)
                flow.carried += len(data)

    @staticmethod
    async def _write(flow: _Flow, writer: asyncio.StreamWriter, data: bytes) -> None:
        view = memoryview(data)
        while view:
            size = SLOW_CHUNK_BYTES if flow.bytes_per_s else len(view)
            writer.write(view[:size])
            await writer.drain()
            view = view[size:]
            if flow.bytes_per_s:
                flow.slowed += size
                await asyncio.sleep(size / flow.bytes_per_s)


def _reset(writer: asyncio.StreamWriter) -> None:
    raw = writer.get_extra_info("socket")
    if raw is not None:
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
    writer.transport.abort()
