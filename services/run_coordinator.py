"""Composition root of ``stagemesh coordinator``."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from pathlib import Path

import grpc

from coordinator.events import Delivery, Verification
from coordinator.settings import FallbackPolicy, MeshPolicy
from services import logs
from services.collector import calm_collector
from services.coordinator_process import CoordinatorOptions, CoordinatorProcess
from services.journal_contents import JournalLimits
from services.journal_store import JournalStore
from services.lifecycle import StopSignal
from services.mesh_report import SETTING
from services.process_options import environment_of, server_options_of
from services.request_reader import EdgeLimits
from services.setting_fields import JOURNAL_AUTO, JOURNAL_NONE, ProcessSettings
from services.settings import Settings
from services.telemetry import Role, TraceStore, start_telemetry
from services.tokenizer import ServedModel, load_served_model, model_identity
from stage_worker import model_source
from stage_worker.weights import home_directory

_log = logging.getLogger(__name__)


def main(settings: Settings) -> int:
    """Run until told to stop; the exit status. Raises MeshError for what a user has to put
    right.
    """
    logs.configure(
        level=settings.process.log_level,
        log_format=settings.process.log_format,
        service="coordinator",
    )
    asyncio.run(serve(settings))
    return 0


async def serve(settings: Settings) -> None:
    """The coordinator's whole life."""
    mesh, process = settings.mesh, settings.process
    stop = StopSignal()
    stop.listen_to_signals()
    stop.follow_parent(process.parent_pipe)
    options = options_of(settings)
    options.server.check()
    resolved = await asyncio.to_thread(model_source.resolve, mesh.model)
    model = await asyncio.to_thread(load_served_model, resolved.directory, resolved.name)
    await asyncio.to_thread(model.tokenizer.detokenizer)  # its table takes a second, once
    role = Role("coordinator", instance=uuid.uuid4().hex)
    telemetry = start_telemetry(role, store=TraceStore())
    told = {f"{SETTING}{name}": value for name, value in settings.told().items()}
    about = {"grpcio": grpc.__version__, "model": model.name, "dtype": mesh.dtype}
    facts = environment_of(about | told)
    journal = await asyncio.to_thread(open_journal, process, model)
    coordinator = CoordinatorProcess(options, model, telemetry, environment=facts, journal=journal)
    ready_file = Path(process.ready_file) if process.ready_file else None
    calm_collector()
    await coordinator.run(stop, ready_file=ready_file)


def journal_path(process: ProcessSettings, identity: str) -> Path | None:
    """Where the journal of a model is; None: there is none.

    Left to itself a coordinator finds its journal again by the address it listens on, so that one
    without a fixed port has none.
    """
    if process.journal == JOURNAL_NONE:
        return None
    if process.journal != JOURNAL_AUTO:
        return Path(process.journal)
    host, _, port = process.listen.rpartition(":")
    if port == "0":
        return None
    host = host.strip("[]").replace(":", "-")
    return home_directory() / "journal" / f"{host}-{port}-{identity[:16]}.db"


def open_journal(process: ProcessSettings, model: ServedModel) -> JournalStore | None:
    """The journal that the settings ask for, verified.

    Raises InvalidConfiguration, JournalError.
    """
    identity = model_identity(model)
    path = journal_path(process, identity)
    if path is None:
        _log.warning("no journal is kept: answers do not outlive this process")
        return None
    limits = JournalLimits(
        process.journal_generations_max, process.journal_bytes_max, process.journal_s_max
    )
    store = JournalStore.open(
        path,
        model=f"{model.name} {identity}",
        wall_ns=time.time_ns(),
        limits=limits,
        full_sync=process.journal_sync == "full",
    )
    _log.info("journal %s: %d unfinished, %d ended", path, store.running, store.ended)
    return store


def options_of(settings: Settings) -> CoordinatorOptions:
    """What the settings say about a coordinator."""
    mesh, process = settings.mesh, settings.process
    limits = EdgeLimits(
        answer_tokens_default=process.answer_tokens_default,
        prompt_tokens_max=process.prompt_tokens_max,
        request_s_max=process.request_s_max,
        verification=Verification[mesh.verification.upper()],
        verification_max=Verification[mesh.verification_max.upper()],
        delivery=Delivery[mesh.delivery.upper()],
        resume_grace_s=process.resume_grace_s,
    )
    usual = MeshPolicy()
    policy = MeshPolicy(
        requests_running_max=process.requests_max,
        queue_length_max=max(1, process.queue_max),
        prefill_chunk_tokens=process.prefill_chunk_tokens,
        prefill_chunk_tokens_shared=min(
            process.prefill_chunk_tokens, usual.prefill_chunk_tokens_shared
        ),
        rows_per_step_max=process.step_rows_max,
        fallback=FallbackPolicy(process.fallback),
        route_wait_s_max=process.route_wait_s_max,
        fallback_wait_s_max=process.route_wait_s_max,
        breaker_base_s=min(process.failed_worker_s_max, usual.breaker_base_s),
        breaker_max_s=process.failed_worker_s_max,
        shadow_chunk_tokens=process.shadow_chunk_tokens,
        shadow_tolerance=process.shadow_tolerance,
        audit_budget=process.audit_budget,
        verification_wait_s_max=process.verification_wait_s_max,
    )
    return CoordinatorOptions(
        server=server_options_of(process),
        admin=server_options_of(process, process.admin_listen) if process.admin_listen else None,
        limits=limits,
        policy=policy,
        advertise=process.advertise,
        answers_kept_max=process.answers_kept_max,
        drain_s=process.drain_s,
    )
