"""The control stream in memory, both ends.

``ControlStream`` follows ``services.control_stream``: dial, register, again for ever with full
jitter; what is said while nobody listens is dropped; a process whose place was taken by another one
ends. ``Seats`` follows ``services.worker_service`` and is the mesh's ``WorkerControl`` port: one
seat per worker name, a successor takes it over, a replaced instance is never let in again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from coordinator import instructions as do
from coordinator.events import (
    CommandFinished,
    Event,
    WorkerLost,
    WorkerProgressed,
    WorkerRegistered,
)
from coordinator.simulation.network import Connection, Network
from coordinator.simulation.prng import Prng
from coordinator.simulation.virtual import Process
from stagemesh.errors import EpochFenced, MeshError, RouteRefused, StageUnreachable
from stagemesh.topology import Route, WorkerInfo, WorkerName

CONTROL_ADDRESS = "coordinator:control"
WAIT_S_INITIAL = 0.1
WAIT_S_MAX = 3.0
REGISTER_TIMEOUT_S = 10.0


class ControlStream:
    """The worker's end."""

    def __init__(
        self,
        process: Process,
        network: Network,
        prng: Prng,
        info: WorkerInfo,
        on_command: Callable[[object], None],
        on_lost: Callable[[], None],
    ) -> None:
        self.info = info
        self.connected = False
        self.connection: Connection | None = None
        self._process, self._network, self._prng = process, network, prng
        self._on_command, self._on_lost = on_command, on_lost
        self._attempts = 0
        self._number = 0

    def dial(self) -> None:
        """One attempt to register."""
        if self.connection is not None:
            self.connection.cut(StageUnreachable("dialled again"), tell="server")
            self.connection = None
        self._number += 1
        self._attempts += 1
        number = self._number
        self._process.after(REGISTER_TIMEOUT_S, lambda: self._late(number))
        connection = self._network.dial(
            self._process,
            CONTROL_ADDRESS,
            self.info,
            lambda error: self._failed(error, number),
            reliable=True,
        )
        self.connection = connection
        if connection is None:
            return
        connection.down.deliver = lambda message: self._received(connection, message)
        connection.on_client_closed = lambda error: self._ended(connection, error, number)

    def send(self, event: Event) -> None:
        """Say something; nobody hears it while there is no coordinator."""
        if self.connected and self.connection is not None:
            self.connection.up.send(event)

    def _received(self, connection: Connection, message: object) -> None:
        if self.connection is not connection:
            return
        if not self.connected:
            self.connected = True
            self._attempts = 0
            return
        self._on_command(message)

    def _late(self, number: int) -> None:
        if number == self._number and not self.connected:
            self._failed(StageUnreachable("the coordinator does not answer"), number)

    def _ended(self, connection: Connection, error: MeshError, number: int) -> None:
        if self.connection is not connection:
            return
        if not self.connected:
            self._failed(error, number)
            return
        self.connected = False
        self.connection = None
        self._on_lost()
        self._again()

    def _failed(self, error: MeshError, number: int) -> None:
        if number != self._number or self.connected:
            return
        if isinstance(error, EpochFenced):
            self._process.kill()
            return
        self._again()

    def _again(self) -> None:
        self._number += 1
        bound = min(WAIT_S_MAX, WAIT_S_INITIAL * 2.0 ** min(self._attempts, 16))
        self._process.after(self._prng.random() * bound, self.dial)


@dataclass(slots=True)
class Seat:
    """A registered worker's place."""

    worker: WorkerInfo
    connection: Connection
    ended: bool = False

    def end(self, error: MeshError) -> None:
        if not self.ended:
            self.ended = True
            self.connection.cut(error, tell="client")


@dataclass(slots=True)
class Seats:
    """The coordinator's end. ``on_route`` hears of a route before its workers do."""

    feed: Callable[[Event], None]
    on_route: Callable[[Route], None]
    seats: dict[WorkerName, Seat] = field(default_factory=dict)
    replaced: set[str] = field(default_factory=set)

    def accept(self, connection: Connection, info: WorkerInfo) -> None:
        """A worker dials in."""
        if info.instance in self.replaced:
            connection.cut(EpochFenced("this process has been replaced"), tell="client")
            return
        sitting = self.seats.get(info.name)
        if sitting is not None:
            if sitting.worker.instance != info.instance:
                self.replaced.add(sitting.worker.instance)
            sitting.end(EpochFenced("replaced", worker=info.name))
        seat = Seat(info, connection)
        self.seats[info.name] = seat
        connection.up.deliver = lambda message: self._take(seat, message)
        connection.on_server_closed = lambda error: self._leave(seat, error.message)
        self.feed(WorkerRegistered(info))

    def _leave(self, seat: Seat, reason: str) -> None:
        seat.ended = True
        name = seat.worker.name
        if self.seats.get(name) is seat:
            del self.seats[name]
            self.feed(WorkerLost(name, seat.worker.instance, reason))

    def _take(self, seat: Seat, event: Any) -> None:
        if seat.ended:
            return
        if isinstance(event, CommandFinished) and event.info is not None:
            seat.worker = event.info
        if isinstance(event, WorkerProgressed):
            self.feed(event)
            return
        self.feed(event)

    # coordinator.ports.WorkerControl

    def open_route(self, instruction: do.OpenRoute) -> None:
        self.on_route(instruction.route)
        for name in instruction.route.names:
            self._command(name, instruction)

    def fence(self, workers: Sequence[WorkerName], epoch: int) -> None:
        for name in workers:
            self._command(name, do.FenceEpoch((name,), epoch))

    def drain(self, order: do.DrainWorker) -> None:
        self._command(order.worker, order)

    def reinitialise(self, worker: WorkerName, reason: str, command_id: str) -> None:
        self._command(worker, do.ReinitialiseWorker(worker, reason, command_id))

    def announce_barrier(self, outcome: do.AnnounceBarrier) -> None:
        for name in outcome.participants:
            self._command(name, outcome)

    def meet(self, verdict: do.MeetWorker) -> None:
        seat = self.seats.get(verdict.worker.name)
        if seat is None or seat.worker.instance != verdict.worker.instance:
            return
        if not verdict.admitted:
            self._dismiss(seat, verdict)
            return
        self._command(verdict.worker.name, verdict)

    def _dismiss(self, seat: Seat, verdict: do.MeetWorker) -> None:
        """Ending the stream is noticed by its own end, too: the place is free again."""
        seat.end(RouteRefused(verdict.reason, worker=verdict.worker.name))
        self._leave(seat, verdict.reason)

    def _command(self, name: WorkerName, command: object) -> None:
        seat = self.seats.get(name)
        if seat is not None and not seat.ended:
            seat.connection.down.send(command)
