"""A mesh whose stages divide their layers over processes of their own: same tokens, and whatever
befalls one of those processes is noticed, survived and mended."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import grpc
import psutil
import pytest

from stagemesh.v1 import admin_service_pb2 as admin
from stagemesh.v1 import admin_service_pb2_grpc as admin_rpc

if TYPE_CHECKING:
    from tests.mesh.conftest import Answer, ProcessMesh

pytestmark = pytest.mark.timeout(300)
"""Ten processes of MLX start here, some of them twice."""
PIPELINE = ["stage-0", "stage-1"]
COLLECTIVE_S_MAX = 3.0
DEVICES = ("--tensor-parallel", "2", "--collective-s-max", str(COLLECTIVE_S_MAX))
NOTICED_S_MAX = 20.0
"""Far above what it takes, far below what a hang would: a gross bound, not a measurement."""
GREEDY = {"temperature": 0.0}


def members(mesh: ProcessMesh, name: str) -> set[int]:
    """The processes that a worker has started."""
    try:
        return {child.pid for child in psutil.Process(mesh.processes[name].pid).children()}
    except psutil.NoSuchProcess:
        return set()


def alive(pids: set[int]) -> set[int]:
    """Those that are there and no zombie."""
    found = set()
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.add(pid)
    return found


def all_gone(pids: set[int]) -> bool:
    deadline = time.monotonic() + NOTICED_S_MAX
    while alive(pids) and time.monotonic() < deadline:
        threading.Event().wait(0.05)  # A process does not tell that it has ended.
    return not alive(pids)


def breaks(mesh: ProcessMesh, name: str) -> int:
    """How often a worker says that its devices have broken."""

    async def work(channel: grpc.aio.Channel) -> admin.GetDiagnosticsResponse:
        return await admin_rpc.AdminServiceStub(channel).GetDiagnostics(
            admin.GetDiagnosticsRequest()
        )

    found = {item.worker: item.counters for item in mesh.call(work).workers}
    return int(found[name].get("device_groups_broken", 0))


@pytest.fixture(scope="module")
def standing(
    tmp_path_factory: pytest.TempPathFactory, make_mesh: type[ProcessMesh]
) -> Iterator[ProcessMesh]:
    """Two stages of two processes each, and a full worker in one."""
    one = make_mesh(tmp_path_factory.mktemp("divided"))
    try:
        one.coordinator()
        one.worker("stage-0", "0-2", *DEVICES)
        one.worker("stage-1", "2-4", *DEVICES)
        one.worker("full", "all")
        one.wait_for_routes(PIPELINE, ["full"])
        yield one
    finally:
        one.stop()


@pytest.fixture(scope="module")
def undivided(standing: ProcessMesh, make_mesh: type[ProcessMesh], tmp_path_factory) -> Answer:
    """The greedy answer of workers that compute each layer in one process."""
    one = make_mesh(tmp_path_factory.mktemp("undivided"))
    try:
        one.coordinator()
        one.worker("full", "all")
        one.wait_for_routes(["full"])
        return one.generate(**GREEDY)
    finally:
        one.stop()


def test_divided_stages_answer_with_the_tokens_of_undivided_ones(
    standing: ProcessMesh, undivided: Answer
) -> None:
    standing.wait_for_routes(PIPELINE, ["full"])
    answer = standing.generate(**GREEDY)
    assert answer.tokens == undivided.tokens
    assert (answer.route, answer.recoveries) == (PIPELINE, [])
    for name in PIPELINE:
        assert len(members(standing, name)) == 2
    facts = {item.worker.name: item.worker for item in standing.status().workers}
    assert facts["stage-0"].environment["tensor_parallel"] == "2"
    assert "exact" not in facts["stage-0"].capabilities
    assert "exact" in facts["full"].capabilities


@pytest.mark.parametrize(
    ("victim", "how"), [("stage-0", signal.SIGSTOP), ("stage-1", signal.SIGKILL)]
)
def test_a_device_that_is_lost_in_mid_answer_costs_nothing_but_a_detour(
    standing: ProcessMesh, undivided: Answer, victim: str, how: signal.Signals
) -> None:
    standing.wait_for_routes(PIPELINE, ["full"])
    before, broken = members(standing, victim), breaks(standing, victim)
    began = []

    def strike(index: int) -> None:
        if index == 10:
            os.kill(max(before), how)
            began.append(time.monotonic())

    answer = standing.generate(on_token=strike, **GREEDY)
    assert answer.tokens == undivided.tokens
    assert answer.route == ["full"]
    assert [recovery[1:] for recovery in answer.recoveries] == [("reroute", victim)]
    assert all_gone(before)
    assert time.monotonic() - began[0] < COLLECTIVE_S_MAX + NOTICED_S_MAX
    standing.wait_for_routes(PIPELINE, ["full"])
    after = members(standing, victim)
    assert len(after) == 2
    assert not after & before
    assert breaks(standing, victim) == broken + 1
    again = standing.generate(**GREEDY)
    assert (again.tokens, again.route) == (undivided.tokens, PIPELINE)


def test_devices_end_with_their_worker_however_it_ends(standing: ProcessMesh) -> None:
    standing.wait_for_routes(PIPELINE, ["full"])
    killed, asked = members(standing, "stage-0"), members(standing, "stage-1")
    assert len(killed) == len(asked) == 2
    os.kill(max(killed), signal.SIGSTOP)  # Not even one that cannot see its worker go stays.
    standing.kill("stage-0")
    standing.kill("stage-1", signal.SIGTERM)
    assert standing.ended("stage-1") == 0
    assert all_gone(killed | asked)
