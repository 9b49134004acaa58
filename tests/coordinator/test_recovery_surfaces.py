"""A recovery is told the same everywhere: events, snapshot, and the final summary."""

from __future__ import annotations

import pytest

from coordinator.instructions import RecoveryRecord
from coordinator.settings import MeshPolicy
from coordinator.testing import MemoryMesh, Received

STAGES = {"stage-0": "0-2", "stage-1": "2-4", "stage-2": "4-6"}
PROMPT = tuple(range(2, 40))


def running(tokens: int) -> tuple[MemoryMesh, Received]:
    """A mesh and a request that has ``tokens`` tokens."""
    mesh = MemoryMesh(MeshPolicy(vocab_size=997))
    for name, span in {**STAGES, "full": "0-6"}.items():
        mesh.join(name, span)
    assert mesh.run_until(lambda: len(mesh.open_routes()) == 2)
    client = mesh.request(1, PROMPT, 30)
    assert mesh.run_until(lambda: len(client.tokens) >= tokens)
    return mesh, client


def told(record: RecoveryRecord) -> dict[str, str]:
    """What RecoveryFinished says of it."""
    return {
        "cause": record.cause,
        "action": record.action,
        "epoch": str(record.epoch),
        "from_route": " ".join(record.from_route),
        "to_route": " ".join(record.to_route),
        "kept": str(record.kept),
        "replayed": str(record.replayed),
        "seconds": f"{record.seconds:.4f}",
    }


@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_a_reroute_has_cause_worker_routes_epoch_tokens_and_duration(fault: str):
    mesh, client = running(10)
    getattr(mesh, fault)("stage-1")
    assert mesh.run_to_end()
    (record,) = client.summary.recoveries
    assert (record.action, record.worker) == ("reroute", "stage-1")
    assert record.cause == {"kill": "STAGE_UNREACHABLE", "stop": "SILENT"}[fault]
    assert record.from_route == tuple(STAGES)
    assert record.to_route == ("full",)
    assert 10 <= record.kept < 30
    assert 0 < record.replayed <= len(PROMPT) + record.kept
    assert record.seconds > 0.0
    (finished,) = mesh.events("RecoveryFinished")
    assert (finished.worker, finished.attributes) == ("stage-1", told(record))
    (started,) = mesh.events("RecoveryStarted")
    assert (started.worker, started.attributes["kept"]) == ("stage-1", str(record.kept))
    (shown,) = mesh.mesh.snapshot(mesh.now).generations
    assert shown.recoveries == (record,)


def test_one_under_way_is_shown_without_a_duration():
    mesh, _ = running(10)
    for name in ("full", *STAGES):
        mesh.kill(name)
    mesh.run(1.0)
    (shown,) = mesh.mesh.snapshot(mesh.now).generations
    (record,) = shown.recoveries
    assert (record.from_route, record.to_route) == (tuple(STAGES), ())
    assert record.seconds is None
    assert not mesh.events("RecoveryFinished")


def test_a_replay_names_the_route_it_stays_on():
    mesh, client = running(10)
    mesh.forget("stage-1", 1)
    assert mesh.run_to_end()
    (record,) = client.summary.recoveries
    assert (record.cause, record.action) == ("CACHE_LOST", "replay")
    assert record.worker == "stage-1"
    assert record.from_route == record.to_route == tuple(STAGES)
    assert record.replayed == len(PROMPT) + record.kept
    (finished,) = mesh.events("RecoveryFinished")
    assert finished.attributes == told(record)


def test_every_recovery_that_was_begun_is_finished_or_overtaken_once():
    mesh, client = running(10)
    mesh.kill("stage-1")
    assert mesh.run_until(lambda: bool(mesh.events("RecoveryStarted")))
    mesh.kill("full")
    for name in ("stage-1", "full"):
        mesh.restart(name, instance="next")
    assert mesh.run_to_end()
    first, *_, last = client.summary.recoveries
    assert (first.seconds, last.seconds is not None) == (None, True)
    overtaken = mesh.events("RecoveryOvertaken")
    assert [one.attributes["cause"] for one in overtaken] == [
        one.cause for one in client.summary.recoveries[:-1]
    ]
    assert {one.attributes["by"] for one in overtaken} == {last.cause}
    assert client.recoveries == list(client.summary.recoveries)  # each kept when it was over
    ended = len(overtaken) + len(mesh.events("RecoveryFinished"))
    assert len(mesh.events("RecoveryStarted")) == ended == len(client.summary.recoveries)
