"""The coordinator process in memory: the real ``Mesh`` and the real ``MeshDriver``, on virtual
time.

Only the clock, the timer and the ports are replaced. Behind every event the machine's own
invariants are checked, and the referee sees the event with its instructions. A coordinator process
can be stopped and continued like any other: what arrives meanwhile waits, and its timer is late.
It can be killed, too. The next one is another object that starts from what is on the disk, and its
clients ask it for the rest (``serve``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from coordinator import instructions as do
from coordinator.core import Mesh
from coordinator.driver import MeshDriver
from coordinator.events import (
    CancelRequested,
    Event,
    FrameReturned,
    HopFaultSeen,
    LinkBroken,
    LinkOpened,
    StopMatched,
    TimePassed,
)
from coordinator.settings import MeshPolicy
from coordinator.simulation.archive import Disk, Record, VirtualJournal, unknown
from coordinator.simulation.clients import Client
from coordinator.simulation.context import CONTROL_ADDRESS, COORDINATOR_NAME, HOP_ADDRESS, Context
from coordinator.simulation.endpoint import SimServicer
from coordinator.simulation.link import Opening, SimLink
from coordinator.simulation.seats import Seats
from coordinator.simulation.virtual import Process, Timer
from coordinator.simulation.watch import Watch
from stagemesh.errors import MeshError
from stagemesh.frame import StepFrame
from stagemesh.topology import COORDINATOR_HOP, Route, WorkerName
from stagemesh.transport import HopFault


class WatchedMesh(Mesh):
    """The machine, with its invariants checked behind every event."""

    watch: Watch

    def handle(self, event: Event, now: float) -> list[do.Instruction]:
        instructions = super().handle(event, now)
        self.watch.handled(event, instructions)
        self.watch.barriers(event, self.state.barriers.forming)
        self.check()
        return instructions


class VirtualDriver(MeshDriver):
    """The driver, with its one timer on virtual time."""

    process: Process
    woken: Callable[[], None]
    _wake: Timer | None = None

    def _wake_at(self, when: float) -> None:
        if self._wake is not None:
            self._wake.cancel()
        self._wake = self.process.after(max(when - self.clock(), 0.0), self.woken)


class SimLinks:
    """``coordinator.ports.RouteLinks``, as ``services.route_links`` does it."""

    def __init__(self, shell: Coordinator, context: Context) -> None:
        self._shell = shell
        self._context = context
        self.servicer = SimServicer(shell.process, context.limits, self.fault_seen, context.watch)
        self.links: dict[int, SimLink] = {}

    def expect(self, route: Route) -> None:
        """Accept the last stage's link of this route from now on."""
        last = route.stage_count - 1
        fingerprint = route.fingerprint8
        self.servicer.expect(route.epoch, last, COORDINATOR_HOP, fingerprint, self._returned)

    def open(self, route: Route) -> None:
        epoch, first, context = route.epoch, route.workers[0], self._context
        link = SimLink(
            self._shell.process,
            context.network,
            first.address,
            Opening(epoch, COORDINATOR_HOP, 0, route.fingerprint8, COORDINATOR_NAME),
            peer=first.name,
            limits=context.limits,
            counters=self.servicer.counters,
            prng=context.prng.fork(),
            on_fault=self.fault_seen,
            on_opened=lambda: self._shell.feed(LinkOpened(epoch)),
            on_broken=lambda error: self._broken(epoch, error),
            watch=context.watch,
        )
        self.links[epoch] = link
        link.open()

    def send(self, frame: StepFrame) -> None:
        link = self.links.get(frame.epoch)
        if link is None:
            return
        try:
            link.send(frame)
        except MeshError as error:
            self._broken(frame.epoch, error)

    def close(self, epoch: int) -> None:
        self.servicer.retire(epoch)
        link = self.links.pop(epoch, None)
        if link is not None:
            link.close()

    def fault_seen(self, fault: HopFault) -> None:
        """A fault at one of the coordinator's own ends."""
        self._shell.feed(
            HopFaultSeen(
                WorkerName(COORDINATOR_NAME),
                fault.epoch,
                fault.step,
                fault.hop_from,
                fault.hop_to,
                fault.reason,
                fault.detail,
                fault.fatal,
            )
        )

    def _returned(self, frame: StepFrame) -> bool:
        self._shell.feed(FrameReturned(frame))
        return True

    def _broken(self, epoch: int, error: MeshError) -> None:
        if epoch in self.links:
            self._shell.feed(LinkBroken(epoch, error.reason, str(error)))


class Coordinator:
    """See the module. ``published`` counts event types."""

    def __init__(
        self, context: Context, policy: MeshPolicy, disk: Disk, commit_s: float = 0.0
    ) -> None:
        self.context = context
        self.disk = disk
        self.process = Process(COORDINATOR_NAME, context.time)
        self.links = SimLinks(self, context)
        self.seats = Seats(self.feed, self._expect)
        self.records: dict[bytes, Record] = {}
        self.published: dict[str, int] = {}
        self.behind_event: Callable[[], None] = lambda: None
        self.mesh = WatchedMesh(policy, first_epoch=disk.first_epoch())
        self.mesh.watch = context.watch
        self.journal = VirtualJournal(
            self.process, disk, commit_s, feed=self.feed, label=self._weights
        )
        self.driver = VirtualDriver(
            self.mesh,
            control=self.seats,
            links=self.links,
            events=self,
            journal=self.journal,
            clock=lambda: context.time.now,
        )
        self.driver.process = self.process
        self.driver.woken = lambda: self.feed(TimePassed())
        network = context.network
        self.process.at_death.append(lambda: network.reset_all_of(self.process))
        network.listen(HOP_ADDRESS, self.process, self.links.servicer.exchange)
        network.listen(CONTROL_ADDRESS, self.process, self.seats.accept)
        self._revive()

    def _expect(self, route: Route) -> None:
        self.links.expect(route)
        self.journal.epoch_used(route.epoch)

    def _weights(self) -> str:
        model = self.mesh.state.model
        return model.label if model is not None else ""

    def _revive(self) -> None:
        """Go on with what an earlier coordinator has left unfinished."""
        for kept in list(self.disk.kept.values()):
            if not kept.ended:
                self._submit(Record.restored(kept))

    def feed(self, event: Event) -> None:
        """An event from a peer; a defect that it meets is a violation."""
        if not self.process.alive:
            return
        try:
            self.driver.feed(event)
        except Exception as error:  # noqa: BLE001 - whatever it raises is what is looked for
            self.context.watch.crashed(type(event).__name__, error)
        self.behind_event()

    def serve(self, client: Client) -> None:
        """A client asks, or comes back for the rest of its answer."""
        record = self.records.get(client.key)
        kept = self.disk.kept.get(client.key)
        if record is None and kept is not None and kept.ended:
            record = self.records[client.key] = Record.restored(kept)
        if record is not None and record.failure is not None:
            self._take_up(record, record.failure, client)
        elif record is not None:
            record.attach(client)
        elif len(client.tokens) > len(client.demand.accepted):
            unknown(client, lost=self.disk.lost)
        else:
            self._submit(Record.of(client.demand), client)
        if client.end is not None:
            return
        if client.cancelled and client.cancel_after is None:
            self.feed(CancelRequested(client.key))
        elif client.stopped:
            self.feed(StopMatched(client.key, client.stop_kept, "stop"))

    def _take_up(self, record: Record, failure: do.FailRequest, client: Client) -> None:
        """As ``services.generation_service`` does: an answer that failed is gone on with."""
        is_kept = client.key in self.disk.kept
        if len(record.ids) > record.base and not is_kept:
            unknown(client, lost=self.disk.lost)
            return
        record.reopen(failure, anew=not is_kept)
        record.attach(client)
        self._submit(record, client)

    def _submit(self, record: Record, client: Client | None = None) -> None:
        key = record.demand.request
        self.records[key] = record
        record.client = client
        record.demand = replace(record.demand, verified=record.verified_through)
        try:
            self.driver.submit(record.demand, record)
        except Exception as error:  # noqa: BLE001 - as above
            self.context.watch.crashed("submit", error)
        self.behind_event()

    def publish(self, event: do.PublishEvent) -> None:
        """``coordinator.ports.EventPublisher``."""
        self.published[event.type] = self.published.get(event.type, 0) + 1
