"""Every move that the state tables list happens: a story for each, and what follows from it.

A story says which moves it ``shows``, and is held to that; together with the transcripts in
tests/scenarios they show every row of every table, and no row that is not there.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from coordinator import states
from coordinator.echo import oracle
from coordinator.events import (
    CancelRequested,
    DrainRequested,
    LinkBroken,
    RequestFailed,
    StopMatched,
    WorkerLost,
    WorkerRegistered,
)
from coordinator.mesh_state import WorkerState
from coordinator.route import RoutePhase
from coordinator.scenario import Scenario
from coordinator.session import SessionPhase
from coordinator.settings import MeshPolicy
from coordinator.testing import MemoryMesh, Received, corrupt_token
from stagemesh.errors import JournalError
from stagemesh.frame import RowStatus, StepFrame
from stagemesh.topology import COORDINATOR_HOP

SCENARIOS = sorted((Path(__file__).parents[1] / "scenarios").glob("*.txt"))
PIPELINE = {"stage-0": "0-3", "stage-1": "3-6"}
PROMPT, LENGTH, KEY = (5, 6, 7), 12, (1).to_bytes(16, "big")
EXPECTED = oracle(PROMPT, LENGTH, layer_count=6)

R, W, S = RoutePhase, WorkerState, SessionPhase
Move = tuple[enum.Enum, enum.Enum]
STORIES: dict[str, tuple[Callable[[], None], set[Move]]] = {}


def shows(*wanted: Move) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """The moves that a story is there for."""

    def keep(story: Callable[[], None]) -> Callable[[], None]:
        STORIES[story.__name__] = (story, set(wanted))
        return story

    return keep


# What stories are made of


def mesh_of(*names: str, **limits: Any) -> MemoryMesh:
    """Workers that have just registered."""
    mesh = MemoryMesh(MeshPolicy(vocab_size=997, audit_budget=0.0, audit_first_streams=0, **limits))
    for name in names:
        mesh.join(name, PIPELINE.get(name, "0-6"))
    return mesh


def serving(*names: str, **limits: Any) -> MemoryMesh:
    """A mesh whose pipeline is open, and the full worker's route if it has one."""
    mesh = mesh_of(*names, **limits)
    assert mesh.run_until(lambda: len(mesh.open_routes()) == 1 + ("full" in names))
    return mesh


def ask(mesh: MemoryMesh, **more: Any) -> Received:
    return mesh.request(1, PROMPT, LENGTH, **more)


def answering(*names: str, tokens: int = 4, **limits: Any) -> tuple[MemoryMesh, Received]:
    """A mesh on whose pipeline a client has so many tokens."""
    mesh = serving(*names, **limits)
    client = ask(mesh)
    assert mesh.run_until(lambda: len(client.tokens) >= tokens)
    return mesh, client


def state_of(mesh: MemoryMesh, name: str) -> WorkerState | None:
    record = mesh.mesh.state.workers.get(mesh.workers[name].info.name)
    return record.state if record is not None else None


def phase_of(mesh: MemoryMesh) -> SessionPhase:
    state = mesh.mesh.state
    return (state.sessions.get(KEY) or state.ended[KEY]).phase


def until(mesh: MemoryMesh, name: str, state: WorkerState | None) -> None:
    assert mesh.run_until(lambda: state_of(mesh, name) is state), f"{name} never is {state}"


def until_open(mesh: MemoryMesh, *names: str) -> None:
    assert mesh.run_until(lambda: names in mesh.open_routes())


def answered_whole(mesh: MemoryMesh, client: Received) -> None:
    """Every token once, none contradicted, one end."""
    assert mesh.run_to_end()
    assert client.seen == EXPECTED
    assert [end.summary.completion_tokens for end in client.ends] == [LENGTH]
    assert client.error is None


def leaves(mesh: MemoryMesh, name: str) -> None:
    """It is told to leave, once, holds nothing any more, and never serves again."""
    assert mesh.run_until(lambda: bool(mesh.events("WorkerDrained")))
    mesh.run(60.0)
    assert [event.worker for event in mesh.events("WorkerDrained")] == [name]
    assert state_of(mesh, name) is W.DRAINING
    assert not any(name in workers for workers in mesh.open_routes())
    worker = mesh.workers[name].info
    mesh.feed(WorkerLost(worker.name, worker.instance, "it has left"))
    assert state_of(mesh, name) is None


def lie(mesh: MemoryMesh, last_stage: str) -> None:
    """Every token of this stage is another one than it should be."""

    def tamper(frame: StepFrame) -> StepFrame:
        sampled = frame.hop_to == COORDINATOR_HOP and frame.rows[0].token is not None
        if not sampled or frame.rows[0].token.source != last_stage:
            return frame
        return corrupt_token(frame)

    mesh.tampers.append(tamper)


# Routes


def opening_breaks(phase: RoutePhase, fault: Callable[[MemoryMesh], None]) -> None:
    mesh = mesh_of(*PIPELINE)
    client = ask(mesh)
    (live,) = mesh.mesh.state.routes.values()
    assert mesh.run_until(lambda: live.phase is phase)
    fault(mesh)
    assert mesh.run_until(lambda: live.phase is R.CLOSED)
    mesh.run(0.01)
    assert mesh.workers["stage-0"].fenced == live.epoch, "the attempt never comes back"
    assert client.tokens == []
    if not mesh.workers["stage-1"].alive:
        assert (state_of(mesh, "stage-0"), state_of(mesh, "stage-1")) == (W.JOINING, W.FAILED)
        mesh.restart("stage-1", instance="2")
    answered_whole(mesh, client)
    assert client.summary.recoveries == (), "it had not begun"
    assert all(chunk.epoch > live.epoch for chunk in client.chunks)


@shows((R.OPENING, R.CLOSED), (W.JOINING, W.FAILED))
def a_worker_dies_on_its_way_to_the_barrier() -> None:
    opening_breaks(R.OPENING, lambda mesh: mesh.kill("stage-1"))


@shows((R.LINKING, R.CLOSED))
def the_coordinators_own_link_gives_up() -> None:
    opening_breaks(R.LINKING, lambda mesh: mesh.feed(LinkBroken(1, "STAGE_UNREACHABLE", "refused")))


@shows((R.PROBING, R.CLOSED))
def a_worker_dies_over_the_probe() -> None:
    opening_breaks(R.PROBING, lambda mesh: mesh.kill("stage-1"))


# Workers


@shows((W.JOINING, W.SUSPECT), (W.SUSPECT, W.JOINING), (W.SUSPECT, W.FAILED), (W.FAILED, W.JOINING))
def a_worker_that_waits_for_a_partner_falls_silent_twice() -> None:
    mesh = mesh_of("stage-0")
    for worse in (W.SUSPECT, W.FAILED):
        mesh.stop("stage-0")
        until(mesh, "stage-0", worse)
        mesh.resume("stage-0")
        until(mesh, "stage-0", W.JOINING)  # it has never served, so it is not ready
    mesh.join("stage-1", "3-6")
    answered_whole(mesh, ask(mesh))
    assert state_of(mesh, "stage-0") is W.READY


@shows((W.JOINING, W.READY), (W.READY, W.SUSPECT), (W.SUSPECT, W.READY))
def a_stage_is_late_and_in_time_again() -> None:
    mesh, client = answering(*PIPELINE)
    mesh.stop("stage-1")
    until(mesh, "stage-1", W.SUSPECT)
    (live,) = mesh.mesh.state.routes.values()
    assert live.suspect, "who comes now avoids it"
    mesh.resume("stage-1")
    until(mesh, "stage-1", W.READY)
    assert not live.suspect
    answered_whole(mesh, client)
    assert client.summary.recoveries == ()


@shows((W.READY, W.FAILED), (R.OPEN, R.CLOSED), (S.DECODING, S.RECOVERING))
def a_stage_dies_over_an_answer() -> None:
    mesh, client = answering(*PIPELINE, "full")
    mesh.kill("stage-1")
    until(mesh, "stage-1", W.FAILED)
    answered_whole(mesh, client)
    (recovery,) = client.summary.recoveries
    assert (recovery.cause, recovery.to_route) == ("STAGE_UNREACHABLE", ("full",))
    mesh.restart("stage-1", instance="2")
    until_open(mesh, *PIPELINE)


@shows((W.JOINING, W.QUARANTINED))
def a_worker_fails_every_probe_until_it_has_reloaded() -> None:
    mesh = mesh_of(*PIPELINE)
    client = ask(mesh)

    def overflow(frame: StepFrame) -> StepFrame:
        if frame.hop_from != 1 or mesh.events("WorkerReinitialised"):
            return frame
        rows = tuple(row.failed(RowStatus.NON_FINITE, stage=1) for row in frame.rows)
        return replace(frame, rows=rows).sealed()

    mesh.tampers.append(overflow)
    until(mesh, "stage-1", W.QUARANTINED)
    assert state_of(mesh, "stage-0") is W.JOINING, "its partner is not to blame"
    answered_whole(mesh, client)
    assert client.summary.recoveries == ()
    assert mesh.mesh.state.recovery.history(mesh.workers["stage-1"].info.name).corruptions == 0


@shows((W.SUSPECT, W.QUARANTINED), (W.QUARANTINED, W.JOINING))
def a_late_stage_lies_when_it_goes_on() -> None:
    mesh, client = answering(*PIPELINE, "full", corruptions_consecutive_max=1)
    mesh.stop("stage-1")
    until(mesh, "stage-1", W.SUSPECT)
    lie(mesh, "stage-1")
    mesh.resume("stage-1")
    until(mesh, "stage-1", W.QUARANTINED)
    assert mesh.open_routes() == [("full",)]
    mesh.tampers.clear()
    answered_whole(mesh, client)
    assert client.summary.recoveries[0].worker == "stage-1"
    until_open(mesh, *PIPELINE)
    assert [event.worker for event in mesh.events("WorkerReinitialised")] == ["stage-1"]
    assert state_of(mesh, "stage-1") is W.READY


def quarantined() -> tuple[MemoryMesh, Received]:
    """The pipeline's last stage has lied, and its client has its answer from the full worker."""
    mesh, client = answering(*PIPELINE, "full", corruptions_consecutive_max=1)
    mesh.workers["stage-1"].refuse_commands = True
    lie(mesh, "stage-1")
    until(mesh, "stage-1", W.QUARANTINED)
    mesh.tampers.clear()
    return mesh, client


@shows((W.READY, W.QUARANTINED), (W.QUARANTINED, W.FAILED), (W.JOINING, W.QUARANTINED))
def a_liar_goes_away_and_dials_in_again() -> None:
    mesh, client = quarantined()
    worker = mesh.workers["stage-1"]
    mesh.feed(WorkerLost(worker.info.name, worker.info.instance, "connection reset"))
    assert state_of(mesh, "stage-1") is W.FAILED
    mesh.feed(WorkerRegistered(worker.info))
    assert state_of(mesh, "stage-1") is W.QUARANTINED, "the same process still owes a reload"
    answered_whole(mesh, client)
    assert mesh.open_routes() == [("full",)]
    worker.refuse_commands = False
    until_open(mesh, *PIPELINE)


@shows((W.QUARANTINED, W.DRAINING))
def a_liar_is_drained_while_it_reloads() -> None:
    mesh, client = quarantined()
    mesh.workers["stage-1"].refuse_commands = False
    mesh.feed(DrainRequested(mesh.workers["stage-1"].info.name))
    answered_whole(mesh, client)
    leaves(mesh, "stage-1")
    assert not mesh.events("WorkerReinitialised"), "nobody waits for that any more"


@shows((W.READY, W.DRAINING), (R.OPEN, R.DRAINING), (R.DRAINING, R.CLOSED))
def a_stage_lies_while_it_drains() -> None:
    mesh, client = answering(*PIPELINE, "full", corruptions_consecutive_max=1)
    mesh.feed(DrainRequested(mesh.workers["stage-1"].info.name))
    lie(mesh, "stage-1")
    assert mesh.run_until(lambda: mesh.open_routes() == [("full",)])
    answered_whole(mesh, client)
    assert client.summary.recoveries[0].worker == "stage-1"
    leaves(mesh, "stage-1")
    assert not mesh.events("WorkerQuarantined"), "one that leaves is not healed"


@shows((W.JOINING, W.DRAINING))
def a_worker_is_drained_while_its_route_opens() -> None:
    mesh = mesh_of(*PIPELINE, "full")
    mesh.feed(DrainRequested(mesh.workers["stage-1"].info.name))
    assert [event.attributes["cause"] for event in mesh.events("RouteClosed")] == ["STAGE_DRAINING"]
    client = ask(mesh)
    answered_whole(mesh, client)
    assert (client.summary.route, client.summary.recoveries) == (("full",), ())
    leaves(mesh, "stage-1")


@shows((W.SUSPECT, W.DRAINING), (W.DRAINING, W.FAILED), (W.JOINING, W.DRAINING))
def a_late_stage_is_drained_falls_silent_and_comes_back() -> None:
    mesh, client = answering(*PIPELINE, "full")
    mesh.stop("stage-1")
    until(mesh, "stage-1", W.SUSPECT)
    mesh.feed(DrainRequested(mesh.workers["stage-1"].info.name))
    assert state_of(mesh, "stage-1") is W.DRAINING
    until(mesh, "stage-1", W.FAILED)
    answered_whole(mesh, client)
    assert client.summary.recoveries[0].cause == "SILENT"
    mesh.resume("stage-1")
    leaves(mesh, "stage-1")


@shows((W.SUSPECT, W.FAILED), (W.FAILED, W.JOINING), (W.JOINING, W.DRAINING))
def a_silent_worker_is_asked_to_leave() -> None:
    """It hears that when it reports again. It is not failed twice meanwhile."""
    mesh, client = answering(*PIPELINE, "full")
    mesh.stop("stage-1")
    answered_whole(mesh, client)
    mesh.feed(DrainRequested(mesh.workers["stage-1"].info.name))
    mesh.run(60.0)
    assert state_of(mesh, "stage-1") is W.FAILED
    assert len(mesh.events("WorkerFailed")) == 1
    assert not mesh.events("WorkerDrained")
    mesh.resume("stage-1")
    leaves(mesh, "stage-1")


# Requests


def held_in(phase: SessionPhase, **more: Any) -> tuple[MemoryMesh, Received]:
    """A request that stays in this phase for a second, whatever it waits for."""
    if phase is S.QUEUED:
        mesh = mesh_of()
        client = ask(mesh, **more)
    else:
        mesh = serving(*PIPELINE)
        client = ask(mesh, **more)
        if phase is not S.PREFILLING:
            assert mesh.run_until(lambda: len(client.tokens) >= 4)
        if phase is S.RECOVERING:
            mesh.kill("stage-1")
            mesh.run(0.01)
        else:
            mesh.stop("stage-1")
    assert phase_of(mesh) is phase
    return mesh, client


def ended_once(mesh: MemoryMesh, client: Received, end: SessionPhase, said: str) -> None:
    """With a prefix of the answer, and nothing of it left in the mesh."""
    assert mesh.run_to_end()
    before = list(client.seen)
    for name in (name for name, worker in mesh.workers.items() if worker.alive):
        mesh.resume(name)
    mesh.run(5.0)
    assert client.seen == before == EXPECTED[: len(before)]
    assert len(client.ends) == 1
    assert said == (client.error.reason if client.error else client.finish.reason)
    assert phase_of(mesh) is end
    assert mesh.mesh.snapshot(mesh.now).running == 0
    assert not any(worker.kv_tokens for worker in mesh.workers.values() if worker.alive)


def cancelled_in(phase: SessionPhase) -> None:
    mesh, client = held_in(phase)
    mesh.feed(CancelRequested(KEY))
    ended_once(mesh, client, S.CANCELLED, "cancelled")


def late_in(phase: SessionPhase) -> None:
    mesh, client = held_in(phase, deadline=1.0)
    ended_once(mesh, client, S.FAILED, "DEADLINE_EXCEEDED")
    assert client.error.metadata["position"] == str(len(client.seen)), "where it may be gone on"
    assert mesh.now < 10.0


for _phase in (S.QUEUED, S.PREFILLING, S.DECODING, S.RECOVERING):
    STORIES[f"cancelled while {_phase.value}"] = (
        partial(cancelled_in, _phase),
        {(_phase, S.CANCELLED)},
    )
    STORIES[f"past its deadline while {_phase.value}"] = (
        partial(late_in, _phase),
        {(_phase, S.FAILED)},
    )


@shows((S.PREFILLING, S.RECOVERING), (S.RECOVERING, S.DECODING), (S.DECODING, S.FINISHED))
def a_route_dies_before_the_first_token() -> None:
    mesh = serving(*PIPELINE, "full")
    client = ask(mesh)
    assert phase_of(mesh) is S.PREFILLING
    mesh.kill("stage-1")
    answered_whole(mesh, client)
    (recovery,) = client.summary.recoveries
    assert (recovery.kept, recovery.replayed) == (0, len(PROMPT))


def brought_back(mesh: MemoryMesh, kept: int) -> Received:
    return ask(mesh, accepted=tuple(EXPECTED[:kept]), recovered=True)


@shows((S.QUEUED, S.RECOVERING))
def a_journal_brings_back_half_an_answer() -> None:
    mesh = mesh_of(*PIPELINE)
    client = brought_back(mesh, 4)
    assert phase_of(mesh) is S.QUEUED
    assert mesh.run_to_end()
    assert client.seen == EXPECTED[4:], "what was told is not told again"
    assert [end.summary.completion_tokens for end in client.ends] == [LENGTH]


@shows((S.QUEUED, S.FINISHED))
def a_journal_brings_back_an_answer_that_lacks_only_its_end() -> None:
    mesh = mesh_of()
    client = brought_back(mesh, LENGTH)
    ended_once(mesh, client, S.FINISHED, "length")
    assert (client.seen, client.summary.completion_tokens) == ([], LENGTH)


@shows((S.RECOVERING, S.FINISHED))
def a_stop_string_is_found_when_the_route_is_already_lost() -> None:
    mesh, client = held_in(S.RECOVERING)
    mesh.restart("stage-1", instance="2")
    mesh.feed(StopMatched(KEY, 3, "."))
    ended_once(mesh, client, S.FINISHED, "stop")
    assert (client.summary.completion_tokens, client.summary.matched_stop) == (3, ".")
    assert len(mesh.open_routes()) == 1, "which could have gone on with it"


def unkept(end: SessionPhase) -> None:
    """Its client is told of a failure instead, so it may ask again."""
    mesh, client = answering(*PIPELINE)
    if end is S.CANCELLED:
        mesh.feed(CancelRequested(KEY))
    assert mesh.run_to_end()
    assert phase_of(mesh) is end
    assert mesh.mesh.knows(KEY)
    mesh.feed(RequestFailed(KEY, JournalError("full")))
    (shown,) = mesh.mesh.snapshot(mesh.now).generations
    assert (shown.phase, shown.error_reason) == ("failed", "JOURNAL_ERROR")
    assert len(client.ends) == 1
    assert not mesh.mesh.knows(KEY)
    answered_whole(mesh, ask(mesh))


STORIES["a complete answer that was not kept"] = (
    partial(unkept, S.FINISHED),
    {(S.FINISHED, S.FAILED)},
)
STORIES["a cancellation that was not kept"] = (
    partial(unkept, S.CANCELLED),
    {(S.CANCELLED, S.FAILED)},
)


# Held to their word


@pytest.mark.parametrize("name", STORIES)
def test_a_story_shows_what_it_says(name: str, moves: set[Move]) -> None:
    story, wanted = STORIES[name]
    story()
    assert wanted <= moves


def test_every_listed_move_happens(moves: set[Move]) -> None:
    for path in SCENARIOS:
        Scenario().run(path.read_text(encoding="utf-8"))
    shown = moves.union(*(wanted for _, wanted in STORIES.values()))
    assert shown == {*states.ROUTE_MOVES, *states.WORKER_MOVES, *states.REQUEST_MOVES}
