"""Composition root of ``stagemesh stage-worker``."""

from __future__ import annotations

import asyncio
import logging
import uuid
from pathlib import Path

from services import logs
from services.lifecycle import StopSignal
from services.process_options import environment_of, server_options_of, write_ready_file
from services.settings import Settings
from stage_worker import blas, machine, model_source
from stagemesh.topology import Span, WorkerInfo

_log = logging.getLogger(__name__)


def main(settings: Settings) -> int:
    """Run until told to stop; the exit status. Raises MeshError for what a user has to put right.

    May replace this process by itself once, for a fast BLAS: nothing before that imports mlx.
    """
    process = settings.process
    name = worker_name(process.name, process.span)
    logs.configure(
        level=process.log_level, log_format=process.log_format, service="stage-worker", worker=name
    )
    threads = process.threads or machine.core_count()
    if not settings.mesh.deterministic:
        blas.reexec_with_fast_blas(threads)
    _log.info(blas.summary(blas.describe()))
    asyncio.run(serve(settings, name))
    return 0


def worker_name(name: str, span: Span | None) -> str:
    """The name that was given, or one made from the span."""
    return name or (f"stage-{span}" if span else "full-worker")


async def serve(settings: Settings, name: str) -> None:
    """The worker's whole life."""
    from services.device_stage import DeviceOptions
    from services.telemetry import Role, start_telemetry
    from services.worker_options import WorkerOptions, dtype_policy
    from services.worker_process import WorkerProcess

    mesh, process = settings.mesh, settings.process
    stop = StopSignal()
    stop.listen_to_signals()
    stop.follow_parent(process.parent_pipe)
    server = server_options_of(process)
    server.check()
    resolved = await asyncio.to_thread(model_source.resolve, mesh.model)
    devices = None
    if process.tensor_parallel > 1:
        devices = DeviceOptions(
            process.tensor_parallel,
            process.collective_s_max,
            process.threads or machine.core_count(),
            process.log_level,
            process.log_format,
        )
    options = WorkerOptions(
        name=name,
        model=resolved.directory,
        span=process.span,
        coordinator=process.coordinator,
        server=server,
        advertise=process.advertise,
        dtype=dtype_policy(mesh.dtype),
        kv_budget_tokens=mesh.kv_budget_tokens,
        threads=process.threads or machine.core_count(),
        threads_max=process.threads_max,
        drain_s=process.drain_s,
        devices=devices,
    )
    service = "stage-worker" if process.span else "full-worker"
    telemetry = start_telemetry(Role(service, instance=uuid.uuid4().hex, worker=name))

    def ready(info: WorkerInfo) -> None:
        machine.give_way(process.niceness)  # not before: others wait until it is loaded
        if process.ready_file:
            facts = {"name": info.name, "address": info.address, "pid": info.pid}
            write_ready_file(Path(process.ready_file), facts)

    facts = {**machine.describe_environment(), "tensor_parallel": process.tensor_parallel}
    environment = environment_of(facts)
    worker = WorkerProcess(
        options, stop, environment=environment, telemetry_of=telemetry, on_ready=ready
    )
    try:
        await worker.run()
    finally:
        await telemetry.drain()
