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


@pytest.mark.parametrize("kept", [0, 5])
def test_a_full_worker_that_is_back_first_and_too_small_does_not_end_it(kept: int):
    mesh = MemoryMesh(MeshPolicy(vocab_size=997))
    client = bring_back(mesh, 1, kept)
    mesh.join("full", "0-6", kv_budget_tokens=len(PROMPT) + 20)
    assert mesh.run_until(lambda: bool(mesh.open_routes()))
    behind = mesh.request(2, PROMPT, 10)
    assert mesh.run_until(lambda: bool(behind.ends), seconds=5.0)  # nobody stands in its way
    assert behind.tokens == EXPECTED[:10]
    assert not client.ends
    for name, span in STAGES.items():
        mesh.join(name, span)
    assert mesh.run_to_end()
    assert client.tokens == EXPECTED[kept:]


def test_where_nothing_larger_comes_it_fails_when_it_has_waited_as_long_as_for_any_route():
    mesh = MemoryMesh(MeshPolicy(vocab_size=997, route_wait_s_max=5.0))
    client = bring_back(mesh, 1, 5)
    mesh.join("full", "0-6", kv_budget_tokens=len(PROMPT) + 20)
    mesh.run(4.9)
    assert not client.ends
    mesh.run(0.3)
    assert client.error.reason == "CACHE_EXHAUSTED"
    new = mesh.request(2, PROMPT, 30)
    assert new.error.reason == "CACHE_EXHAUSTED"  # at once: it was never begun


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
    endings = mesh.mesh.requests.endings
    assert (endings.finished, endings.failed) == (int(not is_cancelled), 0)
    for _ in range(2):
        mesh.feed(RequestFailed(key, JournalError("full")))
    assert (endings.finished, endings.failed) == (0, 1)
    (shown,) = mesh.mesh.snapshot(mesh.now).generations
    assert (shown.phase, shown.error_reason) == ("failed", "JOURNAL_ERROR")
    assert len(client.ends) == 1
    assert len(mesh.events("GenerationFailed")) == 1
    mesh.mesh.check()


def failed_for_want_of_a_route(**limits: Any) -> tuple[MemoryMesh, Received]:
    """A mesh without workers, and a request that ended with it."""
    mesh = booted(fallback_wait_s_max=1.0, **limits)
    client = mesh.request(1, PROMPT, 30)
    assert mesh.run_until(lambda: len(client.tokens) >= 5)
    for name in ("full", *STAGES):
        mesh.kill(name)
    assert mesh.run_to_end()
    assert client.error is not None
    assert client.error.reason == "ROUTE_UNAVAILABLE"
    assert client.error.metadata["position"] == str(len(client.tokens))
    return mesh, client


def resume(mesh: MemoryMesh, client: Received, **more: Any) -> Received:
    summary = client.summary
    assert summary is not None
    assert client.error is not None
    facts = {
        "accepted": tuple(EXPECTED[: summary.completion_tokens]),
        "fingerprint": summary.weights,
        "recoveries": summary.recoveries,
        "resumed_after": client.error.reason,
    }
    return mesh.request(1, PROMPT, 30, recovered=True, **(facts | more))


def test_one_that_failed_is_resumed_at_the_next_position_and_keeps_its_story():
    mesh, client = failed_for_want_of_a_route()
    assert not mesh.mesh.knows((1).to_bytes(16, "big"))
    join_all(mesh)
    again = resume(mesh, client)
    assert mesh.run_to_end()
    assert client.tokens + again.tokens == EXPECTED
    assert len(client.ends) == len(again.ends) == 1
    first, second = again.summary.recoveries
    assert (first.cause, first.seconds) == ("STAGE_UNREACHABLE", None)
    assert (second.cause, second.action) == ("ROUTE_UNAVAILABLE", "replay")
    assert (second.kept, second.replayed) == (
        len(client.tokens),
        len(PROMPT) + len(client.tokens),
    )
    assert second.seconds is not None
    (shown,) = mesh.mesh.snapshot(mesh.now).generations
    assert (shown.phase, shown.recoveries) == ("finished", (first, second))
    assert mesh.mesh.knows((1).to_bytes(16, "big"))


def test_one_resumed_before_its_first_token_has_recovered_from_nothing():
    mesh = MemoryMesh(MeshPolicy(vocab_size=997, route_wait_s_max=1.0))
    client = mesh.request(1, PROMPT, 30)
    assert mesh.run_to_end()
    join_all(mesh)
    again = resume(mesh, client)
    assert mesh.run_to_end()
    assert again.tokens == EXPECTED
    assert again.summary.recoveries == ()


def test_a_resumed_request_waits_its_turn_and_is_turned_away_by_a_full_queue():
    mesh, client = failed_for_want_of_a_route(queue_length_max=1)
    waiting = mesh.request(2, PROMPT, 30)
    again = resume(mesh, client)
    assert again.error is not None
    assert again.error.reason == "OVERLOADED"
    join_all(mesh)
    assert mesh.run_to_end()
    assert waiting.tokens == EXPECTED


def test_a_resumed_request_has_its_recovery_budget_anew():
    mesh, client = failed_for_want_of_a_route(fruitless_recoveries_max=1)
    join_all(mesh)
    again = resume(mesh, client)
    assert mesh.run_until(lambda: len(again.tokens) >= 2)
    mesh.kill("stage-1")
    assert mesh.run_to_end()
    assert client.tokens + again.tokens == EXPECTED
    causes = [one.cause for one in again.summary.recoveries]
    assert causes == ["STAGE_UNREACHABLE", "ROUTE_UNAVAILABLE", "STAGE_UNREACHABLE"]


def test_other_weights_do_not_go_on_with_one_that_failed():
    mesh, client = failed_for_want_of_a_route()
    for name, span in {**STAGES, "full": "0-6"}.items():
        mesh.join(name, span, fingerprint="cd" * 32, instance="2")
    assert mesh.run_until(lambda: len(mesh.open_routes()) == 2)
    again = resume(mesh, client)
    assert mesh.run_to_end()
    assert again.tokens == []
    assert again.error is not None
    assert again.error.reason == "JOURNAL_ERROR"
