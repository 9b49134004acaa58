"""`stagemesh up` with real processes and a tiny model: ready, restart, drain, and no orphans."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from services import up as up_module
from services.up import what_is_missing
from stagemesh.errors import RouteUnavailable
from stagemesh.v1 import admin_service_pb2, topology_pb2

START_S = 90.0
END_S = 30.0
READY = topology_pb2.WORKER_STATE_READY
WORKERS = ("stage-0", "stage-1", "full-worker")


def wait_until(condition: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        pause.wait(0.05)
    pytest.fail(f"nothing happened within {seconds:.0f} s")


class Up:
    """One `stagemesh up`, its ready file and its output."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.ready_file = folder / "ready.json"
        self.log = folder / "up.log"
        words = (
            *("up", "--model", "tiny", "--stages", "2", "--deterministic"),
            *("--listen", "127.0.0.1:0", "--ready-file", str(self.ready_file)),
            *("--run-directory", str(folder / "run"), "--drain-s", "5", *flags),
        )
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services", *words], stdout=log, stderr=log
            )

    def ready(self) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            assert self.process.poll() is None, self.log.read_text()
            return json.loads(self.ready_file.read_text()) if self.ready_file.exists() else None

        return wait_until(look, START_S)

    def kill_rest(self, pids: list[int]) -> None:
        for pid in (self.process.pid, *pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def alive(pids: list[int]) -> list[int]:
    living = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                living.append(pid)
    return living


def generate(address: str) -> dict[str, Any]:
    words = ("generate", "hello", "--raw", "--max-tokens", "8", "--ignore-eos", "--json")
    done = subprocess.run(
        [sys.executable, "-m", "services", *words, "--address", address],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    started: list[Up] = []

    def start(*flags: str) -> Up:
        started.append(Up(tmp_path, *flags))
        return started[-1]

    yield start
    for one in started:
        pids = []
        if one.ready_file.exists():
            pids = [
                pid for name, pid in json.loads(one.ready_file.read_text())["pids"].items()
                if name != "up"
            ]  # fmt: skip
        one.kill_rest(pids)


def test_a_mesh_that_is_not_whole_names_what_is_missing():
    stages, everyone = {"stage-0", "stage-1"}, {"stage-0", "stage-1", "full-worker"}
    status = admin_service_pb2.GetMeshResponse(not_ready_reason="a route is probing")
    for name in sorted(stages):
        status.workers.add(worker=topology_pb2.Worker(name=name), state=READY)
    assert what_is_missing(status, stages, stages) == "a route is probing"
    status.ready = True  # the reason of before is no longer one
    assert what_is_missing(status, stages, everyone) == "full-worker not ready"
    assert "no route through all stages" in what_is_missing(status, stages, stages)
    state = topology_pb2.ROUTE_STATE_OPEN
    status.routes.add(workers=["stage-0", "stage-1"], state=state)
    assert what_is_missing(status, stages, stages) == ""


@pytest.mark.parametrize("there", [(), ("stage-0",), ("stage-0", "full-worker")])
async def test_a_start_in_which_a_worker_hangs_while_loading_ends_and_names_it(
    there: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker registers once its weights are loaded: one that hangs before is never heard of."""
    monkeypatch.setattr(up_module, "START_S_MAX", 0.05)
    status = admin_service_pb2.GetMeshResponse(not_ready_reason="no worker has registered")
    for name in there:
        status.workers.add(worker=topology_pb2.Worker(name=name), state=READY)
        status.ready = name == "full-worker"

    class Mesh:
        specs = tuple(SimpleNamespace(name=name) for name in ("coordinator", *WORKERS))
        supervisor = SimpleNamespace(failed_start=lambda: None, run_directory="/run")

        async def status(self) -> admin_service_pb2.GetMeshResponse:
            return status

    with pytest.raises(RouteUnavailable) as ended:
        await up_module._until_ready(Mesh())  # type: ignore[arg-type]
    named = {name for name in WORKERS if name in ended.value.message}
    assert named == set(WORKERS) - set(there)
    assert "within 0 s" in ended.value.message
    assert "see the logs in /run" in ended.value.message


def test_a_mesh_starts_answers_restarts_a_dead_stage_and_leaves_nobody_behind(up):
    mesh = up()
    first = mesh.ready()
    assert set(first["pids"]) == {"up", "coordinator", "stage-0", "stage-1", "full-worker"}
    assert {one["name"] for one in first["workers"]} == {"stage-0", "stage-1", "full-worker"}
    before = generate(first["address"])
    assert before["route"] == ["stage-0", "stage-1"]

    os.kill(first["pids"]["stage-1"], signal.SIGKILL)

    def replaced() -> dict[str, Any] | None:
        now = json.loads(mesh.ready_file.read_text())
        pid = now["pids"].get("stage-1")
        return now if pid and pid != first["pids"]["stage-1"] else None

    second = wait_until(replaced, START_S)
    assert alive([first["pids"]["stage-1"]]) == []
    assert generate(first["address"])["token_ids"] == before["token_ids"]

    # Nobody can tell the children about this one: they have to notice by themselves.
    mesh.process.kill()
    mesh.process.wait()
    children = [pid for name, pid in second["pids"].items() if name != "up"]
    wait_until(lambda: not alive(children), END_S)


def test_sigterm_drains_ends_everyone_and_succeeds(up):
    mesh = up("--no-full-worker")
    ready = mesh.ready()
    assert "full-worker" not in ready["pids"]
    mesh.process.send_signal(signal.SIGTERM)
    mesh.process.wait(END_S)
    assert mesh.process.returncode == 0, mesh.log.read_text()
    assert alive(list(ready["pids"].values())) == []


def test_a_second_signal_does_not_wait(up):
    mesh = up("--no-full-worker", "--drain-s", "600")
    ready = mesh.ready()
    os.kill(ready["pids"]["coordinator"], signal.SIGSTOP)  # it will not drain by itself
    mesh.process.send_signal(signal.SIGINT)
    wait_until(lambda: "draining" in mesh.log.read_text(), END_S)
    mesh.process.send_signal(signal.SIGINT)
    mesh.process.wait(END_S)
    assert alive(list(ready["pids"].values())) == []


def test_a_stage_that_cannot_start_ends_up_with_the_end_of_its_log(up, tmp_path):
    from stage_worker.model_source import resolve

    broken = tmp_path / "broken"
    broken.mkdir()
    for path in resolve("tiny").directory.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = next(broken.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    del content[len(content) // 2 :]
    weights.write_bytes(content)
    mesh = up("--model", str(broken))
    assert mesh.process.wait(START_S) == 1
    said = mesh.log.read_text()
    assert "Traceback" not in said
    assert weights.name in said or "ends inside" in said
