"""A mesh of real processes on loopback, with a tiny random model; nothing of it outlives its
test.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, TracesData

from services.channel import open_channel
from services.credentials import TlsFiles
from services.rpc_errors import to_mesh_error
from stagemesh.v1 import admin_service_pb2 as admin
from stagemesh.v1 import admin_service_pb2_grpc as admin_rpc
from stagemesh.v1 import generation_service_pb2 as pb
from stagemesh.v1 import generation_service_pb2_grpc as rpc
from tests.ports import free_port

READY_S_MAX = 60.0
END_S_MAX = 20.0
POLL_S = 0.05


class Answer:
    """What one Generate call gave; ``on_token`` sees every token as it comes."""

    def __init__(self) -> None:
        self.request_id = ""
        self.tokens: list[int] = []
        self.finish = pb.Finish()

    @property
    def route(self) -> list[str]:
        return list(self.finish.route)

    @property
    def recoveries(self) -> list[tuple[str, str, str]]:
        return [(item.cause, item.action, item.worker) for item in self.finish.recoveries]


class ProcessMesh:
    """Coordinator and workers as processes, each with its log in ``directory``."""

    def __init__(self, directory: Path, *flags: str, tls: Path | None = None) -> None:
        self.directory = directory
        self.address = f"127.0.0.1:{free_port()}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.flags = ("--model", "tiny", "--deterministic", "--drain-s", "10", *flags)
        self.tls = tls

    # -- processes --------------------------------------------------------------------------

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start ``stagemesh …`` as process ``name``."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (self.directory / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "services", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                cwd=Path(__file__).parents[2],
            )
        self.processes[name] = process
        return process

    def certificate(self, role: str) -> tuple[str, ...]:
        if self.tls is None:
            return ()
        files = TlsFiles.in_directory(self.tls, role)
        return (
            *("--tls-ca", str(files.ca)),
            *("--tls-cert", str(files.certificate)),
            *("--tls-key", str(files.key)),
        )

    def coordinator(self) -> None:
        flags = (*self.flags, *self.certificate("coordinator"))
        self.start("coordinator", "coordinator", *flags, "--listen", self.address)

    def worker(self, name: str, span: str, *more: str) -> subprocess.Popen[bytes]:
        role = "full" if span == "all" else "stage"
        flags = (*self.flags, *self.certificate(role), "--coordinator", self.address)
        return self.start(name, "stage-worker", *flags, "--name", name, "--span", span, *more)

    def everything(self) -> ProcessMesh:
        """Coordinator, two stages, full worker; returns when both routes are open."""
        self.coordinator()
        self.worker("stage-0", "0-2")
        self.worker("stage-1", "2-4")
        self.worker("full", "all")
        self.wait_for_routes(["stage-0", "stage-1"], ["full"])
        return self

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        self.processes[name].send_signal(number)

    def ended(self, name: str) -> int:
        """Exit status, once the process has ended."""
        return self.processes[name].wait(END_S_MAX)

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text(errors="replace")

    def broken(self) -> bool:
        """Whether a process has ended by itself and with an error."""
        return any((process.poll() or 0) > 0 for process in self.processes.values())

    def stop(self) -> None:
        """End everything that still runs, stopped ones included."""
        running = [item for item in self.processes.values() if item.poll() is None]
        for process in running:
            process.send_signal(signal.SIGCONT)
            process.kill()
        for process in running:
            process.wait(END_S_MAX)

    # -- calls ------------------------------------------------------------------------------

    def call(self, work: Callable[[grpc.aio.Channel], Any], *, role: str = "admin") -> Any:
        """Run one coroutine with a channel to the coordinator."""

        async def bounded() -> Any:
            tls = TlsFiles.in_directory(self.tls, role) if self.tls else None
            async with asyncio.timeout(READY_S_MAX), open_channel(self.address, tls=tls) as channel:
                return await work(channel)

        return asyncio.run(bounded())

    def status(self) -> admin.GetMeshResponse:
        async def work(channel: grpc.aio.Channel) -> admin.GetMeshResponse:
            return await admin_rpc.AdminServiceStub(channel).GetMesh(admin.GetMeshRequest())

        return self.call(work)

    def wait_until(self, holds: Callable[[admin.GetMeshResponse], bool]) -> None:
        """Poll the mesh until ``holds``; what each process logged is shown otherwise."""
        deadline = time.monotonic() + READY_S_MAX
        seen: object = "no answer"
        while time.monotonic() < deadline and not self.broken():
            try:
                seen = self.status()
                if holds(seen):
                    return
            except grpc.RpcError as error:
                seen = to_mesh_error(error)
            threading.Event().wait(POLL_S)  # Nobody tells when a process is ready.
        logs = "\n".join(f"== {name}\n{self.log(name)[-2000:]}" for name in self.processes)
        raise AssertionError(f"the mesh did not get there: {seen}\n{logs}")

    def wait_for_routes(self, *routes: list[str]) -> None:
        """Until exactly these routes, by worker names, are open."""
        wanted = sorted(routes)

        def there(mesh: admin.GetMeshResponse) -> bool:
            is_open = [list(item.workers) for item in mesh.routes if item.state == 3]
            return sorted(is_open) == wanted

        self.wait_until(there)

    def generate(
        self,
        count: int = 40,
        *,
        on_token: Callable[[int], None] = lambda index: None,
        role: str = "client",
        **fields: Any,
    ) -> Answer:
        """One answer of ``count`` tokens, sampled with a seed."""
        usual = {"text": "hello mesh", "ignore_eos": True, "temperature": 0.9, "seed": 5}
        request = pb.GenerateRequest(max_tokens=count, **{**usual, **fields})
        answer = Answer()

        async def work(channel: grpc.aio.Channel) -> None:
            async for response in rpc.GenerationServiceStub(channel).Generate(request):
                assert response.tokens == [] or response.position == len(answer.tokens)
                answer.request_id = response.request_id
                for token in response.tokens:
                    on_token(len(answer.tokens))
                    answer.tokens.append(token.token_id)
                if response.HasField("finish"):
                    answer.finish = response.finish

        self.call(work, role=role)
        return answer

    def spans(self, answer: Answer) -> list[Span]:
        """Every span of its trace."""

        async def work(channel: grpc.aio.Channel) -> bytes:
            request = admin.GetTraceRequest(request_id=answer.request_id)
            return (await admin_rpc.AdminServiceStub(channel).GetTrace(request)).traces

        return [
            span
            for resource in TracesData.FromString(self.call(work)).resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@pytest.fixture(scope="session")
def model_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache folder of this session's models."""
    home = tmp_path_factory.mktemp("home")
    before = os.environ.get("STAGEMESH_HOME")
    os.environ["STAGEMESH_HOME"] = str(home)
    yield home
    if before is None:
        del os.environ["STAGEMESH_HOME"]
    else:
        os.environ["STAGEMESH_HOME"] = before


@pytest.fixture
def mesh(tmp_path: Path, model_home: Path) -> Iterator[ProcessMesh]:
    """A mesh that has not been started."""
    one = ProcessMesh(tmp_path)
    yield one
    one.stop()


@pytest.fixture(scope="session")
def make_mesh(model_home: Path) -> type[ProcessMesh]:
    """Makes meshes that their user has to stop."""
    return ProcessMesh


# -- the stress command ---------------------------------------------------------------------


@pytest.fixture
def stress() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``stagemesh stress`` on the tiny model, to its end."""

    def run(*flags: str, limit_s: float = 240.0) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            (sys.executable, "-m", "services", "stress", "--model", "tiny", "--json", *flags),
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    return run


@pytest.fixture
def left_behind() -> Callable[[Path], list[int]]:
    """Processes whose command line names a run's folder."""

    def find(folder: Path) -> list[int]:
        return [
            process.pid
            for process in psutil.process_iter(["cmdline"])
            if any(str(folder) in word for word in process.info["cmdline"] or ())
        ]

    return find
