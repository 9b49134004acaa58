"""The coordinator as one process: the pure machine, its driver, and every service around them.

    GenerationService ─┐                    ┌─ WorkerService   (control streams of all workers)
    AdminService ──────┼─▶ MeshDriver(Mesh) ┼─ RouteLinks      (first hop out)
    EventService ──────┘                    └─ StageService    (last hop back)

Everything runs on one event loop. ``GenerationService``'s health says whether the mesh makes
tokens, not whether this process is up: it follows the routes. The end comes in order: nothing new
is admitted, what runs has ``drain_s`` seconds, then links and servers close and telemetry is
flushed.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from coordinator.core import Mesh
from coordinator.driver import MeshDriver
from coordinator.events import DrainAllRequested, Event
from coordinator.instructions import PublishEvent
from coordinator.mesh_state import DIAGNOSTICS
from coordinator.settings import MeshPolicy
from coordinator.topics import TopicRouter
from services.admin_service import AdminService
from services.answer_book import AnswerBook
from services.collector import collect_when_quiet
from services.event_service import EventHub, EventService
from services.generation_service import GenerationService
from services.journal import Journal
from services.journal_store import JournalStore
from services.lifecycle import StopSignal
from services.mesh_report import CHUNK_FACT
from services.metrics import on_loop
from services.process_options import write_ready_file
from services.request_reader import EdgeLimits
from services.route_links import RouteLinks
from services.server import MeshServer, ServerOptions
from services.stage_service import StageServicer, add_stage_servicer
from services.telemetry import Telemetry
from services.tokenizer import ServedModel
from services.worker_service import WorkerService
from stagemesh.topology import Route
from stagemesh.v1 import (
    admin_service_pb2_grpc,
    event_service_pb2_grpc,
    generation_service_pb2_grpc,
    worker_service_pb2_grpc,
)

GENERATION_SERVICE = "stagemesh.v1.GenerationService"
LEAVE_GRACE_S = 0.5
"""What answers that have ended get to reach their clients."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CoordinatorOptions:
    """What one coordinator is. ``admin``: None serves admin calls beside the others. ``advertise``:
    the address last stages dial, if another than where it listens."""

    server: ServerOptions
    limits: EdgeLimits
    policy: MeshPolicy
    admin: ServerOptions | None = None
    advertise: str = ""
    answers_kept_max: int = 1000
    drain_s: float = 30.0


class CoordinatorProcess:
    """See the module. Belongs to one event loop; ``run`` is its whole life."""

    def __init__(
        self,
        options: CoordinatorOptions,
        model: ServedModel,
        telemetry: Telemetry,
        *,
        environment: Mapping[str, str] | None = None,
        journal: JournalStore | None = None,
    ) -> None:
        self._options = options
        self._telemetry = telemetry
        tls = options.server.tls
        self.server = MeshServer(options.server, observer=telemetry.rpc)
        own_admin = options.admin is not None
        self.admin_server = (
            MeshServer(options.admin, observer=telemetry.rpc)
            if options.admin is not None
            else self.server
        )
        self._servers = [self.server, self.admin_server] if own_admin else [self.server]
        self.workers = WorkerService(
            self._feed,
            address=lambda: options.advertise or self.server.address,
            epoch=lambda: self.mesh.state.next_epoch - 1,
            on_route=self._expect,
            on_telemetry=telemetry.received,
        )
        policy = dataclasses.replace(
            options.policy, vocab_size=model.vocab_size, context_tokens_max=model.context_length
        )
        # Above every epoch of an earlier coordinator, whose workers may still be there.
        first_epoch = journal.first_epoch if journal is not None else max(1, int(time.time()))
        self.mesh = Mesh(policy, first_epoch=first_epoch)
        # One set of counters: what its own hops and topics count is the coordinator's, too.
        counters = self.mesh.state.counters
        servicer = StageServicer(
            counters=counters, on_fault=lambda fault: self.links.fault_seen(fault)
        )
        self.links = RouteLinks(self._feed, servicer, tls=tls)
        self.events = EventHub(TopicRouter(counters=counters), on_event=self._event_published)
        self.journal = self._journal(journal)
        self.driver = MeshDriver(
            self.mesh,
            control=self.workers,
            links=self.links,
            events=self.events,
            observer=telemetry.requests,
            journal=self.journal,
        )
        book = AnswerBook(ended_max=options.answers_kept_max)
        self.generation = GenerationService(
            driver=self.driver,
            model=model,
            book=book,
            limits=options.limits,
            fingerprint=self._fingerprint,
            ready=self._is_ready,
            observer=telemetry.requests,
            stored=self.journal,
            counters=counters,
        )
        admin = AdminService(
            driver=self.driver,
            book=book,
            describe=self.workers.proto_of,
            traces=telemetry.traces_of,
            environment={CHUNK_FACT: str(policy.prefill_chunk_tokens)} | dict(environment or {}),
            facts=self.journal.facts if self.journal else dict,
        )
        self._register(self.generation, admin, servicer)

    def _journal(self, store: JournalStore | None) -> Journal | None:
        if store is None:
            return None
        return Journal(
            store,
            feed=self._feed,
            fingerprint=self._weights,
            on_change=self._journal_changed,
        )

    def _register(
        self, generation: GenerationService, admin: AdminService, stage: StageServicer
    ) -> None:
        """Every service of this process, in one place."""
        main, side = self.server, self.admin_server
        main.add(generation_service_pb2_grpc.add_GenerationServiceServicer_to_server, generation)
        main.add(worker_service_pb2_grpc.add_WorkerServiceServicer_to_server, self.workers)
        main.add(add_stage_servicer, stage)
        side.add(admin_service_pb2_grpc.add_AdminServiceServicer_to_server, admin)
        side.add(
            event_service_pb2_grpc.add_EventServiceServicer_to_server, EventService(self.events)
        )

    # -- life -----------------------------------------------------------------------------------

    def _measure(self) -> None:
        """Numbers that the mesh keeps, for whoever collects metrics."""
        loop, look = asyncio.get_running_loop(), self.driver.snapshot

        def guards() -> dict[str, dict[str, int]]:
            seen = look()
            return {view.info.name: view.counters for view in seen.workers} | {
                "coordinator": seen.counters
            }

        def cached() -> dict[str, tuple[int, int]]:
            views = look().workers
            return {one.info.name: (one.kv_tokens, one.info.kv_budget_tokens) for one in views}

        def requests() -> dict[str, int]:
            seen = look()
            return {"running": seen.running, "queued": seen.queued}

        def lags() -> list[int]:
            return [
                one.completion_tokens - one.verified_through
                for one in look().generations
                if one.is_verifying and one.ended_s_ago is None
            ]

        self._telemetry.metrics.observe_guards(on_loop(loop, guards))
        self._telemetry.metrics.observe_kv(on_loop(loop, cached))
        self._telemetry.metrics.observe_requests(on_loop(loop, requests))
        self._telemetry.metrics.observe_lag(on_loop(loop, lags))

    async def run(self, stop: StopSignal, *, ready_file: Path | None = None) -> None:
        """Serve until ``stop`` is set. Raises InvalidConfiguration if it cannot listen."""
        self._measure()
        await self._revive()
        for server in self._servers:
            await server.start()
            server.set_serving(serving=True)
        self._refresh_health()
        if ready_file is not None:
            await asyncio.to_thread(write_ready_file, ready_file, self._addresses())
        collecting = asyncio.create_task(collect_when_quiet(lambda: not self.mesh.state.sessions))
        try:
            reason = await stop.wait()
        finally:
            collecting.cancel()
        _log.info("stopping: %s", reason)
        await self._end(orphaned=stop.orphaned)

    async def _revive(self) -> None:
        """Go on with what an earlier coordinator has left unfinished."""
        if self.journal is None:
            return
        self.journal.start()
        unfinished = await asyncio.to_thread(self.journal.store.unfinished)
        for stored in unfinished:
            # In a context of its own: log lines that name the request must end with it.
            contextvars.copy_context().run(self.generation.revive, stored)
        if unfinished:
            _log.warning("going on with %d generations from the journal", len(unfinished))

    async def _end(self, *, orphaned: bool) -> None:
        grace_s = 0.0 if orphaned else self._options.drain_s
        for server in self._servers:
            server.health.enter_graceful_shutdown()
        self.driver.feed(DrainAllRequested(grace_s))
        for server in self._servers:
            await server.drain(grace_s + LEAVE_GRACE_S)
        await self.links.close_all()
        self.driver.close()
        if self.journal is not None:
            await self.journal.close()
        await self._telemetry.drain()

    def _addresses(self) -> dict[str, object]:
        return {
            "address": self.server.address,
            "admin_address": self.admin_server.address,
            "pids": {"coordinator": os.getpid()},
        }

    # -- what the parts ask of each other -------------------------------------------------------

    def _feed(self, event: Event) -> None:
        """An event from a peer. A defect that one event meets must not take its messenger along."""
        try:
            self.driver.feed(event)
        except Exception:  # noqa: BLE001 - streams that carry events must outlive it
            extra = {"request": getattr(event, "request", b"")}
            _log.exception("handling %s failed", type(event).__name__, extra=extra)

    def _expect(self, route: Route) -> None:
        self.links.expect(route)
        if self.journal is not None:
            self.journal.epoch_used(route.epoch)

    def _is_ready(self) -> bool:
        return not self.mesh.requests.why_not_ready()

    def _fingerprint(self) -> str:
        return self.mesh.state.model.fingerprint if self.mesh.state.model else ""

    def _weights(self) -> str:
        return self.mesh.state.model.label if self.mesh.state.model else ""

    def _journal_changed(self, trouble: str) -> None:
        """The journal failed, or works again."""
        facts = {"detail": trouble} if trouble else {}
        name = "JournalFailed" if trouble else "JournalRecovered"
        self.events.publish(PublishEvent(DIAGNOSTICS, name, attributes=facts))

    def _event_published(self, event: PublishEvent) -> None:
        """Routes open and close on the membership and recovery topics: health follows them. What a
        guard stopped is put on the spans concerned."""
        self._telemetry.requests.event_published(event)
        if event.topic in ("membership", "recovery"):
            asyncio.get_running_loop().call_soon(self._refresh_health)

    def _refresh_health(self) -> None:
        ready = self._is_ready()
        self.server.health.set(GENERATION_SERVICE, serving=ready)
        self.server.health.set("", serving=ready)
