"""A whole mesh on this machine: plan it, start it, wait until it makes tokens, end it.

``local_mesh`` is what `up`, `run` and every command without ``--address`` use.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from services.client import ConnectionLost, MeshClient
from services.credentials import TlsFiles
from services.local_mesh import (
    COORDINATOR,
    ProcessSpec,
    choose_address,
    dialled,
    plan_processes,
    plan_spans,
    with_metrics_ports,
)
from services.mesh_report import status_json
from services.server import ServerOptions
from services.setting_fields import JOURNAL_AUTO, ProcessSettings
from services.settings import Settings
from services.supervisor import Supervisor
from stage_worker.machine import core_count
from stage_worker.model_source import ResolvedModel, resolve
from stagemesh.errors import Fault, MeshError, RouteUnavailable
from stagemesh.topology import Span
from stagemesh.v1 import admin_service_pb2, topology_pb2

START_S_MAX = 300.0
"""Loading a model from a slow disk may take minutes; longer than this is a hang."""
POLL_S = 0.1
POLL_TIMEOUT_S = 2.0

Report = Callable[[str], None]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Wishes:
    """What kind of local mesh is wanted. ``listen`` empty: the usual port, or a free one."""

    settings: Settings
    full_worker: bool = True
    listen: str = ""
    run_directory: Path | None = None
    certs: Path | None = None
    """Directory of `stagemesh certs init`; None speaks plain text."""
    adapt: Callable[[tuple[ProcessSpec, ...]], tuple[ProcessSpec, ...]] | None = None
    """Changes the command lines before anything starts: how a stress run puts proxies between."""
    is_remote: bool = False
    """The processes listen where this one cannot: ``listen`` is taken as it stands."""


@dataclass(slots=True)
class LocalMesh:
    """A running mesh of this machine."""

    address: str
    model: ResolvedModel
    spans: tuple[Span, ...]
    specs: tuple[ProcessSpec, ...]
    supervisor: Supervisor
    client: MeshClient

    async def status(self) -> admin_service_pb2.GetMeshResponse:
        """What the coordinator says."""
        return await self.client.mesh(timeout_s=POLL_TIMEOUT_S)

    async def write_ready_file(self, path: Path) -> None:
        """Address, process ids and workers, for programs; replaced as a whole."""
        status = await self.status()
        document = {
            "address": self.address,
            "admin_address": self.address,
            "pids": {"up": os.getpid(), **self.supervisor.pids},
            "workers": status_json(status)["workers"],
            "run_directory": str(self.supervisor.run_directory),
        }
        temporary = path.with_name(path.name + f".{os.getpid()}")
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)


@contextlib.asynccontextmanager
async def local_mesh(
    wishes: Wishes,
    *,
    report: Report = lambda _line: None,
    progress: Progress | None = None,
    changed: Callable[[], None] = lambda: None,
) -> AsyncIterator[LocalMesh]:
    """A mesh that makes tokens; ended, whatever happens, when the block is left.

    Raises ModelError kinds (the model), InvalidConfiguration (spans, port), StartFailed (a
    process).
    """
    settings = wishes.settings
    tls = TlsFiles.in_directory(wishes.certs, "admin") if wishes.certs else None
    address = wishes.listen
    if not wishes.is_remote:
        address = choose_address(wishes.listen)
        ServerOptions(address, tls, settings.process.insecure).check()
    if tls is not None:
        tls.checked()
    model = await asyncio.to_thread(resolve, settings.mesh.model, progress=progress)
    spans = plan_spans(model.directory, settings.mesh)
    folder = wishes.run_directory or Path(tempfile.mkdtemp(prefix="stagemesh-run-"))
    supervisor = Supervisor(folder, changed=changed)
    specs = plan_processes(
        settings.mesh,
        _with_journal(settings.process, folder),
        spans,
        address=address,
        full_worker=wishes.full_worker,
        pipe=supervisor.pipe_read,
        cores=core_count(),
        certs=wishes.certs,
    )
    specs = with_metrics_ports(specs, os.environ)
    if wishes.adapt is not None:
        specs = wishes.adapt(specs)
    report(f"starting {', '.join(spec.name for spec in specs)}; logs in {folder}")
    client = MeshClient(dialled(address), tls=tls)
    mesh = LocalMesh(address, model, spans, specs, supervisor, client)
    worked = False
    try:
        await supervisor.start(specs)
        await _until_ready(mesh)
        worked = True
        supervisor.proven()
        yield mesh
    except asyncio.CancelledError:
        worked = True  # somebody changed their mind: there is nothing to look into
        raise
    except MeshError as error:
        worked = worked and error.fault is Fault.CALLER
        raise
    finally:
        await client.close()
        await supervisor.stop(settings.process.drain_s)
        if worked and wishes.run_directory is None:
            shutil.rmtree(folder, ignore_errors=True)
        elif not worked:
            report(f"the logs are kept in {folder}")


def _with_journal(process: ProcessSettings, folder: Path) -> ProcessSettings:
    """The journal stands beside the logs unless another place was given."""
    if process.journal != JOURNAL_AUTO:
        return process
    return dataclasses.replace(process, journal=str(folder / "journal.db"))


async def _until_ready(mesh: LocalMesh) -> None:
    """Return once the pipeline makes tokens. Raises StartFailed, RouteUnavailable."""
    why = "the coordinator does not answer yet"
    stages = {spec.name for spec in mesh.specs if spec.name.startswith("stage-")}
    everyone = {spec.name for spec in mesh.specs} - {COORDINATOR}
    try:
        async with asyncio.timeout(START_S_MAX):
            while True:
                failure = mesh.supervisor.failed_start()
                if failure is not None:
                    raise failure
                with contextlib.suppress(ConnectionLost):
                    why = what_is_missing(await mesh.status(), stages, everyone)
                    if not why:
                        return
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise RouteUnavailable(
            f"the mesh made no tokens within {START_S_MAX:.0f} s: {why}; "
            f"see the logs in {mesh.supervisor.run_directory}"
        ) from None


def what_is_missing(
    status: admin_service_pb2.GetMeshResponse, stages: set[str], everyone: set[str]
) -> str:
    """Why the mesh is not whole yet: every worker is there, and the route through exactly these
    stages serves. Empty if it is."""
    if not status.ready:
        why = status.not_ready_reason or "no route is open"
        silent = sorted(everyone - {one.worker.name for one in status.workers})
        return f"{why}; {', '.join(silent)} not registered yet" if silent else why
    there = {
        one.worker.name for one in status.workers if one.state == topology_pb2.WORKER_STATE_READY
    }
    absent = sorted(everyone - there)
    if absent:
        return f"{', '.join(absent)} not ready"
    pipeline = any(
        set(route.workers) == stages
        for route in status.routes
        if route.state == topology_pb2.ROUTE_STATE_OPEN
    )
    return "" if pipeline or len(stages) < 2 else "no route through all stages is open"


def is_whole(
    status: admin_service_pb2.GetMeshResponse, stages: set[str], everyone: set[str]
) -> bool:
    """Whether nothing is missing: see `what_is_missing`."""
    return not what_is_missing(status, stages, everyone)


async def refresh_ready_file(mesh: LocalMesh, path: Path) -> None:
    """After a restart: new process ids. The coordinator may be the one that is away; then later."""
    with contextlib.suppress(MeshError):
        await mesh.write_ready_file(path)
