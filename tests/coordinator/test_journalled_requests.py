"""Requests that a journal brings back, and requests that it cannot serve any further."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.echo import oracle
from coordinator.events import CancelRequested, RequestFailed
from coordinator.settings import MeshPolicy
from coordinator.testing import MemoryMesh, Received
from stagemesh.errors import JournalError

STAGES = {"stage-0": "0-2", "stage-1": "2-4", "stage-2": "4-6"}
PROMPT = tuple(range(2, 40))
EXPECTED = oracle(PROMPT, 30, layer_count=6)
LABEL = "ab" * 32 + ":f32"


def booted(**limits: Any) -> MemoryMesh:
    mesh = MemoryMesh(MeshPolicy(vocab_size=997, **limits))
    join_all(mesh)
    return mesh


def join_all(mesh: MemoryMesh) -> None:
    for name, span in STAGES.items():
        mesh.join(name, span)
    mesh.join("full", "0-6")
    assert mesh.run_until(lambda: len(mesh.open_routes()) == 2)


def bring_back(mesh: MemoryMesh, number: int, kept: int, **more: Any) -> Received:
    fields = {"accepted": tuple(EXPECTED[:kept]), "recovered": True, "fingerprint": LABEL} | more
    return mesh.request(number, PROMPT, 30, **fields)


@pytest.mark.parametrize("kept", [0, 1, 12, 29])
def test_it_goes_on_behind_what_was_kept_and_says_so(kept: int):
    mesh = booted()
    client = bring_back(mesh, 1, kept)
    assert mesh.run_to_end()
    assert client.tokens == EXPECTED[kept:]
    assert len(client.ends) == 1
    (recovery,) = client.summary.recoveries
    assert (recovery.cause, recovery.action) == ("COORDINATOR_RESTARTED", "replay")
    assert (recovery.kept, recovery.replayed) == (kept, len(PROMPT) + kept)
    assert recovery.seconds is not None
    assert client.summary.completion_tokens == 30


def test_it_may_come_before_the_workers_are_back():
    mesh = MemoryMesh(MeshPolicy(vocab_size=997))
    client = bring_back(mesh, 1, 5)
    mesh.mesh.check()
    join_all(mesh)
    assert mesh.run_to_end()
    assert client.tokens == EXPECTED[5:]


@pytest.mark.parametrize(
    ("more", "reason"),
    [({}, "length"), ({"stop_token_ids": frozenset({EXPECTED[29]})}, "stop")],
)
def test_one_that_had_all_its_tokens_only_ends(more: dict[str, Any], reason: str):
    mesh = booted()
    client = bring_back(mesh, 1, 30, **more)
    assert client.tokens == []
    assert client.finish is not None
    assert client.finish.reason == reason
    assert client.summary.completion_tokens == 30


def test_a_full_queue_does_not_turn_it_away():
    mesh = MemoryMesh(MeshPolicy(vocab_size=997, queue_length_max=1))
    clients = [bring_back(mesh, number, 3) for number in range(4)]
    fresh = mesh.request(9, PROMPT, 30)
    join_all(mesh)
    assert mesh.run_to_end()
    assert all(client.tokens == EXPECTED[3:] for client in clients)
    assert fresh.error is not None
    assert fresh.error.reason == "OVERLOADED"


def test_other_weights_or_another_dtype_do_not_finish_it():
    mesh = booted()
    for number, label in enumerate(("cd" * 32 + ":f32", "ab" * 32 + ":bf16")):
        client = bring_back(mesh, number, 4, fingerprint=label)
        assert mesh.run_to_end()
        assert client.tokens == []
        assert client.error is not None
        assert client.error.reason == "JOURNAL_ERROR"


def test_a_request_that_cannot_be_kept_fails_once_and_frees_what_it_held():
    mesh = booted()
    client = mesh.request(1, PROMPT, 30)
    assert mesh.run_until(lambda: len(client.tokens) >= 5)
    failed = RequestFailed((1).to_bytes(16, "big"), JournalError("full"))
    mesh.feed(failed)
    mesh.feed(failed)
    assert mesh.run_to_end()
    assert client.error is not None
    assert client.error.reason == "JOURNAL_ERROR"
    assert len(client.ends) == 1
    mesh.mesh.check()
    assert mesh.mesh.snapshot(mesh.now).running == 0


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_an_end_that_could_not_be_kept_is_counted_and_shown_as_the_failure_it_was(
    is_cancelled: bool,
):
    mesh, key = booted(), (1).to_bytes(16, "big")
    client = mesh.request(1, PROMPT, 30)
    if is_cancelled:
        assert mesh.run_until(lambda: len(client.tokens) >= 5)
        mesh.feed(CancelRequested(key))
    assert mesh.run_to_end()
    desk = mesh.mesh.requests
    assert (desk.finished, desk.cancelled) == (int(not is_cancelled), int(is_cancelled))
    for _ in range(2):
        mesh.feed(RequestFailed(key, JournalError("full")))
    assert (desk.finished, desk.cancelled, desk.failed) == (0, 0, 1)
    (shown,) = mesh.mesh.snapshot(mesh.now).generations
    assert (shown.phase, shown.error_reason) == ("failed", "JOURNAL_ERROR")
    assert len(client.ends) == 1
    assert len(mesh.events("GenerationFailed")) == 1
    mesh.mesh.check()
