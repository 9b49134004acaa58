"""Shadow verification on a mesh in memory: liars are caught, answers corrected, budgets kept."""

from dataclasses import replace
from itertools import pairwise

import pytest

from coordinator.echo import EchoStage, mix, oracle
from coordinator.events import (
    CancelRequested,
    Delivery,
    DrainAllRequested,
    DrainRequested,
    StopMatched,
    Verification,
)
from coordinator.settings import FallbackPolicy, MeshPolicy
from coordinator.testing import MemoryMesh
from coordinator.verifier import SHADOW_RESTARTS_MAX
from stagemesh.errors import InvalidConfiguration
from stagemesh.frame import FrameKind, RowStatus
from stagemesh.sampling import SamplingSpec
from stagemesh.token import ValidationStatus
from stagemesh.topology import COORDINATOR_HOP

STAGES = {"stage-0": "0-2", "stage-1": "2-4", "stage-2": "4-6"}
PROMPT = tuple(range(2, 30))
SHADOW = {"verification": Verification.SHADOW}
VERIFIED = {**SHADOW, "delivery": Delivery.VERIFIED}


class LyingStage(EchoStage):
    """Computes wrongly from a position on (not in probes), with marks and checksums in order."""

    from_position = 40

    def _forward(self, cache, hidden, taps):
        values = super()._forward(cache, hidden, taps)
        position = cache.length + len(hidden) - 1
        if position >= self.from_position:
            values[-1] = mix(values[-1], 99)
        return values


class LyingFromTheStart(LyingStage):
    """Wrong in every row of more than ten tokens, so that the first token is wrong already."""

    def _forward(self, cache, hidden, taps):
        values = EchoStage._forward(self, cache, hidden, taps)
        if cache.length + len(hidden) > 20:
            values[-1] = mix(values[-1], 99)
        if self.info.span.last in taps:
            taps[self.info.span.last] = values
        return values


def mesh_of(*, liar="", lie=LyingStage, full=True, exact=True, dtype="f32", **limits):
    mesh = MemoryMesh(MeshPolicy(vocab_size=997, **{"audit_budget": 0.0, **limits}))
    for name, span in STAGES.items():
        worker = mesh.join(name, span, exact=exact, dtype=dtype)
        if name == liar:
            worker.stage_type = lie
    if full:
        mesh.join("full", "0-6", dtype=dtype)
    assert mesh.run_until(lambda: len(mesh.open_routes()) == 1 + full)
    return mesh


def ask(mesh, number=0, tokens=60, **more):
    return mesh.request(number, PROMPT, tokens, sampling=sampling(number), **more)


def sampling(number):
    return SamplingSpec(temperature=0.8 if number % 2 else 0.0, seed=number)


def truth(number=0, tokens=60):
    return oracle(PROMPT, tokens, layer_count=6, sampling=sampling(number))


def steps(mesh, kind, epoch=None):
    return [line for line in mesh.transcript if f" {kind} " in line and "step " in line]


def assert_nothing_is_left(mesh):
    mesh.run(2.0)
    assert mesh.mesh.requests.shadows.open == {}
    assert mesh.mesh.requests.shadows.unfollowed == {}
    assert mesh.mesh.state.settling == {}
    for worker in mesh.workers.values():
        assert worker.stage is None or not worker.stage.caches
    for live in mesh.mesh.state.routes.values():
        assert live.scheduler.reserved_tokens == 0


@pytest.mark.parametrize("number", [0, 1], ids=["greedy", "sampled"])
def test_an_honest_answer_is_verified_to_its_last_token(number):
    mesh = mesh_of()
    client = ask(mesh, number, **SHADOW)
    assert mesh.run_to_end()
    assert client.tokens == truth(number)
    assert client.verified_through == 60
    assert client.summary.checks["tokens_verified"] == 60
    assert not client.corrections
    assert not client.summary.recoveries
    assert_nothing_is_left(mesh)


def test_scores_follow_in_chunks_and_the_prompt_is_not_computed_again_for_each():
    mesh = mesh_of(shadow_chunk_tokens=8)
    ask(mesh, tokens=33, **SHADOW)
    assert mesh.run_to_end()
    assert len(steps(mesh, "score")) == 5
    assert len([line for line in steps(mesh, "prefill") if "epoch=2" in line]) == 1


@pytest.mark.parametrize("number", [0, 1], ids=["greedy", "sampled"])
@pytest.mark.parametrize("liar", list(STAGES))
def test_a_lying_stage_is_caught_named_and_the_answer_corrected(liar, number):
    mesh = mesh_of(liar=liar)
    client = ask(mesh, number, **SHADOW)
    assert mesh.run_to_end()
    assert client.tokens == truth(number)
    assert client.tokens != client.seen
    (correction,) = client.corrections
    assert correction.from_index == 41 - len(PROMPT)
    assert correction.reason == "SHADOW_MISMATCH"
    (record,) = client.summary.recoveries
    assert (record.cause, record.action, record.worker) == ("SHADOW_MISMATCH", "reroute", liar)
    assert record.to_route == ("full",)
    assert record.replayed <= 2
    assert client.verified_through == 60
    (event,) = mesh.events("ShadowMismatch")
    assert (event.worker, event.attributes["status"]) == (liar, "REJECTED")
    assert mesh.mesh.state.recovery.history(liar).corruptions == 1
    assert_nothing_is_left(mesh)


def test_corrected_tokens_say_so_and_later_ones_do_not():
    mesh = mesh_of(liar="stage-1")
    client = ask(mesh, **SHADOW)
    assert mesh.run_to_end()
    first = client.corrections[0].from_index
    seen_before = len(client.seen) - (60 - first)
    statuses = [chunk.status for chunk in client.chunks]
    assert statuses[:first] == [ValidationStatus.VALID] * first
    replaced = seen_before - first
    assert statuses[first : first + replaced] == [ValidationStatus.CORRECTED] * replaced
    assert set(statuses[first + replaced :]) == {ValidationStatus.VALID}
    assert client.summary.checks["tokens_corrected"] == replaced


@pytest.mark.parametrize("liar", list(STAGES))
@pytest.mark.parametrize("lie", [LyingStage, LyingFromTheStart])
def test_verified_delivery_never_shows_a_wrong_token(liar, lie):
    mesh = mesh_of(liar=liar, lie=lie)
    client = ask(mesh, 1, **VERIFIED)
    assert mesh.run_to_end()
    assert client.seen == client.tokens == truth(1)
    assert not client.corrections
    assert mesh.events("ShadowMismatch")
    assert_nothing_is_left(mesh)


def test_verified_delivery_stays_behind_the_watermark():
    mesh = mesh_of()
    client = ask(mesh, **VERIFIED)
    for _ in range(200):
        mesh.run(0.05)
        assert len(client.tokens) <= client.verified_through
    assert client.tokens == truth()
    assert client.finish is not None


def test_a_first_token_that_is_wrong_is_traced_by_the_lines_behind_it():
    mesh = mesh_of(liar="stage-1", lie=LyingFromTheStart)
    client = ask(mesh, **SHADOW)
    assert mesh.run_to_end()
    assert client.tokens == truth()
    assert client.corrections[0].from_index == 0
    assert client.summary.recoveries[0].worker == "stage-1"


def test_without_exact_kernels_the_stage_is_found_by_computing_again():
    mesh = mesh_of(liar="stage-1", lie=LyingFromTheStart, exact=False)
    client = ask(mesh, **SHADOW)
    assert mesh.run_to_end()
    mesh.run(1.0)
    assert client.tokens == truth()
    (event,) = mesh.events("ShadowExamined")
    assert event.worker == "stage-1"
    assert mesh.mesh.state.recovery.history("stage-1").corruptions == 1


@pytest.mark.parametrize(("dtype", "corrected"), [("f32", True), ("f16", True), ("bf16", False)])
def test_tokens_may_differ_by_what_their_dtype_rounds_away(dtype, corrected):
    """A wrong token of `EchoStage` misses by its margin, which is between 0.25 and 4.25."""
    mesh = mesh_of(liar="stage-1", exact=False, dtype=dtype, shadow_tolerance=0.43)
    client = ask(mesh, **SHADOW)
    assert mesh.run_to_end()
    assert bool(client.corrections) == corrected
    assert bool(mesh.events("ShadowMismatch")) == corrected


def test_a_series_of_mismatches_quarantines_the_liar_and_it_is_reinitialised():
    mesh = mesh_of(liar="stage-1")
    clients = [ask(mesh, number, **SHADOW) for number in range(4)]
    assert mesh.run_to_end()
    assert all(client.tokens == truth(number) for number, client in enumerate(clients))
    assert [event.worker for event in mesh.events("WorkerQuarantined")] == ["stage-1"]
    mesh.workers["stage-1"].stage_type = EchoStage
    assert mesh.run_until(lambda: tuple(STAGES) in mesh.open_routes())
    assert mesh.events("WorkerReinitialised")


def test_a_reroute_reuses_the_warm_cache_and_replays_only_the_tail():
    mesh = mesh_of()
    client = ask(mesh, **SHADOW)
    assert mesh.run_until(lambda: len(client.tokens) >= 30)
    mesh.kill("stage-1")
    assert mesh.run_to_end()
    assert client.tokens == truth()
    (record,) = client.summary.recoveries
    assert record.to_route == ("full",)
    assert record.replayed <= 17
    assert client.verified_through == 60
    assert_nothing_is_left(mesh)


def test_a_worker_that_takes_over_behind_its_shadow_is_told_the_trace_once():
    """Only what a client waits for carries its trace: the shadow's own rows do not."""
    mesh = mesh_of()
    sent = []
    mesh.tampers.append(lambda frame: sent.append(frame) or frame)
    client = ask(mesh, traceparent="00-aa-bb-01", **SHADOW)
    assert mesh.run_until(lambda: len(client.tokens) >= 30)
    mesh.kill("stage-1")
    assert mesh.run_to_end()
    (record,) = client.summary.recoveries
    on_full = [one for one in sent if one.epoch == record.epoch and one.hop_from == -1]
    told = [one.kind for one in on_full if any(row.traceparent for row in one.rows)]
    assert told == [FrameKind.DECODE]
    assert sum(one.kind is FrameKind.DECODE for one in on_full) > 5
    before = [one for one in sent if one.epoch != record.epoch and one.hop_from == -1]
    assert [one.kind for one in before if any(row.traceparent for row in one.rows)] == [
        FrameKind.PREFILL
    ]


def test_a_lie_found_while_taking_over_is_corrected_too():
    mesh = mesh_of(liar="stage-1", shadow_chunk_tokens=200)
    client = ask(mesh, **SHADOW)
    assert mesh.run_until(lambda: len(client.tokens) >= 30)
    mesh.kill("stage-0")
    assert mesh.run_to_end()
    assert client.tokens == truth()
    assert client.corrections[0].from_index == 41 - len(PROMPT)
    assert_nothing_is_left(mesh)


def test_a_cache_that_cannot_be_trimmed_is_fed_again():
    mesh = mesh_of(liar="stage-1", full=False)
    mesh.join("full", "0-6")
    info = mesh.workers["full"].info
    assert mesh.run_until(lambda: len(mesh.open_routes()) == 2)
    state = mesh.mesh.state
    live = next(live for live in state.routes.values() if live.is_full)
    live.route = live.scheduler.route = replace(
        live.route, workers=(replace(info, capabilities=frozenset({"boundaries", "exact"})),)
    )
    client = ask(mesh, **SHADOW)
    assert mesh.run_to_end()
    assert client.tokens == truth()
    assert not steps(mesh, "rewind")
    assert_nothing_is_left(mesh)


def test_without_a_full_worker_an_immediate_answer_goes_on_unverified():
    mesh = mesh_of(full=False)
    client = ask(mesh, **SHADOW)
    assert mesh.run_to_end()
    assert client.tokens == truth()
    assert client.verified_through == 0
    assert mesh.events("VerificationDegraded")
    (event,) = mesh.events("VerificationIncomplete")
    assert event.attributes["verified_through"] == "0"


def test_a_full_worker_that_dies_degrades_and_one_that_comes_resumes_verification():
    mesh = mesh_of()
    client = ask(mesh, **VERIFIED)
    assert mesh.run_until(lambda: len(client.tokens) >= 16)
    mesh.kill("full")
    mesh.run(3.0)
    held = len(client.tokens)
    assert held < 60
    assert not client.ends
    assert mesh.events("VerificationDegraded")
    mesh.restart("full", instance="2")
    assert mesh.run_to_end()
    assert mesh.events("VerificationResumed")
    assert client.seen == truth()
    assert_nothing_is_left(mesh)


def test_verified_delivery_fails_with_a_reason_when_nothing_can_verify():
    mesh = mesh_of(verification_wait_s_max=5.0)
    client = ask(mesh, **VERIFIED)
    assert mesh.run_until(lambda: len(client.tokens) >= 16)
    mesh.kill("full")
    assert mesh.run_to_end()
    assert client.error.reason == "VERIFICATION_UNAVAILABLE"
    assert client.error.metadata["position"] == str(len(client.tokens))
    assert client.summary.completion_tokens == len(client.tokens)
    assert client.tokens == truth()[: len(client.tokens)]


def test_an_immediate_answer_ends_unverified_when_the_full_worker_stops_answering():
    mesh = mesh_of(verification_wait_s_max=1.0)
    client = ask(mesh, **SHADOW)
    assert mesh.run_until(lambda: len(client.tokens) == 60)
    assert not client.ends
    mesh.stop("full")
    assert mesh.run_to_end()
    assert client.finish is not None
    assert client.tokens == truth()


def test_a_shadow_cache_that_is_lost_is_made_again():
    mesh = mesh_of()
    client = ask(mesh, **SHADOW)
    assert mesh.run_until(lambda: client.verified_through >= 16)
    mesh.forget("full", 0)
    assert mesh.run_to_end()
    assert mesh.events("ShadowLost")
    assert client.verified_through == 60
    assert client.tokens == truth()


def test_cancelling_frees_the_shadow_too():
    mesh = mesh_of()
    client = ask(mesh, **SHADOW)
    assert mesh.run_until(lambda: client.verified_through >= 16)
    mesh.feed(CancelRequested((0).to_bytes(16, "big")))
    assert client.finish.reason == "cancelled"
    assert_nothing_is_left(mesh)


def test_cancelling_an_answer_that_waits_for_its_verification_ends_it():
    mesh = mesh_of(shadow_chunk_tokens=200)
    client = ask(mesh, **SHADOW)
    assert mesh.run_until(lambda: bool(mesh.mesh.state.settling))
    mesh.feed(CancelRequested((0).to_bytes(16, "big")))
    assert client.finish.reason == "cancelled"
    assert_nothing_is_left(mesh)


def test_a_stop_string_ends_the_answer_once_what_remains_is_verified():
    mesh = mesh_of()
    client = ask(mesh, **SHADOW)
    assert mesh.run_until(lambda: len(client.tokens) >= 20)
    mesh.feed(StopMatched((0).to_bytes(16, "big"), 18, "stop"))
    assert mesh.run_to_end()
    assert client.finish.reason == "stop"
    assert client.summary.completion_tokens == 18
    assert client.verified_through >= 18
    assert_nothing_is_left(mesh)


def test_a_stop_string_in_wrong_text_does_not_end_the_answer():
    mesh = mesh_of(liar="stage-1", shadow_chunk_tokens=200)
    client = ask(mesh, **SHADOW)
    assert mesh.run_until(lambda: len(client.tokens) >= 25)
    mesh.feed(StopMatched((0).to_bytes(16, "big"), 22, "stop"))
    assert mesh.run_to_end()
    assert client.finish.reason == "length"
    assert client.tokens == truth()


def test_a_stop_string_in_text_that_has_been_withdrawn_does_not_end_the_answer():
    """The edge reads tokens a moment after they were accepted, when the journal has them."""
    mesh = mesh_of(liar="stage-1", shadow_chunk_tokens=200)
    client = ask(mesh, **SHADOW)
    assert mesh.run_until(lambda: len(client.tokens) >= 25)
    wrong = mesh.mesh.state.sessions[bytes(16)].chain_behind(22)
    assert mesh.run_until(lambda: bool(client.corrections))
    mesh.feed(StopMatched(bytes(16), 22, "stop", wrong))
    assert mesh.run_until(lambda: len(client.tokens) >= 30)
    mesh.feed(StopMatched(bytes(16), 22, "stop", wrong))
    assert mesh.run_to_end()
    assert client.finish.reason == "length"
    assert client.tokens == truth()


def test_the_first_streams_of_a_route_are_audited_and_the_next_only_within_the_budget():
    mesh = mesh_of(audit_budget=0.02)
    for number in range(6):
        client = ask(mesh, number, tokens=20)
        assert mesh.run_to_end()
        assert client.tokens == truth(number, 20)
        assert client.verified_through == 0
        mesh.run(1.0)
    assert len(steps(mesh, "score")) == 4
    budget = mesh.mesh.requests.shadows.budget
    assert budget.audited_s > 0
    assert_nothing_is_left(mesh)


def test_in_the_long_run_audits_keep_to_their_budget():
    mesh = mesh_of(audit_budget=0.02, audit_first_streams=0)
    for number in range(120):
        ask(mesh, number, tokens=20)
        mesh.run(0.3)
    assert mesh.run_to_end(seconds=600)
    mesh.run(2.0)
    assert 0 < mesh.mesh.requests.shadows.budget.used <= 0.03


def test_a_stream_that_had_a_recovery_is_audited():
    mesh = mesh_of(audit_budget=0.02, audit_first_streams=0)
    mesh.join("spare", "2-4")
    client = ask(mesh, tokens=40)
    assert mesh.run_until(lambda: len(client.tokens) >= 5)
    mesh.kill("stage-1")
    assert mesh.run_to_end()
    mesh.run(1.0)
    assert client.summary.route == ("stage-0", "spare", "stage-2")
    assert steps(mesh, "score")


def test_an_audit_corrects_an_answer_that_still_runs():
    mesh = mesh_of(liar="stage-1", audit_budget=0.02)
    client = ask(mesh)
    assert mesh.run_to_end()
    assert client.tokens == truth()
    assert client.corrections


def test_an_audit_does_not_hold_up_the_end_and_still_names_the_liar():
    mesh = mesh_of(liar="stage-1", audit_budget=0.02, shadow_chunk_tokens=500)
    client = ask(mesh)
    assert mesh.run_to_end()
    assert client.finish is not None
    assert client.tokens != truth()
    mesh.run(1.0)
    mismatch = mesh.events("ShadowMismatch")[0]
    assert (mismatch.worker, mismatch.attributes["status"]) == ("stage-1", "SUSPECT")
    assert_nothing_is_left(mesh)


@pytest.mark.parametrize("asked", [False, True], ids=["audit", "asked"])
def test_an_audit_makes_way_for_a_request_that_needs_its_room(asked):
    mesh = MemoryMesh(MeshPolicy(vocab_size=997, audit_budget=1.0))
    room = len(PROMPT) + 400
    for name, limit in (("a", room), ("b", 0)):
        mesh.join(f"{name}-0", "0-3", kv_budget_tokens=limit)
        mesh.join(f"{name}-1", "3-6")
    mesh.join("full", "0-6", kv_budget_tokens=room)
    assert mesh.run_until(lambda: len(mesh.open_routes()) == 3)
    long = ask(mesh, tokens=400, **(SHADOW if asked else {}))
    short = ask(mesh, 1, tokens=60)
    assert mesh.run_until(lambda: len(short.tokens) >= 5)
    assert [one.request for one in mesh.mesh.requests.shadows.open.values()] == [bytes(16)]
    mesh.kill("b-1")
    assert mesh.run_until(lambda: bool(short.ends))
    assert short.tokens == truth(1)
    assert short.summary.route == (("a-0", "a-1") if asked else ("full",))
    assert bool(long.ends) is asked
    assert mesh.run_to_end()
    assert long.tokens == truth(tokens=400)
    assert_nothing_is_left(mesh)


def test_shadows_never_starve_live_streams_on_the_full_worker():
    mesh = mesh_of(pipeline_wait_s_max=0.1)
    shadowed = [ask(mesh, number, tokens=200, **SHADOW) for number in range(6)]
    assert mesh.run_until(lambda: all(len(client.tokens) >= 20 for client in shadowed))
    mesh.stop("stage-1")
    mesh.run(1.0)
    mesh.resume("stage-1")
    live = mesh.request(50, PROMPT, 100)
    assert mesh.run_to_end()
    assert live.error is None
    for number, client in enumerate(shadowed):
        assert client.tokens == truth(number, 200)
        assert client.verified_through == 200


def test_scores_wait_for_live_steps_but_not_for_ever():
    mesh = MemoryMesh(MeshPolicy(vocab_size=997, audit_budget=0.0, live_steps_per_score=4))
    for name, span in STAGES.items():
        mesh.join(name, span)
    mesh.join("full", "0-6")
    assert mesh.run_until(lambda: len(mesh.open_routes()) == 2)
    state = mesh.mesh.state
    pipeline, full = sorted(state.routes.values(), key=lambda live: live.is_full)
    full_epoch = full.epoch
    pipeline.suspect = True
    for number in (10, 11, 12):
        mesh.request(number, PROMPT, 150)
    pipeline.suspect = False
    full.suspect = False
    shadowed = ask(mesh, 1, tokens=100, **SHADOW)
    assert mesh.run_to_end()
    kinds = [
        line.split()[4]
        for line in mesh.transcript
        if f"epoch={full_epoch} " in line and " step " in line
    ]
    scores = [index for index, kind in enumerate(kinds) if kind == "score"]
    last_live = max(index for index, kind in enumerate(kinds) if kind == "decode")
    among = [index for index in scores if index < last_live]
    assert len(among) >= 3
    assert all(after - before > 4 for before, after in pairwise(among))
    assert shadowed.verified_through == 100


def test_forbid_corrects_on_another_pipeline_only():
    mesh = mesh_of(liar="stage-1", fallback=FallbackPolicy.FORBID)
    mesh.join("other-0", "0-3")
    mesh.join("other-1", "3-6")
    assert mesh.run_until(lambda: len(mesh.open_routes()) == 3)
    client = ask(mesh, **SHADOW)
    assert mesh.run_to_end()
    assert client.tokens == truth()
    assert client.summary.route == ("other-0", "other-1")
    assert client.verified_through == 60
    assert_nothing_is_left(mesh)


def test_forbid_corrects_on_the_only_pipeline_and_heals_its_liar():
    mesh = mesh_of(liar="stage-1", fallback=FallbackPolicy.FORBID)
    client = ask(mesh, **SHADOW)
    assert mesh.run_until(lambda: bool(mesh.events("WorkerQuarantined")))
    assert len(client.corrections) == mesh.mesh.state.policy.corruptions_consecutive_max
    mesh.workers["stage-1"].stage_type = EchoStage
    assert mesh.run_to_end()
    assert client.tokens == truth()
    assert client.verified_through == 60
    assert {record.to_route for record in client.summary.recoveries} == {tuple(STAGES)}
    assert_nothing_is_left(mesh)


def test_verification_goes_on_when_the_stream_moves_to_a_spare_pipeline():
    mesh = mesh_of()
    mesh.join("spare", "2-4")
    client = ask(mesh, **SHADOW)
    assert mesh.run_until(lambda: len(client.tokens) >= 20)
    mesh.kill("stage-1")
    assert mesh.run_to_end()
    assert client.summary.route == ("stage-0", "spare", "stage-2")
    assert client.tokens == truth()
    assert client.verified_through == 60


def test_a_liar_is_named_on_a_pipeline_that_is_divided_otherwise_than_the_one_before():
    class LyingLater(LyingStage):
        from_position = 70

    mesh = mesh_of()
    client = ask(mesh, tokens=100, **SHADOW)
    mesh.join("other-0", "0-3").stage_type = LyingLater
    mesh.join("other-1", "3-6")
    assert mesh.run_until(lambda: len(client.tokens) >= 20)
    mesh.kill("stage-1")
    assert mesh.run_to_end()
    assert client.tokens == truth(tokens=100)
    (event,) = mesh.events("ShadowMismatch")
    assert event.worker == "other-0"
    assert mesh.mesh.state.recovery.history("other-1").corruptions == 0
    causes = [(record.cause, record.worker) for record in client.summary.recoveries]
    assert causes == [("STAGE_UNREACHABLE", "stage-1"), ("SHADOW_MISMATCH", "other-0")]


def test_a_full_worker_without_room_for_a_shadow_degrades_verification():
    mesh = mesh_of(full=False)
    mesh.join("full", "0-6", kv_budget_tokens=64)
    assert mesh.run_until(lambda: len(mesh.open_routes()) == 2)
    client = ask(mesh, **SHADOW)
    assert mesh.run_to_end()
    assert client.tokens == truth()
    assert "no full worker has room" in mesh.events("VerificationDegraded")[0].attributes["detail"]


def test_what_a_full_worker_made_itself_counts_as_verified():
    mesh = MemoryMesh(MeshPolicy(vocab_size=997))
    mesh.join("full", "0-6")
    client = ask(mesh, **VERIFIED)
    assert mesh.run_to_end()
    assert client.tokens == truth()
    assert client.verified_through == 60
    assert not steps(mesh, "score")


class WrongReference(EchoStage):
    """Would have chosen another token, always."""

    def _score(self, row, cache, values):
        done = super()._score(row, cache, values)
        scores = tuple(
            replace(s, reference_token_id=(s.token_id + 1) % 997, gap=9.0) for s in done.scores
        )
        return replace(done, scores=scores)


def test_a_reference_that_always_disagrees_cannot_keep_a_request_for_ever():
    mesh = mesh_of(full=False)
    mesh.join("full", "0-6").stage_type = WrongReference
    assert mesh.run_until(lambda: len(mesh.open_routes()) == 2)
    client = ask(mesh, **SHADOW)
    assert mesh.run_to_end()
    assert len(client.ends) == 1
    assert client.tokens == truth()


@pytest.mark.parametrize("exact", [True, False])
def test_nor_can_it_where_every_correction_leads_to_another_pipeline(exact):
    mesh = mesh_of(full=False, exact=exact, fallback=FallbackPolicy.FORBID)
    mesh.join("other-0", "0-3")
    mesh.join("other-1", "3-6")
    mesh.join("full", "0-6", exact=exact).stage_type = WrongReference
    assert mesh.run_until(lambda: len(mesh.open_routes()) == 3)
    client = ask(mesh, **SHADOW)
    assert mesh.run_to_end()
    assert client.error.reason == "TOKEN_REJECTED"
    assert client.tokens == []
    assert_nothing_is_left(mesh)


def test_random_deaths_and_lies_leave_every_verified_answer_true():
    for seed in range(40):
        liar = list(STAGES)[seed % 3]
        mesh = mesh_of(liar=liar if seed % 2 else "", audit_budget=0.02 if seed % 5 else 0.0)
        clients = [
            ask(mesh, number, tokens=40, **(VERIFIED if number % 2 else SHADOW))
            for number in range(4)
        ]
        victim = [*STAGES, "full"][mix(seed, 1) % 4]
        mesh.run(0.05 + mix(seed, 2) % 1500 / 1000)
        mesh.kill(victim)
        mesh.run(0.2 + mix(seed, 3) % 1000 / 1000)
        mesh.restart(victim, instance="2")
        mesh.workers[victim].stage_type = EchoStage
        assert mesh.run_to_end(), seed
        for number, client in enumerate(clients):
            assert len(client.ends) == 1, seed
            verified = client.verified_through
            if client.error is None and verified == 40:
                assert client.tokens == truth(number, 40), seed
            assert client.tokens[:verified] == truth(number, 40)[:verified], seed
            if number % 2:
                assert client.seen == truth(number, 40)[: len(client.seen)], seed
                assert not client.corrections, seed
        assert_nothing_is_left(mesh)


def test_a_policy_with_a_negative_tolerance_is_refused():
    with pytest.raises(InvalidConfiguration):
        MeshPolicy(shadow_tolerance=-0.1).check()


def test_frames_of_shadows_are_marked_as_scores_on_the_wire():
    mesh = mesh_of()
    kinds = set()
    mesh.tampers.append(lambda frame: kinds.add((frame.kind, frame.hop_to)) or frame)
    ask(mesh, **SHADOW)
    assert mesh.run_to_end()
    assert {(FrameKind.SCORE, 0), (FrameKind.SCORE, COORDINATOR_HOP)} <= kinds


def test_an_answer_that_ends_while_it_moves_behind_its_audit_leaves_a_mesh_that_goes_on():
    """The simulator's seed 5533: the audit's cache was still handed over to a request that had
    ended, and the next step that was formed had no rows."""
    mesh = mesh_of(audit_budget=1.0, shadow_chunk_tokens=4)
    client = ask(mesh)
    assert mesh.run_until(lambda: len(client.tokens) == 20)
    shadows = mesh.mesh.requests.shadows.open
    assert shadows
    mesh.kill("stage-1")

    def moving():
        return any(shadow.taking_over and not shadow.is_done for shadow in shadows.values())

    assert mesh.run_until(moving)
    mesh.feed(StopMatched(bytes(16), 20, "stop"))
    assert client.finish.reason == "stop"
    (audit,) = shadows.values()
    full = mesh.mesh.state.routes[audit.epoch].scheduler
    assert full.reserved_tokens == audit.reserve_tokens == len(PROMPT) + 60  # as long as it lasts
    assert not audit.is_urgent
    second = ask(mesh, 1)
    assert mesh.run_to_end()
    assert second.tokens == truth(1)
    assert_nothing_is_left(mesh)


def resumed(mesh, tokens, **more):
    """A request that had failed behind ``tokens``, as its client brings it back."""
    facts = {"accepted": tuple(tokens), "recovered": True, "resumed_after": "ROUTE_UNAVAILABLE"}
    return ask(mesh, **SHADOW, **facts, **more)


def test_the_watermark_of_a_resumed_request_does_not_go_back():
    mesh = mesh_of()
    client = resumed(mesh, truth()[:30], verified=20)
    session = mesh.mesh.state.sessions[(0).to_bytes(16, "big")]
    assert session.verified_through == 20
    assert mesh.run_to_end()
    assert client.tokens == truth()[30:]
    assert client.verified_through == 60
    assert_nothing_is_left(mesh)


def test_what_was_told_to_be_verified_is_not_withdrawn_by_another_full_worker():
    mesh = mesh_of(verification_wait_s_max=1.0)
    known = truth()[:30]
    known[10] = (known[10] + 1) % 997  # this full worker would have chosen otherwise
    client = resumed(mesh, known, verified=20)
    assert mesh.run_to_end()
    assert not client.corrections
    assert len(client.tokens) == 30
    assert client.finish is not None
    mismatches = mesh.events("ShadowMismatch")
    said = {(event.attributes["position"], event.attributes["status"]) for event in mismatches}
    assert said == {("10", "SUSPECT")}
    assert mesh.events("VerificationIncomplete")
    assert client.summary.checks["tokens_verified"] == 20
    assert_nothing_is_left(mesh)


def test_what_moves_to_a_full_worker_without_a_shadow_waits_for_none_any_more():
    mesh = mesh_of(full=False, verification_wait_s_max=1.0)
    client = ask(mesh, tokens=300, **VERIFIED)
    assert mesh.events("VerificationDegraded")
    mesh.kill("stage-1")
    mesh.join("full", "0-6")
    assert mesh.run_to_end()
    assert client.summary.route == ("full",)
    assert client.tokens == truth(tokens=300)
    assert client.verified_through == 300
    assert_nothing_is_left(mesh)


def test_a_shadow_stays_when_its_request_moves_to_a_spare_pipeline():
    mesh = mesh_of(full=False, verification_wait_s_max=1.0)
    mesh.join("spare", "2-4")
    mesh.join("full", "0-6", kv_budget_tokens=len(PROMPT) + 300)  # room for one shadow
    assert mesh.run_until(lambda: len(mesh.open_routes()) == 2)
    client = ask(mesh, tokens=300, **VERIFIED)
    assert mesh.run_until(lambda: len(client.tokens) >= 20)
    prefills = [line for line in steps(mesh, "prefill") if "epoch=2" in line]
    mesh.kill("stage-1")
    assert mesh.run_to_end()
    assert client.summary.route == ("stage-0", "spare", "stage-2")
    assert client.tokens == truth(tokens=300)
    assert not mesh.events("VerificationDegraded")
    assert [line for line in steps(mesh, "prefill") if "epoch=2" in line] == prefills
    assert_nothing_is_left(mesh)


def test_a_shadow_that_starts_over_while_its_request_moves_hands_over_no_empty_cache():
    mesh = mesh_of(shadow_chunk_tokens=8)
    client = ask(mesh, **VERIFIED)
    assert mesh.run_until(lambda: len(client.tokens) >= 24)
    (shadow,) = mesh.mesh.requests.shadows.open.values()
    assert mesh.run_until(lambda: shadow.in_flight)
    mesh.kill("stage-1")
    assert mesh.run_until(lambda: shadow.taking_over)
    assert shadow.in_flight
    blanked = []

    def blank_one_piece(frame):
        if blanked or frame.kind is not FrameKind.SCORE or frame.hop_to != COORDINATOR_HOP:
            return frame
        blanked.append(frame.step)
        rows = tuple(replace(row, scores=()) for row in frame.rows)
        return replace(frame, rows=rows).sealed()

    mesh.tampers.append(blank_one_piece)
    assert mesh.run_to_end()
    assert blanked
    assert client.tokens == truth()
    (record,) = client.summary.recoveries
    assert record.cause == "STAGE_UNREACHABLE"
    assert not mesh.events("RowFailed")
    assert_nothing_is_left(mesh)


@pytest.mark.parametrize("more", [SHADOW, VERIFIED], ids=["immediate", "verified"])
def test_what_moves_and_loses_its_shadow_for_good_is_made_by_the_full_worker_itself(more):
    mesh = mesh_of(shadow_chunk_tokens=8)
    client = ask(mesh, **more)
    session = mesh.mesh.state.sessions[bytes(16)]
    assert mesh.run_until(lambda: session.accepted_count > session.verified_through >= 16)
    (shadow,) = mesh.mesh.requests.shadows.open.values()
    accepted, verified = session.accepted_count, session.verified_through
    mesh.kill("stage-1")
    assert mesh.run_until(lambda: shadow.taking_over)
    assert (accepted, verified) == (session.accepted_count, session.verified_through)

    def blank(frame):
        if frame.kind is not FrameKind.SCORE or frame.hop_to != COORDINATOR_HOP:
            return frame
        rows = tuple(replace(row, scores=()) for row in frame.rows)
        return replace(frame, rows=rows).sealed()

    mesh.tampers.append(blank)
    began = mesh.now
    assert mesh.run_to_end()
    assert len(mesh.events("ShadowLost")) == 1 + SHADOW_RESTARTS_MAX
    assert client.tokens == client.seen == truth()
    assert mesh.now - began < mesh.mesh.state.policy.verification_wait_s_max
    (record,) = client.summary.recoveries
    if more is VERIFIED:
        assert client.verified_through == len(truth())
        assert record.kept == verified
    else:
        assert client.verified_through == verified
        assert record.kept == accepted  # its client has them already
    assert record.replayed == len(PROMPT) + record.kept
    assert_nothing_is_left(mesh)


def test_an_examination_that_has_no_room_blames_nobody():
    mesh = mesh_of(liar="stage-0", lie=LyingFromTheStart, exact=False)
    (full,) = (live for live in mesh.mesh.state.routes.values() if live.is_full)

    def no_room(frame):
        is_examination = frame.kind is FrameKind.PROBE and frame.rows[0].boundaries
        if not is_examination or frame.epoch != full.epoch or frame.hop_to != COORDINATOR_HOP:
            return frame
        row = replace(frame.rows[0], digests=(), token=None)
        failed = row.failed(RowStatus.CACHE_EXHAUSTED, stage=0, detail="no room")
        return replace(frame, rows=(failed,)).sealed()

    mesh.tampers.append(no_room)
    client = ask(mesh, **SHADOW)
    assert mesh.run_to_end()
    assert client.tokens == truth()
    (event,) = mesh.events("ShadowExamined")
    assert (event.worker, event.attributes["detail"]) == ("", "CACHE_EXHAUSTED: no room")
    history = mesh.mesh.state.recovery.workers
    assert not any(history[name].corruptions for name in STAGES)
    mesh.run(1.0)
    assert not mesh.mesh.requests.verifier.examiner._examinations


def test_examinations_of_the_same_tokens_are_all_concluded():
    mesh = mesh_of(liar="stage-1", lie=LyingFromTheStart, exact=False, live_steps_per_score=1)
    prompt = tuple(range(2, 200))
    clients = [mesh.request(number, prompt, 60, **SHADOW) for number in range(3)]
    assert mesh.run_to_end()
    assert all(client.tokens == oracle(prompt, 60, layer_count=6) for client in clients)
    mesh.run(1.0)
    examined = mesh.events("ShadowExamined")
    assert [event.worker for event in examined] == ["stage-1"] * 3
    assert {event.request for event in examined} == set(mesh.clients)
    assert not mesh.mesh.requests.verifier.examiner._examinations


def test_of_several_full_workers_a_request_goes_to_the_one_that_has_its_cache():
    mesh = mesh_of()
    mesh.join("full-2", "0-6")
    assert mesh.run_until(lambda: len(mesh.open_routes()) == 3)
    first, second = ask(mesh, tokens=20, **SHADOW), ask(mesh, 1, tokens=100, **SHADOW)
    assert mesh.run_until(lambda: bool(first.ends) and second.verified_through >= 32)
    mesh.kill("stage-1")
    assert mesh.run_to_end()
    (record,) = second.summary.recoveries
    assert record.to_route == ("full-2",)
    assert record.replayed <= mesh.mesh.state.policy.shadow_chunk_tokens + 2
    assert second.tokens == truth(1, tokens=100)
    assert_nothing_is_left(mesh)


class Scoreless(EchoStage):
    """A full worker that cannot do what it says it can."""

    def _score(self, row, cache, values):
        return replace(super()._score(row, cache, values), scores=())


def test_a_shadow_that_was_given_up_on_a_route_is_not_begun_there_again():
    mesh = mesh_of(full=False, verification_wait_s_max=2.0)
    mesh.join("full", "0-6").stage_type = Scoreless
    assert mesh.run_until(lambda: len(mesh.open_routes()) == 2)
    client = ask(mesh, tokens=300, **VERIFIED)
    began = mesh.now
    assert mesh.run_to_end()
    assert client.error.reason == "VERIFICATION_UNAVAILABLE"
    assert mesh.now - began < 2 * 2.0
    assert len(mesh.events("ShadowLost")) == 1 + SHADOW_RESTARTS_MAX
    assert len(mesh.events("VerificationDegraded")) == 1
    assert_nothing_is_left(mesh)


def test_a_shadow_that_gets_on_may_lose_its_cache_as_often_as_it_does():
    mesh = mesh_of()
    client = ask(mesh, tokens=120, **VERIFIED)
    for verified in range(16, 97, 16):
        assert mesh.run_until(lambda count=verified: client.verified_through >= count)
        mesh.forget("full", 0)
    assert mesh.run_to_end()
    assert len(mesh.events("ShadowLost")) > 1 + SHADOW_RESTARTS_MAX
    assert not mesh.events("VerificationDegraded")
    assert client.tokens == truth(tokens=120)


@pytest.mark.parametrize("why", ["deadline", "shutdown"])
@pytest.mark.parametrize("more", [SHADOW, VERIFIED], ids=["immediate", "verified"])
def test_an_answer_that_only_waits_to_be_verified_when_its_time_is_over(why, more):
    mesh = mesh_of(shadow_chunk_tokens=200)
    client = ask(mesh, **more, deadline=3.0 if why == "deadline" else None)
    assert mesh.run_until(lambda: bool(mesh.mesh.state.settling))
    mesh.stop("full")
    if why == "shutdown":
        mesh.feed(DrainAllRequested(timeout_s=0.5))
    assert mesh.run_to_end(seconds=3.0)
    if more is SHADOW:
        assert client.finish.reason == "length"
        assert client.tokens == truth()
        assert mesh.events("VerificationIncomplete")
    else:
        assert (
            client.error.reason
            == {
                "deadline": "DEADLINE_EXCEEDED",
                "shutdown": "STAGE_DRAINING",
            }[why]
        )
        assert client.tokens == []


def test_a_full_worker_that_is_drained_first_verifies_what_it_was_asked_to():
    mesh = mesh_of(verification_wait_s_max=1.0)
    client = ask(mesh, **VERIFIED)
    assert mesh.run_until(lambda: len(client.tokens) >= 16)
    mesh.feed(DrainRequested("full"))
    later = ask(mesh, 1, **VERIFIED)
    assert mesh.run_until(lambda: bool(client.ends))
    assert client.tokens == truth()
    assert client.verified_through == 60
    assert mesh.run_until(lambda: bool(mesh.events("WorkerDrained")), seconds=1.0)
    assert mesh.run_to_end()
    assert later.error.reason == "VERIFICATION_UNAVAILABLE"


def test_what_it_cannot_verify_in_time_is_verified_by_nobody():
    mesh = mesh_of()
    client = ask(mesh, tokens=300, **SHADOW)
    assert mesh.run_until(lambda: len(client.tokens) >= 16)
    mesh.feed(DrainRequested("full", timeout_s=1.0))
    assert mesh.run_until(lambda: bool(mesh.events("WorkerDrained")), seconds=1.5)
    assert mesh.events("VerificationDegraded")
    assert mesh.run_to_end()
    assert client.tokens == truth(tokens=300)


def test_an_audit_does_not_keep_a_full_worker_that_is_to_leave():
    mesh = mesh_of(audit_budget=1.0)
    client = ask(mesh, tokens=300)
    assert mesh.run_until(lambda: bool(mesh.mesh.requests.shadows.open))
    mesh.feed(DrainRequested("full"))
    assert mesh.run_until(lambda: bool(mesh.events("WorkerDrained")), seconds=1.0)
    assert not client.ends


def test_complete_answers_that_wait_to_be_verified_keep_nobody_from_running():
    mesh = mesh_of(full=False, requests_running_max=2)
    waiting = [ask(mesh, number, tokens=30, **VERIFIED) for number in (0, 2)]
    assert mesh.run_until(lambda: len(mesh.mesh.state.settling) == 2)
    client = ask(mesh, 4, tokens=10)
    assert mesh.run_until(lambda: bool(client.ends), seconds=2.0)
    assert client.tokens == truth(4, tokens=10)
    assert not any(one.ends for one in waiting)
