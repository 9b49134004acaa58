"""The whole machine on a mesh in memory: faults, fences, limits, one property over all of them."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.admission import DEADLINES_OVER_MAX
from coordinator.core import Mesh
from coordinator.echo import oracle
from coordinator.events import (
    CancelRequested,
    DrainAllRequested,
    DrainRequested,
    Event,
    FrameReturned,
    HopFaultSeen,
    LinkBroken,
    StopMatched,
    WorkerLost,
    WorkerRegistered,
)
from coordinator.instructions import AcceptTokens, FailRequest, SendStep
from coordinator.memory_worker import worker_info
from coordinator.settings import FallbackPolicy, MeshPolicy
from coordinator.testing import MemoryMesh, corrupt_token
from stagemesh.errors import InvalidConfiguration
from stagemesh.frame import FrameKind
from stagemesh.sampling import SamplingSpec
from stagemesh.topology import COORDINATOR_HOP

STAGES = {"stage-0": "0-2", "stage-1": "2-4", "stage-2": "4-6"}
PROMPT = tuple(range(2, 40))


def policy(**limits):
    return MeshPolicy(vocab_size=997, **limits)


def booted(*, full=True, **limits):
    mesh = MemoryMesh(policy(**limits))
    for name, span in STAGES.items():
        mesh.join(name, span)
    if full:
        mesh.join("full", "0-6")
    assert mesh.run_until(lambda: len(mesh.open_routes()) == 1 + full)
    return mesh


def sampling(number):
    return SamplingSpec(temperature=0.8 if number % 2 else 0.0, seed=number)


def ask(mesh, count=3, tokens=30):
    return [
        mesh.request(number, PROMPT[number:], tokens, sampling=sampling(number))
        for number in range(count)
    ]


def undisturbed(number, tokens=30):
    return oracle(PROMPT[number:], tokens, layer_count=6, sampling=sampling(number))


def assert_exactly_once(clients, tokens=30):
    for number, client in enumerate(clients):
        assert client.error is None
        assert client.tokens == undisturbed(number, tokens)
        assert len(client.ends) == 1


def until_each_has(mesh, clients, count):
    assert mesh.run_until(lambda: all(len(client.tokens) >= count for client in clients))


def tamper_once(mesh, condition, change):
    done = []

    def tamper(frame):
        if done or not condition(frame):
            return frame
        done.append(frame)
        return change(frame)

    mesh.tampers.append(tamper)
    return done


def from_last_stage(frame):
    return frame.hop_to == COORDINATOR_HOP and frame.epoch == 1 and frame.rows[0].token is not None


def causes(client):
    return [(one.action, one.cause) for one in client.summary.recoveries]


def test_every_answer_is_what_one_process_would_have_said():
    mesh = booted()
    clients = ask(mesh, 8)
    assert mesh.run_to_end()
    assert_exactly_once(clients)
    assert all(client.summary.route == tuple(STAGES) for client in clients)


def test_a_mesh_of_one_full_worker_answers_by_itself():
    mesh = MemoryMesh(policy())
    mesh.join("full", "0-6")
    clients = ask(mesh)
    assert mesh.run_to_end()
    assert_exactly_once(clients)


@pytest.mark.parametrize("fault", ["kill", "stop"])
@pytest.mark.parametrize("name", [*STAGES, "full"])
@pytest.mark.parametrize("after", [0, 1, 10, 29], ids=lambda count: f"after {count} tokens")
def test_a_worker_that_dies_or_stops_costs_no_token(fault, name, after):
    mesh = booted()
    clients = ask(mesh)
    until_each_has(mesh, clients, after)
    getattr(mesh, fault)(name)
    assert mesh.run_to_end()
    assert_exactly_once(clients)
    if name == "full":
        assert not any(client.summary.recoveries for client in clients)
    elif after < 29:
        assert all(client.summary.recoveries[0].worker == name for client in clients)


def test_a_stopped_worker_is_failed_within_twice_the_token_deadline():
    mesh = booted()
    clients = ask(mesh, 1)
    until_each_has(mesh, clients, 5)
    stopped_at = mesh.now
    mesh.stop("stage-1")
    assert mesh.run_until(lambda: bool(mesh.events("WorkerFailed")))
    assert mesh.now - stopped_at <= 2.0
    assert {event.worker for event in mesh.events("WorkerSuspect")} == {"stage-1"}


def test_new_requests_avoid_a_route_with_a_suspect_worker():
    mesh = booted()
    (first,) = ask(mesh, 1)
    until_each_has(mesh, [first], 5)
    mesh.stop("stage-1")
    assert mesh.run_until(lambda: bool(mesh.events("WorkerSuspect")))
    second = mesh.request(5, PROMPT, 3)
    mesh.resume("stage-1")
    assert mesh.run_to_end()
    assert second.summary.route == ("full",)
    assert not first.summary.recoveries
    assert mesh.events("WorkerHealthy")


def test_the_full_worker_dying_during_the_reroute_is_survived_when_it_comes_back():
    mesh = booted()
    clients = ask(mesh)
    until_each_has(mesh, clients, 10)
    mesh.kill("stage-1")
    mesh.run(0.02)
    mesh.kill("full")
    mesh.run(3.0)
    mesh.restart("full", instance="2")
    assert mesh.run_to_end()
    assert_exactly_once(clients)


def test_when_every_route_is_gone_a_request_ends_with_a_typed_error_and_its_position():
    mesh = booted(fallback_wait_s_max=5.0)
    clients = ask(mesh)
    until_each_has(mesh, clients, 10)
    mesh.kill("stage-1")
    mesh.kill("full")
    assert mesh.run_to_end()
    for number, client in enumerate(clients):
        assert client.error.reason == "ROUTE_UNAVAILABLE"
        assert client.error.metadata["position"] == str(len(client.tokens))
        assert "layers 2-4 are hosted by nobody" in client.error.metadata["cause"]
        assert client.tokens == undisturbed(number)[: len(client.tokens)]


def test_a_restarted_stage_heals_the_pipeline_and_new_requests_use_it():
    mesh = booted()
    clients = ask(mesh)
    until_each_has(mesh, clients, 10)
    mesh.kill("stage-1")
    assert mesh.run_to_end()
    mesh.restart("stage-1", instance="2")
    assert mesh.run_until(lambda: tuple(STAGES) in mesh.open_routes())
    after = mesh.request(9, PROMPT, 5)
    assert mesh.run_to_end()
    assert after.summary.route == tuple(STAGES)


def test_a_spare_stage_takes_the_dead_ones_place_before_the_full_worker_is_used():
    mesh = booted()
    mesh.join("spare", "2-4")
    clients = ask(mesh)
    until_each_has(mesh, clients, 5)
    mesh.kill("stage-1")
    assert mesh.run_to_end()
    assert_exactly_once(clients)
    assert all(client.summary.route == ("stage-0", "spare", "stage-2") for client in clients)


@pytest.mark.parametrize(
    ("limits", "kv_budget_tokens"), [({"fallback_requests_max": 4}, 0), ({}, 400)]
)
def test_a_displaced_request_does_not_starve_behind_new_ones(limits, kv_budget_tokens):
    """The full worker has more new requests than it takes displaced ones, or as many as its cache
    holds, and another one comes whenever one ends."""
    mesh = MemoryMesh(policy(fallback_wait_s_max=5.0, audit_budget=0.0, **limits))
    mesh.join("full", "0-6", kv_budget_tokens=kv_budget_tokens)
    assert mesh.run_until(lambda: len(mesh.open_routes()) == 1)
    others = []

    def another():
        part = 7 * len(others) % 30  # they end one by one, and all need the same room
        others.append(mesh.request(100 + len(others), PROMPT[part:], 20 + part))

    def one_is_missing():
        return sum(not one.ends for one in others) < 8

    while one_is_missing():
        another()
    for name, span in STAGES.items():
        mesh.join(name, span)
    assert mesh.run_until(lambda: tuple(STAGES) in mesh.open_routes())
    client = mesh.request(1, PROMPT[1:], 100, sampling=sampling(1))
    until_each_has(mesh, [client], 5)
    mesh.kill("stage-1")
    while not client.ends:
        if one_is_missing():
            another()
        assert mesh.run_until(lambda: bool(client.ends) or one_is_missing())
    assert (client.error, client.tokens) == (None, undisturbed(1, 100))
    assert client.summary.route == ("full",)
    assert not [one.error for one in others if one.error]


def three_displaced(**limits):
    """A mesh that has just lost the route of three requests, displaced in their order."""
    mesh = booted(audit_budget=0.0, audit_first_streams=0, **limits)
    clients = ask(mesh)
    until_each_has(mesh, clients, 5)
    mesh.kill("stage-1")
    return mesh, clients


def test_displaced_requests_are_served_in_the_order_in_which_they_were_displaced():
    mesh, clients = three_displaced(fallback_requests_max=1)
    assert mesh.run_to_end()
    assert_exactly_once(clients)
    for one, behind in pairwise(clients):
        (record,) = behind.summary.recoveries
        assert one.token_times[-1] <= behind.token_times[record.kept]


def test_more_displaced_requests_than_the_line_holds_are_told_so():
    mesh, clients = three_displaced(fallback_queue_max=1, fallback_requests_max=1)
    assert mesh.run_to_end()
    errors = [client.error and client.error.reason for client in clients]
    assert errors == [None, "OVERLOADED", "OVERLOADED"]
    assert clients[0].tokens == undisturbed(0)
    for number, client in enumerate(clients[1:], 1):
        assert client.error.metadata["position"] == str(len(client.tokens))
        assert 5 <= len(client.tokens) < 30
        assert client.tokens == undisturbed(number)[: len(client.tokens)]


def test_a_mesh_whose_recovery_budget_is_spent_ends_requests_with_their_position():
    mesh = booted(recoveries_burst_max=1, recoveries_per_s=0.001)
    clients = ask(mesh, 2)
    until_each_has(mesh, clients, 5)
    mesh.kill("stage-1")
    assert mesh.run_to_end()
    saved, given_up = clients
    assert saved.error is None
    assert saved.tokens == undisturbed(0)
    assert given_up.error.reason == "ROUTE_UNAVAILABLE"
    assert given_up.error.message == "the recovery budget is spent"
    assert given_up.error.metadata["position"] == str(len(given_up.tokens))
    assert 5 <= len(given_up.tokens) < 30
    assert given_up.tokens == undisturbed(1)[: len(given_up.tokens)]


def test_a_request_that_is_recovered_in_vain_too_often_ends_with_its_position():
    """The last stage lies in every step, reloaded or not; there is no other route."""
    mesh = booted(full=False, fruitless_recoveries_max=2)
    lying, honest = ask(mesh, 2)
    until_each_has(mesh, [lying, honest], 5)
    request = next(iter(mesh.clients))

    def lie(frame):
        ours = [index for index, row in enumerate(frame.rows) if row.request == request]
        is_answer = frame.hop_to == COORDINATOR_HOP and ours and frame.rows[ours[0]].token
        return corrupt_token(frame, ours[0]) if is_answer else frame

    mesh.tampers.append(lie)
    assert mesh.run_to_end()
    assert lying.error.reason == "TOKEN_REJECTED"
    assert lying.error.metadata["position"] == str(len(lying.tokens))
    assert lying.tokens == undisturbed(0)[: len(lying.tokens)]
    taken = [one.action for one in lying.summary.recoveries]
    assert (len(taken), taken[-1]) == (3, "fail")


def test_forbid_never_uses_the_full_worker_for_a_displaced_request():
    mesh = booted(fallback=FallbackPolicy.FORBID, audit_budget=0.0)
    clients = ask(mesh)
    until_each_has(mesh, clients, 5)
    mesh.kill("stage-1")
    mesh.run(2.0)
    mesh.restart("stage-1", instance="2")
    assert mesh.run_to_end()
    assert_exactly_once(clients)
    assert mesh.workers["full"].steps_computed == 3


def test_where_fallback_is_forbidden_a_mesh_without_a_pipeline_is_not_ready():
    mesh = booted(fallback=FallbackPolicy.FORBID, audit_budget=0.0)
    assert mesh.mesh.snapshot(mesh.now).ready
    mesh.kill("stage-1")
    mesh.run(2.0)
    seen = mesh.mesh.snapshot(mesh.now)
    assert [route.phase for route in seen.routes if route.phase == "open"]
    assert not seen.ready
    assert seen.not_ready_reason == "layers 2-4 are hosted by nobody, and fallback is forbidden"
    mesh.restart("stage-1", instance="2")
    mesh.run(2.0)
    assert mesh.mesh.snapshot(mesh.now).ready


def test_a_corrupt_token_is_rejected_before_the_client_sees_it_and_replayed():
    mesh = booted()
    clients = ask(mesh)
    until_each_has(mesh, clients, 10)
    done = tamper_once(mesh, from_last_stage, corrupt_token)
    assert mesh.run_to_end()
    assert done
    assert_exactly_once(clients)
    assert [event.worker for event in mesh.events("TokenRejected")] == ["stage-2"]
    assert [causes(c) for c in clients if c.summary.recoveries] == [[("replay", "TOKEN_REJECTED")]]


def test_no_token_is_handed_out_beyond_the_accepted_watermark_nor_one_that_was_not_accepted():
    """Through a corrupt token and a lost stage: what goes out is what the stream holds."""
    mesh = booted()
    machine, handle = mesh.mesh, mesh.mesh.handle
    ends = []

    def watched(event, now):
        given = handle(event, now)
        for one in given:
            if isinstance(one, AcceptTokens):
                state = machine.state
                session = state.sessions.get(one.request) or state.ended[one.request]
                end = one.first_index + len(one.chunks)
                assert end <= session.stream.accepted
                first = session.prompt_length + one.first_index
                held = session.stream.tokens(first, first + len(one.chunks))
                assert tuple(chunk.token_id for chunk in one.chunks) == held
                ends.append(end)
        return given

    machine.handle = watched
    clients = ask(mesh)
    until_each_has(mesh, clients, 10)
    done = tamper_once(mesh, from_last_stage, corrupt_token)
    until_each_has(mesh, clients, 20)
    mesh.kill("stage-1")
    assert mesh.run_to_end()
    assert done
    assert_exactly_once(clients)
    assert len(ends) >= sum(len(client.tokens) for client in clients) > 0


def test_a_stage_that_keeps_corrupting_is_quarantined_reloaded_and_taken_back():
    mesh = booted()
    clients = ask(mesh)
    until_each_has(mesh, clients, 10)
    mesh.tampers.append(lambda f: corrupt_token(f) if from_last_stage(f) else f)
    assert mesh.run_to_end()
    assert_exactly_once(clients)
    assert [event.worker for event in mesh.events("WorkerQuarantined")] == ["stage-2"]
    assert mesh.run_until(lambda: tuple(STAGES) in mesh.open_routes())


def test_what_links_find_wrong_counts_against_the_worker_that_sent_it():
    mesh = booted()
    for _ in range(3):
        assert mesh.run_until(lambda: tuple(STAGES) in mesh.open_routes())
        epoch = next(e for e, r in mesh.mesh.state.routes.items() if not r.is_full)
        mesh.feed(
            HopFaultSeen("stage-2", epoch, 9, 1, 2, "NON_FINITE_ACTIVATION", "NaN", fatal=True)
        )
    assert [event.worker for event in mesh.events("WorkerQuarantined")] == ["stage-1"]
    assert mesh.run_until(lambda: tuple(STAGES) in mesh.open_routes())


def test_a_quarantined_worker_cannot_come_back_by_dialling_again():
    mesh = booted()
    worker = mesh.workers["stage-2"]
    worker.refuse_commands = True
    clients = ask(mesh)
    until_each_has(mesh, clients, 10)
    mesh.tampers.append(lambda f: corrupt_token(f) if from_last_stage(f) else f)
    assert mesh.run_to_end()
    mesh.feed(WorkerLost(worker.info.name, worker.info.instance, "connection reset"))
    mesh.feed(WorkerRegistered(worker.info))
    mesh.run(5.0)
    assert mesh.open_routes() == [("full",)]
    worker.refuse_commands = False
    mesh.feed(WorkerRegistered(replace(worker.info, instance="another process")))
    assert mesh.run_until(lambda: tuple(STAGES) in mesh.open_routes())


def test_a_quarantined_worker_that_cannot_reload_is_given_up():
    mesh = booted()
    mesh.workers["stage-2"].refuse_commands = True
    clients = ask(mesh)
    until_each_has(mesh, clients, 10)
    mesh.tampers.append(lambda f: corrupt_token(f) if from_last_stage(f) else f)
    assert mesh.run_to_end()
    assert_exactly_once(clients)
    assert mesh.run_until(lambda: bool(mesh.events("WorkerGivenUp")))
    assert len(mesh.events("ReinitialisationFailed")) == 3
    assert mesh.open_routes() == [("full",)]


@pytest.mark.parametrize("name", STAGES)
def test_a_lost_cache_is_rebuilt_on_the_same_route(name):
    mesh = booted()
    clients = ask(mesh)
    until_each_has(mesh, clients, 10)
    mesh.forget(name, 1)
    assert mesh.run_to_end()
    assert_exactly_once(clients)
    assert causes(clients[1]) == [("replay", "CACHE_LOST")]


def test_chunks_already_under_way_when_a_cache_is_lost_say_nothing_more():
    mesh = booted(prefill_chunk_tokens=4, prefill_chunk_tokens_shared=4)
    (client,) = ask(mesh, 1)
    assert mesh.run_until(lambda: mesh.workers["stage-1"].computed_step >= 5)
    mesh.forget("stage-1", 0)
    assert mesh.run_to_end()
    assert_exactly_once([client])
    assert causes(client) == [("replay", "CACHE_LOST")]
    assert len(mesh.events("RowFailed")) == 1


def test_the_survivors_of_a_lost_route_are_fenced_and_hold_nothing_of_it():
    mesh = booted()
    clients = ask(mesh)
    until_each_has(mesh, clients, 5)
    mesh.kill("stage-1")
    mesh.run(0.1)
    for name in ("stage-0", "stage-2"):
        assert mesh.workers[name].fenced == 1
        assert mesh.workers[name].stage is None


def run_cache_ahead(mesh):
    cache = next(iter(mesh.workers["stage-1"].stage.caches.values()))
    cache.forward(2, [123])
    cache.token_ids.append(7)


def test_a_stage_whose_cache_ran_ahead_is_rewound():
    mesh = booted()
    clients = ask(mesh, 1)
    until_each_has(mesh, clients, 10)
    run_cache_ahead(mesh)
    assert mesh.run_to_end()
    assert_exactly_once(clients)
    assert causes(clients[0]) == [("rewind", "POSITION_MISMATCH")]


def test_a_stage_whose_cache_is_short_is_replayed_when_the_rewind_fails():
    mesh = booted()
    clients = ask(mesh, 1)
    until_each_has(mesh, clients, 10)
    next(iter(mesh.workers["stage-1"].stage.caches.values())).trim(5)
    assert mesh.run_to_end()
    assert_exactly_once(clients)
    assert causes(clients[0]) == [("rewind", "POSITION_MISMATCH"), ("replay", "REWIND_FAILED")]


def test_a_cache_lost_twice_on_the_only_route_is_rebuilt_twice():
    mesh = booted(full=False)
    clients = ask(mesh)
    for count in (5, 12):
        until_each_has(mesh, clients, count)
        mesh.forget("stage-1", 1)
    assert mesh.run_to_end()
    assert_exactly_once(clients)
    assert causes(clients[1]) == [("replay", "CACHE_LOST")] * 2


@pytest.mark.parametrize(
    ("restarted", "fault", "action", "to_route"),
    [
        ("full", lambda mesh: mesh.kill("stage-1"), "reroute", ("full",)),
        ("stage-0", lambda mesh: mesh.kill("stage-1"), "reroute", ("full",)),
        ("full", lambda mesh: mesh.forget("stage-1", 0), "replay", tuple(STAGES)),
        ("full", run_cache_ahead, "rewind", tuple(STAGES)),
    ],
    ids=["a newer route", "an older route", "replay", "rewind"],
)
def test_a_recovery_names_the_route_that_made_the_next_token(restarted, fault, action, to_route):
    mesh = booted(audit_budget=0.0, audit_first_streams=0)
    mesh.kill(restarted)
    mesh.restart(restarted, instance="2")
    mesh.run(2.0)
    assert len(mesh.open_routes()) == 2
    (client,) = clients = ask(mesh, 1)
    until_each_has(mesh, clients, 10)
    before = client.chunks[-1].epoch
    fault(mesh)
    assert mesh.run_to_end()
    assert_exactly_once(clients)
    (record,) = client.summary.recoveries
    assert (record.action, record.to_route) == (action, to_route)
    assert record.epoch == client.chunks[record.kept].epoch
    if action == "reroute":
        assert (record.epoch > before) is (restarted == "full")
    else:
        assert record.epoch == before
    known = len(PROMPT) + record.kept
    assert record.replayed == known if action != "rewind" else 0 < record.replayed < known


def test_a_frame_lost_for_good_is_noticed_and_the_route_replaced():
    mesh = booted()
    clients = ask(mesh)
    until_each_has(mesh, clients, 10)
    tamper_once(mesh, lambda f: f.hop_from == 1 and f.kind is FrameKind.DECODE, lambda _: None)
    assert mesh.run_to_end()
    assert_exactly_once(clients)
    assert mesh.mesh.state.counters["routes_stalled"] == 1


def test_a_step_that_overtakes_another_ends_the_route():
    mesh = booted()
    clients = ask(mesh)
    until_each_has(mesh, clients, 10)
    tamper_once(mesh, from_last_stage, lambda _: None)
    assert mesh.run_to_end()
    assert_exactly_once(clients)
    assert mesh.mesh.state.counters["frames_unexpected"] == 1


def test_a_repeated_frame_changes_nothing():
    mesh = booted()
    clients = ask(mesh)
    seen = tamper_once(mesh, from_last_stage, lambda frame: frame)
    until_each_has(mesh, clients, 10)
    mesh.feed(FrameReturned(seen[0]))
    assert mesh.run_to_end()
    assert_exactly_once(clients)
    assert mesh.mesh.state.counters["frames_unexpected"] == 1
    assert not any(client.summary.recoveries for client in clients)


def test_a_frame_with_other_rows_than_were_sent_ends_the_route():
    mesh = booted()
    clients = ask(mesh)
    until_each_has(mesh, clients, 10)

    def swap(frame):
        row = replace(frame.rows[0], request=bytes(15) + b"\x63")
        return replace(frame, rows=(row, *frame.rows[1:])).sealed()

    tamper_once(mesh, from_last_stage, swap)
    assert mesh.run_to_end()
    assert_exactly_once(clients)
    assert mesh.mesh.state.counters["frames_mislabelled"] == 1


def another_request(row):
    return replace(row, request=bytes(15) + b"\x63")


def another_token(row):
    return replace(row, token_ids=(row.token_ids[0] ^ 1,))


@pytest.mark.parametrize("change", [another_request, another_token])
@pytest.mark.parametrize(
    ("hop_from", "hop", "blamed"),
    [
        (COORDINATOR_HOP, "-1→0", ""),
        (0, "0→1", "stage-0"),
        (1, "1→2", "stage-1"),
        (2, "2→-1", "stage-2"),
    ],
)
def test_rows_changed_under_true_checksums_are_laid_at_the_door_of_who_sent_them(
    hop_from, hop, blamed, change
):
    mesh = booted()
    clients = ask(mesh)
    until_each_has(mesh, clients, 10)

    def decodes_there(frame):
        return frame.kind is FrameKind.DECODE and (frame.epoch, frame.hop_from) == (1, hop_from)

    struck = tamper_once(
        mesh,
        decodes_there,
        lambda frame: replace(frame, rows=(change(frame.rows[0]), *frame.rows[1:])).sealed(),
    )
    assert mesh.run_to_end()
    assert_exactly_once(clients)
    (told,) = [event for event in mesh.published if event.type == "FrameMislabelled"]
    assert (told.worker, told.attributes["hop"]) == (blamed, hop)
    assert told.attributes["step"] == str(struck[0].step)


@pytest.mark.parametrize(
    "event",
    [
        HopFaultSeen("stage-0", 1, 9, 0, 1, "STAGE_UNREACHABLE", "gave up", fatal=True),
        LinkBroken(1, "STAGE_UNREACHABLE", "gave up"),
    ],
    ids=["between stages", "from the coordinator"],
)
def test_a_link_that_gives_up_ends_its_route_and_costs_no_token(event):
    mesh = booted()
    clients = ask(mesh)
    until_each_has(mesh, clients, 10)
    mesh.feed(event)
    assert mesh.run_to_end()
    assert_exactly_once(clients)
    blamed = {one.worker for c in clients for one in c.summary.recoveries}
    assert blamed == {"stage-1" if isinstance(event, HopFaultSeen) else "stage-0"}
    assert mesh.run_until(lambda: tuple(STAGES) in mesh.open_routes())


def test_a_fault_the_link_repaired_is_only_counted():
    mesh = booted()
    clients = ask(mesh)
    until_each_has(mesh, clients, 5)
    mesh.feed(HopFaultSeen("stage-1", 1, 9, 0, 1, "CHECKSUM_MISMATCH"))
    mesh.feed(HopFaultSeen("stage-1", 1, 9, 0, 1, "anything a worker may say"))
    assert mesh.run_to_end()
    assert mesh.mesh.state.counters["hop_faults.checksum_mismatch"] == 1
    assert mesh.mesh.state.counters["hop_faults.other"] == 1
    assert not any(client.summary.recoveries for client in clients)


def test_a_pipeline_that_answers_the_probe_otherwise_than_the_full_worker_is_refused():
    mesh = MemoryMesh(policy())
    mesh.join("full", "0-6")
    mesh.run(1.0)

    def wrong(frame):
        return corrupt_token(frame) if frame.epoch == 2 else frame

    mesh.tampers.append(wrong)
    for name, span in STAGES.items():
        mesh.join(name, span)
    mesh.run(0.3)
    (refused,) = mesh.events("RouteRefused")
    assert refused.attributes["detail"].startswith("probe 0: token")
    assert mesh.open_routes() == [("full",)]
    assert mesh.run_until(lambda: tuple(STAGES) in mesh.open_routes())


def test_an_idle_route_that_answers_its_canary_otherwise_is_closed():
    mesh = booted(canary_interval_s=5.0)
    tamper_once(
        mesh,
        lambda f: f.hop_to == COORDINATOR_HOP and f.epoch == 1 and f.rows[0].token,
        corrupt_token,
    )
    assert mesh.run_until(lambda: bool(mesh.events("RouteRefused")), seconds=10)
    assert mesh.events("RouteRefused")[0].attributes["detail"].startswith("canary: probe 0")


@pytest.mark.parametrize(("dtype", "closed"), [("f32", True), ("bf16", False)])
def test_an_undecided_canary_may_differ_by_what_its_dtype_rounds_away(dtype, closed):
    """The token of an `EchoStage` is decided by 0.25 to 4.25."""
    mesh = MemoryMesh(policy(canary_interval_s=5.0, probe_margin_tolerance=0.43))
    for name, span in STAGES.items():
        mesh.join(name, span, dtype=dtype)
    assert mesh.run_until(lambda: len(mesh.open_routes()) == 1)
    tampered = tamper_once(
        mesh,
        lambda f: f.hop_to == COORDINATOR_HOP and f.epoch == 1 and f.rows[0].token,
        corrupt_token,
    )
    mesh.run(8.0)
    assert tampered
    assert bool(mesh.events("RouteRefused")) == closed


def test_a_barrier_that_nobody_reaches_is_broken_and_tried_again_with_another_epoch():
    mesh = MemoryMesh(policy(barrier_timeout_s=1.0))
    mesh.join("full", "0-6")
    mesh.stop("full")
    mesh.run(1.5)
    assert [e.attributes["absent"] for e in mesh.events("BarrierBroken")] == ["full"]
    mesh.resume("full")
    assert mesh.run_until(lambda: mesh.open_routes() == [("full",)])
    assert mesh.mesh.snapshot(mesh.now).routes[0].epoch > 1


def test_a_worker_that_hosts_another_span_than_it_registered_is_refused_at_the_barrier():
    mesh = MemoryMesh(policy())
    mesh.join("full", "0-6")
    mesh.workers["full"].info = worker_info("full", "0-5")
    mesh.run(0.5)
    assert mesh.open_routes() == []
    assert "hosts span 0-5" in mesh.events("RouteClosed")[0].attributes["detail"]


def test_a_worker_with_other_weights_is_turned_away():
    mesh = booted()
    mesh.join("stranger", "0-6", fingerprint="cd" * 32)
    assert "fingerprint" in mesh.events("WorkerRefused")[0].attributes["reason"]
    assert "stranger" not in {view.info.name for view in mesh.mesh.snapshot(mesh.now).workers}


def test_a_late_report_of_a_lost_process_does_not_lose_its_successor():
    mesh = booted()
    mesh.restart("stage-1", instance="2")
    mesh.feed(WorkerLost("stage-1", "1", "old stream ended"))
    assert mesh.run_until(lambda: tuple(STAGES) in mesh.open_routes())


def test_a_cancelled_request_frees_its_caches_on_every_stage():
    mesh = booted()
    (client,) = ask(mesh, 1)
    until_each_has(mesh, [client], 5)
    mesh.feed(CancelRequested(bytes(16)))
    mesh.run(0.5)
    assert client.finish.reason == "cancelled"
    assert len(client.ends) == 1
    assert [mesh.workers[name].stage.kv_tokens for name in STAGES] == [0, 0, 0]


def test_a_request_is_cancelled_while_it_queues():
    mesh = MemoryMesh(policy())
    (client,) = ask(mesh, 1)
    mesh.feed(CancelRequested(bytes(16)))
    assert client.finish.reason == "cancelled"


def test_a_stop_token_ends_the_answer_and_is_counted():
    mesh = booted()
    stop = undisturbed(0)[6]
    client = mesh.request(0, PROMPT, 30, sampling=sampling(0), stop_token_ids=frozenset({stop}))
    assert mesh.run_to_end()
    assert client.finish.reason == "stop"
    assert client.tokens == undisturbed(0)[:7]


def test_a_stop_string_found_by_the_edge_cuts_the_answer_and_drops_what_overshot():
    mesh = booted()
    (client,) = ask(mesh, 1)
    until_each_has(mesh, [client], 8)
    mesh.feed(StopMatched(bytes(16), 6, "END"))
    assert client.finish.reason == "stop"
    assert (client.summary.completion_tokens, client.summary.matched_stop) == (6, "END")


def test_a_request_past_its_own_deadline_fails_with_what_it_reached():
    mesh = booted()
    client = mesh.request(1, PROMPT, 500, deadline=mesh.now + 0.5)
    assert mesh.run_to_end()
    assert client.error.reason == "DEADLINE_EXCEEDED"
    assert client.summary.completion_tokens == len(client.tokens) > 0


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "reason"),
    [((), 5, "INVALID_REQUEST"), ((1,), 0, "INVALID_REQUEST"), ((1,) * 100, 5, "CONTEXT_EXCEEDED")],
)
def test_an_impossible_request_is_refused_at_once(prompt, max_tokens, reason):
    mesh = booted(context_tokens_max=100)
    client = mesh.request(1, prompt, max_tokens)
    assert client.error.reason == reason


def test_an_answer_ends_where_the_context_does():
    mesh = booted(context_tokens_max=len(PROMPT) + 7)
    client = mesh.request(0, PROMPT, 30, sampling=sampling(0))
    assert mesh.run_to_end()
    assert client.finish.reason == "length"
    assert client.tokens == undisturbed(0)[:7]


def test_more_requests_than_the_queue_holds_are_told_when_to_come_back():
    mesh = booted(requests_running_max=2, queue_length_max=3)
    clients = ask(mesh, 7)
    refused = [client.error for client in clients if client.ends]
    assert [error.reason for error in refused] == ["OVERLOADED", "OVERLOADED"]
    assert refused[0].retry_after_s == 1.0
    assert mesh.run_to_end()
    assert sum(client.finish is not None for client in clients) == 5


@pytest.mark.parametrize("stalls", [False, True])
def test_a_stage_that_takes_nothing_is_felt_at_admission_and_no_step_more_goes_out(stalls):
    mesh = MemoryMesh(policy(requests_running_max=2, queue_length_max=3))
    mesh.join("stage-0", "0-3")
    mesh.join("stage-1", "3-6")
    assert mesh.run_until(mesh.open_routes)
    (live,) = mesh.mesh.state.routes.values()
    if stalls:
        mesh.stop("stage-1")
    clients = []
    for number in range(1, 11):
        clients.append(mesh.request(number, PROMPT, 6))
        mesh.run(0.1)
        steps = live.scheduler.steps.outstanding.values()
        computing = [sent for sent in steps if sent.kind is not FrameKind.CLOSE]
        assert len(computing) <= 2 * live.route.stage_count  # prompts stand beside the others
    refused = [client.error.reason for client in clients if client.error]
    assert refused == (["OVERLOADED"] * 5 if stalls else [])


def test_requests_wait_for_room_in_the_caches():
    mesh = MemoryMesh(policy())
    mesh.join("full", "0-6", kv_budget_tokens=100)
    mesh.run(1.0)
    clients = ask(mesh, 3)
    assert mesh.mesh.snapshot(mesh.now).queued == 2
    assert mesh.run_to_end()
    assert_exactly_once(clients)
    too_large = mesh.request(9, PROMPT, 90)
    assert mesh.run_to_end()
    assert too_large.error.reason == "CACHE_EXHAUSTED"


def test_requests_may_come_before_workers_and_are_told_when_none_come():
    mesh = MemoryMesh(policy(route_wait_s_max=5.0))
    late, served = mesh.request(1, PROMPT, 3), mesh.request(2, PROMPT, 3)
    mesh.feed(CancelRequested((2).to_bytes(16, "big")))
    assert mesh.run_to_end()
    assert late.error.reason == "ROUTE_UNAVAILABLE"
    assert late.error.metadata["cause"] == "no worker has registered"
    assert served.finish is not None


def test_a_drained_worker_leaves_after_its_requests_have_finished():
    mesh = booted()
    clients = ask(mesh)
    until_each_has(mesh, clients, 5)
    mesh.feed(DrainRequested("stage-1"))
    assert mesh.run_to_end()
    assert_exactly_once(clients)
    assert not any(client.summary.recoveries for client in clients)
    assert mesh.run_until(lambda: bool(mesh.events("WorkerDrained")))


def test_a_worker_that_stood_still_while_it_was_drained_leaves_when_it_goes_on():
    mesh = booted()
    clients = ask(mesh)
    until_each_has(mesh, clients, 5)
    mesh.feed(DrainRequested("stage-1"))
    mesh.stop("stage-1")
    assert mesh.run_to_end()
    assert_exactly_once(clients)
    mesh.resume("stage-1")
    assert mesh.run_until(lambda: bool(mesh.events("WorkerDrained")))
    assert ("stage-0", "stage-1", "stage-2") not in mesh.open_routes()


def test_requests_move_when_a_drain_takes_too_long():
    mesh = booted()
    clients = ask(mesh)
    until_each_has(mesh, clients, 5)
    mesh.feed(DrainRequested("stage-1", timeout_s=0.1))
    assert mesh.run_to_end()
    assert_exactly_once(clients)
    assert {causes(client)[0] for client in clients} == {("reroute", "STAGE_DRAINING")}


def test_a_mesh_that_stops_finishes_what_runs_and_admits_nothing():
    mesh = booted(requests_running_max=2)
    clients = ask(mesh, 3)
    mesh.feed(DrainAllRequested())
    refused = mesh.request(9, PROMPT, 3)
    assert mesh.run_to_end()
    assert refused.error.reason == "OVERLOADED"
    assert_exactly_once(clients[:2])
    assert clients[2].error.reason == "STAGE_DRAINING"


def test_a_mesh_that_stops_ends_what_is_not_finished_in_time():
    mesh = booted()
    clients = ask(mesh, 1, tokens=500)
    mesh.feed(DrainAllRequested(timeout_s=0.5))
    assert mesh.run_to_end()
    assert clients[0].error.reason == "STAGE_DRAINING"


def test_a_journalled_request_goes_on_behind_its_accepted_tokens():
    mesh = booted()
    known = tuple(undisturbed(1)[:12])
    client = mesh.request(1, PROMPT[1:], 30, sampling=sampling(1), accepted=known)
    client.tokens += known
    assert mesh.run_to_end()
    assert client.tokens == undisturbed(1)


def test_the_same_request_id_is_not_served_twice():
    mesh = booted()
    (client,) = ask(mesh, 1)
    known = mesh.mesh
    assert known.knows(bytes(16))
    mesh.feed(known.state.sessions[bytes(16)].demand)
    assert mesh.run_to_end()
    assert len(client.ends) == 1


def test_every_token_has_an_event_with_its_validation():
    mesh = booted()
    (client,) = ask(mesh, 1)
    assert mesh.run_to_end()
    chunks = mesh.events("ChunkGenerated")
    assert [int(event.attributes["position"]) for event in chunks] == list(range(30))
    assert {event.attributes["status"] for event in chunks} == {"VALID"}
    assert chunks[-1].attributes["checksum"] == f"{client.chunks[-1].checksum:08x}"


def test_an_unknown_event_is_refused():
    with pytest.raises(InvalidConfiguration):
        Mesh().handle(Event(), 0.0)


def test_check_sees_a_request_that_was_lost():
    mesh = booted()
    ask(mesh, 1)
    mesh.mesh.state.routes[1].scheduler.sessions.clear()
    with pytest.raises(InvalidConfiguration, match="0 requests are placed, 1 are live"):
        mesh.mesh.check()


def test_a_contradictory_policy_is_refused():
    with pytest.raises(InvalidConfiguration, match="prefill chunk"):
        Mesh(MeshPolicy(prefill_chunk_tokens=8, prefill_chunk_tokens_shared=9))
    with pytest.raises(InvalidConfiguration, match="queue_length_max"):
        Mesh(MeshPolicy(queue_length_max=0))


def test_equal_events_give_equal_instructions():
    def story():
        mesh = booted()
        clients = ask(mesh)
        until_each_has(mesh, clients, 10)
        mesh.kill("stage-0")
        mesh.run_to_end()
        return mesh.transcript

    assert story() == story()


def test_a_terminal_frame_is_the_last_thing_of_a_request():
    mesh = booted()
    ask(mesh, 2)
    instructions = []
    handle = mesh.mesh.handle
    mesh.mesh.handle = lambda event, now: instructions.extend(out := handle(event, now)) or out
    assert mesh.run_to_end()
    mesh.run(1.0)
    ended = set()
    for one in instructions:
        request = getattr(one, "request", None)
        if type(one).__name__ in {"FinishRequest", "FailRequest"}:
            assert request not in ended
            ended.add(request)
        elif type(one).__name__ == "AcceptTokens":
            assert request not in ended
        assert not isinstance(one, FailRequest)
    assert any(isinstance(one, SendStep) for one in instructions)


FAULTS = st.sampled_from(
    ["kill", "stop", "resume", "restart", "forget", "corrupt", "drop", "nothing", "nothing"]
)
NAMES = st.sampled_from([*STAGES, "full", "spare"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(FAULTS, NAMES, st.floats(0.0, 1.5)), max_size=12))
def test_whatever_fails_every_request_ends_once_and_no_token_is_ever_wrong(script):
    mesh = booted(fallback_wait_s_max=10.0, fruitless_recoveries_max=20)
    mesh.join("spare", "2-4")
    clients = ask(mesh, 4, tokens=60)
    for index, (fault, name, pause_s) in enumerate(script):
        disturb(mesh, fault, name, index)
        mesh.run(pause_s)
    for name, worker in list(mesh.workers.items()):
        mesh.resume(name)
        if not worker.alive:
            mesh.restart(name, instance="last")
    assert mesh.run_to_end()
    for number, client in enumerate(clients):
        assert len(client.ends) == 1
        assert client.tokens == undisturbed(number, 60)[: len(client.tokens)]
        assert client.error is not None or len(client.tokens) == 60
    mesh.run(40.0)
    assert tuple(STAGES) in mesh.open_routes() or any(len(r) == 3 for r in mesh.open_routes())
    held = [w.stage.kv_tokens for w in mesh.workers.values() if w.alive and w.stage]
    assert not any(held)


def disturb(mesh, fault, name, index):
    worker = mesh.workers[name]
    match fault:
        case "kill" | "stop" if worker.alive:
            getattr(mesh, fault)(name)
        case "resume":
            mesh.resume(name)
        case "restart":
            mesh.restart(name, instance=f"again-{index}")
        case "forget":
            mesh.forget(name, 1)
        case "corrupt":
            tamper_once(mesh, lambda f: any(row.token for row in f.rows), corrupt_token)
        case "drop":
            tamper_once(mesh, lambda f: f.kind is FrameKind.DECODE, lambda _: None)


def test_deadlines_of_what_has_ended_are_not_kept():
    """A mesh that answers quickly under long deadlines remembers those of live requests only."""
    mesh = booted()
    mesh.request(1, PROMPT, 500, deadline=mesh.now + 5000.0)
    core = mesh.mesh
    timers = len(core.state.timers)
    for number in range(2, DEADLINES_OVER_MAX + 200):
        mesh.request(number, PROMPT, 500, deadline=mesh.now + 3600.0 + number)
        mesh.feed(CancelRequested(number.to_bytes(16, "big"), "test"))
    assert len(core.requests.deadlines) <= DEADLINES_OVER_MAX + 4
    assert len(core.state.timers) <= timers + DEADLINES_OVER_MAX + 4
    assert (1).to_bytes(16, "big") in core.requests.deadlines
