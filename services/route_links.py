"""The coordinator's own two hops of every route: predecessor of stage 0, successor of the last
stage.

Implements ``coordinator.ports.RouteLinks``. The receiving end is expected when a route is *ordered*
(``expect``), because the last stage dials in before it arrives at the barrier; the sending end is
dialled when the barrier is complete (``open``). Frames that come back become FrameReturned, links
that come up or are given up become LinkOpened and LinkBroken, and every fault a receiver or sender
sees becomes HopFaultSeen.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from coordinator.events import Event, FrameReturned, HopFaultSeen, LinkBroken, LinkOpened
from services.channel import COORDINATOR_NAME, open_channel
from services.credentials import TlsFiles
from services.stage_link import StageLink
from services.stage_service import StageServicer
from stagemesh.errors import MeshError
from stagemesh.frame import StepFrame
from stagemesh.topology import COORDINATOR_HOP, Route, WorkerName
from stagemesh.transport import HopFault

_log = logging.getLogger(__name__)


class RouteLinks:
    """See the module. Belongs to one event loop; no method waits.

    ``servicer`` is the process's StageService; its faults are given to ``fault_seen``.
    """

    def __init__(
        self,
        feed: Callable[[Event], None],
        servicer: StageServicer,
        *,
        tls: TlsFiles | None = None,
    ) -> None:
        self._feed = feed
        self._servicer = servicer
        self._tls = tls
        self._links: dict[int, StageLink] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def expect(self, route: Route) -> None:
        """Accept the last stage's link of this route from now on."""
        self._servicer.expect(
            route.epoch,
            route.stage_count - 1,
            COORDINATOR_HOP,
            route.fingerprint8,
            self._returned,
        )

    def open(self, route: Route) -> None:
        """Dial stage 0; LinkOpened or LinkBroken follows."""
        epoch, first = route.epoch, route.workers[0]
        link = StageLink(
            first.address,
            lambda address: open_channel(address, tls=self._tls, peer=first.name),
            epoch=epoch,
            hop_from=COORDINATOR_HOP,
            hop_to=0,
            fingerprint=route.fingerprint8,
            worker_name=COORDINATOR_NAME,
            peer=first.name,
            counters=self._servicer.counters,
            on_fault=self.fault_seen,
            on_opened=lambda: self._feed(LinkOpened(epoch)),
            on_broken=lambda error: self._broken(epoch, error),
        )
        self._links[epoch] = link
        link.open()

    def send(self, frame: StepFrame) -> None:
        """Seal, ledger and transmit; a link that cannot take the frame is broken."""
        link = self._links.get(frame.epoch)
        if link is None:
            return  # Closed meanwhile: the core knows, or is about to.
        try:
            link.send(frame)
        except MeshError as error:
            self._broken(frame.epoch, error)

    def close(self, epoch: int) -> None:
        """Forget both ends of an epoch."""
        self._servicer.retire(epoch)
        link = self._links.pop(epoch, None)
        if link is not None:
            task = asyncio.create_task(link.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close_all(self) -> None:
        """Close every link and wait for it."""
        for epoch in list(self._links):
            self.close(epoch)
        await asyncio.gather(*self._closing, return_exceptions=True)

    def fault_seen(self, fault: HopFault) -> None:
        """A fault at one of the coordinator's own ends."""
        self._feed(
            HopFaultSeen(
                worker=WorkerName(COORDINATOR_NAME),
                epoch=fault.epoch,
                step=fault.step,
                hop_from=fault.hop_from,
                hop_to=fault.hop_to,
                reason=fault.reason,
                detail=fault.detail,
                fatal=fault.fatal,
            )
        )

    def _returned(self, frame: StepFrame) -> None:
        self._feed(FrameReturned(frame))

    def _broken(self, epoch: int, error: MeshError) -> None:
        if epoch in self._links:
            _log.warning("link to stage 0 of epoch %d is broken: %s", epoch, error)
            self._feed(LinkBroken(epoch, error.reason, str(error)))
