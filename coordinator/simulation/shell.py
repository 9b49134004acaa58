"""The coordinator process in memory: the real ``Mesh`` and the real ``MeshDriver``, on virtual
time.

Only the clock, the timer and the ports are replaced. Behind every event the machine's own
invariants are checked, and the referee sees the event with its instructions. A coordinator process
can be stopped and continued like any other: what arrives meanwhile waits, and its timer is late.
"""

from __future__ import annotations

from collections.abc import Callable

from coordinator import instructions as do
from coordinator.core import Mesh
from coordinator.driver import MeshDriver
from coordinator.events import (
    Event,
    FrameReturned,
    GenerationRequested,
    HopFaultSeen,
    LinkBroken,
    LinkOpened,
    TimePassed,
)
from coordinator.ports import TokenSink
from coordinator.settings import MeshPolicy
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

    def __init__(self, context: Context, policy: MeshPolicy) -> None:
        self.context = context
        self.process = Process(COORDINATOR_NAME, context.time)
        self.links = SimLinks(self, context)
        self.seats = Seats(self.feed, self.links.expect)
        self.published: dict[str, int] = {}
        self.behind_event: Callable[[], None] = lambda: None
        self.mesh = WatchedMesh(policy)
        self.mesh.watch = context.watch
        self.driver = VirtualDriver(
            self.mesh,
            control=self.seats,
            links=self.links,
            events=self,
            clock=lambda: context.time.now,
        )
        self.driver.process = self.process
        self.driver.woken = lambda: self.feed(TimePassed())
        network = context.network
        network.listen(HOP_ADDRESS, self.process, self.links.servicer.exchange)
        network.listen(CONTROL_ADDRESS, self.process, self.seats.accept)

    def feed(self, event: Event) -> None:
        """An event from a peer; a defect that it meets is a violation."""
        try:
            self.driver.feed(event)
        except Exception as error:  # noqa: BLE001 - whatever it raises is what is looked for
            self.context.watch.crashed(type(event).__name__, error)
        self.behind_event()

    def submit(self, demand: GenerationRequested, client: TokenSink) -> None:
        """A client's request."""
        try:
            self.driver.submit(demand, client)
        except Exception as error:  # noqa: BLE001 - as above
            self.context.watch.crashed("submit", error)
        self.behind_event()

    def publish(self, event: do.PublishEvent) -> None:
        """``coordinator.ports.EventPublisher``."""
        self.published[event.type] = self.published.get(event.type, 0) + 1
