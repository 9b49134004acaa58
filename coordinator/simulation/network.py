"""An in-memory network: connections between processes, and everything that may befall them.

A connection is two pipes, one each way, that keep order and lose nothing, as TCP does, until a
fault says otherwise. Two classes use them: *hop* connections, whose messages a fault may drop,
repeat, delay, overtake or damage one by one (a proxy, a bad card, a bug below the checks), and
*control* connections, which only ever are late, held or cut.

``Paths`` are directed: what A sends to B may be lost (a black hole) or held until the path heals
(TCP retransmits), while B still reaches A. A process that is killed resets its connections as its
kernel would; one whose machine vanished says nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from coordinator.simulation.virtual import Process, VirtualTime
from stagemesh.errors import MeshError, StageUnreachable

LATENCY_S = 0.0004
"""One way, without trouble."""
ORDER_S = 1e-7
"""Least distance of two messages that keep their order."""

Deliver = Callable[[Any], None]
Closed = Callable[[MeshError], None]


class Blocked:
    """What becomes of messages on a path that is not open."""

    LOST = "lost"
    HELD = "held"


class Trouble(Protocol):
    """What decides on single messages of hop connections: (extra delay, message, keeps order)."""

    def carry(self, pipe: Pipe, message: Any) -> list[tuple[float, Any, bool]] | None: ...


class Pipe:
    """One direction of a connection."""

    __slots__ = ("connection", "deliver", "held", "last", "receiver", "sender")

    def __init__(self, connection: Connection, sender: Process, receiver: Process) -> None:
        self.connection = connection
        self.sender = sender
        self.receiver = receiver
        self.deliver: Deliver | None = None
        self.last = 0.0
        self.held: list[Any] = []

    def send(self, message: Any) -> None:
        """Put a message on its way; nothing happens if the connection is gone."""
        connection = self.connection
        if not connection.open or not self.sender.alive:
            return
        network = connection.network
        blocked = network.blocked.get((self.sender.name, self.receiver.name))
        if blocked is not None:
            if blocked == Blocked.HELD or connection.reliable:
                self.held.append(message)
            else:
                network.lost += 1
            return
        carried = None
        if not connection.reliable and network.trouble is not None:
            carried = network.trouble.carry(self, message)
        if carried is None:
            self._arrive_in(LATENCY_S + network.delay_of(self), message, True)
            return
        for delay, copy, ordered in carried:
            self._arrive_in(LATENCY_S + delay, copy, ordered)

    def _arrive_in(self, delay: float, message: Any, ordered: bool) -> None:
        time = self.connection.network.time
        when = time.now + delay
        if ordered:
            when = max(when, self.last + ORDER_S)
            self.last = when
        time.at(when, lambda: self.receiver.do(lambda: self._hand_over(message)))

    def _hand_over(self, message: Any) -> None:
        if self.connection.open and self.deliver is not None:
            self.deliver(message)

    def release(self) -> None:
        """The path is open again: what was held goes on, in order."""
        held, self.held = self.held, []
        for message in held:
            self._arrive_in(LATENCY_S, message, True)


class Connection:
    """A connection that stands (``open``) until one end closes it or a fault cuts it."""

    __slots__ = (
        "client",
        "down",
        "network",
        "on_client_closed",
        "on_server_closed",
        "open",
        "reliable",
        "server",
        "up",
    )

    def __init__(
        self, network: Network, client: Process, server: Process, *, reliable: bool
    ) -> None:
        self.network = network
        self.client = client
        self.server = server
        self.reliable = reliable
        self.open = True
        self.up = Pipe(self, client, server)
        self.down = Pipe(self, server, client)
        self.on_client_closed: Closed | None = None
        self.on_server_closed: Closed | None = None

    def cut(self, error: MeshError, *, tell: str = "both") -> None:
        """End it. ``tell``: which end learns of it (``client``, ``server``, ``both``,
        ``nobody``)."""
        if not self.open:
            return
        self.open = False
        self.network.connections.pop(self, None)
        if tell in ("client", "both"):
            self._notify(self.client, self.server, self.on_client_closed, error)
        if tell in ("server", "both"):
            self._notify(self.server, self.client, self.on_server_closed, error)

    def _notify(
        self, end: Process, other: Process, closed: Closed | None, error: MeshError
    ) -> None:
        if closed is None or not end.alive:
            return
        told = closed
        if (other.name, end.name) in self.network.blocked:
            self.network.untold.append((other.name, end.name, lambda: told(error), end))
            return
        end.after(LATENCY_S, lambda: told(error))


@dataclass(slots=True)
class Host:
    """Something that listens at an address."""

    process: Process
    accept: Callable[[Connection, Any], None]


@dataclass(slots=True)
class Network:
    """See the module. Addresses are process names, with a suffix for the service."""

    time: VirtualTime
    trouble: Trouble | None = None
    hosts: dict[str, Host] = field(default_factory=dict)
    blocked: dict[tuple[str, str], str] = field(default_factory=dict)
    slow: dict[tuple[str, str], float] = field(default_factory=dict)
    """Extra seconds per message on a path."""
    connections: dict[Connection, None] = field(default_factory=dict)
    """Those that stand, in the order they were made."""
    untold: list[tuple[str, str, Callable[[], None], Process]] = field(default_factory=list)
    lost: int = 0

    def listen(self, address: str, process: Process, accept: Callable[..., None]) -> None:
        """Take connections at ``address``; a newer process replaces an older one."""
        host = Host(process, accept)
        self.hosts[address] = host

    def dial(
        self,
        client: Process,
        address: str,
        opening: Any,
        on_refused: Closed,
        *,
        reliable: bool = False,
    ) -> Connection | None:
        """Connect and hand over ``opening``. None: the path is blocked, nothing will be heard."""
        host = self.hosts.get(address)
        server = host.process if host is not None else client
        if (client.name, server.name) in self.blocked:
            return None
        if host is None or not server.alive:
            refused = StageUnreachable("connection refused", address=address)
            client.after(2 * LATENCY_S, lambda: on_refused(refused))
            return None
        connection = Connection(self, client, server, reliable=reliable)
        self.connections[connection] = None
        accept = host.accept

        def arrive() -> None:
            if connection.open:
                accept(connection, opening)

        delay = LATENCY_S + self.delay_of(connection.up)
        self.time.after(delay, lambda: server.do(arrive))
        return connection

    def delay_of(self, pipe: Pipe) -> float:
        """Extra seconds on this path."""
        if not self.slow:
            return 0.0
        return self.slow.get((pipe.sender.name, pipe.receiver.name), 0.0)

    def block(self, sender: str, receiver: str, how: str) -> None:
        """Messages from ``sender`` to ``receiver`` no longer arrive."""
        self.blocked[sender, receiver] = how

    def heal(self) -> None:
        """Every path is open again."""
        self.blocked.clear()
        self.slow.clear()
        for connection in list(self.connections):
            connection.up.release()
            connection.down.release()
        untold, self.untold = self.untold, []
        for _, _, tell, end in untold:
            end.after(LATENCY_S, tell)

    def unblock(self, sender: str, receiver: str) -> None:
        """This path is open again."""
        self.blocked.pop((sender, receiver), None)
        for connection in list(self.connections):
            for pipe in (connection.up, connection.down):
                if (pipe.sender.name, pipe.receiver.name) == (sender, receiver):
                    pipe.release()
        told = [one for one in self.untold if (one[0], one[1]) == (sender, receiver)]
        self.untold = [one for one in self.untold if one not in told]
        for _, _, tell, end in told:
            end.after(LATENCY_S, tell)

    def reset_all_of(self, process: Process, *, silent: bool = False) -> None:
        """A process is gone: its kernel resets every connection, unless its machine is gone too."""
        for connection in list(self.connections):
            if process in (connection.client, connection.server):
                tell = "server" if connection.client is process else "client"
                error = StageUnreachable("connection reset", address=process.name)
                connection.cut(error, tell="nobody" if silent else tell)
