"""What users of other systems ran into, row by row: which tests show that it cannot happen here.

Each row of ``HELD`` names the tests that make the trouble happen. They are looked up by name, so
that a test that is renamed or removed leaves its row without cover and this file fails. Rows whose
matter is cheap to show are shown here as well.
"""

from __future__ import annotations

import ast
import functools
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.events import FrameReturned
from coordinator.route import plan_pipeline
from coordinator.testing import MemoryMesh, worker_info
from stagemesh.frame import FrameKind, RowStatus, StepFrame

TESTS = Path(__file__).parents[1]

HELD: dict[str, tuple[str, ...]] = {
    "1 an all-reduced value that differs between members": (
        "stage_worker/test_tensor_parallel.py::test_a_result_that_differs_between_members_is_refused",
        "stage_worker/test_tensor_parallel.py::test_sums_and_gathers_are_right_and_the_same_on_every_member",
        "mesh/test_hop_faults.py::test_what_was_made_wrong_before_it_was_sealed_is_caught_behind_the_hop_and_healed",
    ),
    "2 one operation takes another's bytes, or a stale buffer": (
        "stage_worker/test_tensor_parallel.py::test_members_about_to_do_different_things_refuse_before_they_do_it",
        "stage_worker/test_tensor_parallel.py::test_a_member_that_is_one_raw_operation_ahead_is_found_out_and_no_sum_comes_back",
        "mesh/test_hop_faults.py::test_a_transient_fault_is_caught_named_and_healed_and_nothing_is_computed_twice",
        "stage_worker/test_hosting.py::test_any_split_gives_bit_identical_logits_over_two_chunks_and_decode",
    ),
    "3 what is sent was not computed yet": (
        "stage_worker/test_stage.py::test_lines_that_are_not_the_ones_the_stage_before_marked_are_refused_row_by_row",
    ),
    "4 concurrent requests reach the stages in different order": (
        "coordinator/test_core.py::test_every_answer_is_what_one_process_would_have_said",
        "stage_worker/test_kv_cache.py::test_any_schedule_of_joins_leaves_rewinds_and_groupings_matches_alone",
    ),
    "5 many concurrent requests deadlock in silence": (
        "coordinator/test_failure_detector.py::test_ten_minutes_of_fourfold_overload_bring_no_false_verdict",
        "services/test_generation_service.py::test_a_full_queue_is_overloaded_with_a_retry_time",
        "services/test_stage_link.py::test_a_slow_consumer_slows_the_sender_and_loses_nothing",
    ),
    "6 a rendezvous hangs without a word": (
        "coordinator/test_barrier.py::test_after_the_deadline_it_is_broken_and_names_the_absent_with_their_last_progress",
        "coordinator/test_core_barriers.py::test_a_drain_barrier_never_hangs",
        "stage_worker/test_mx_barrier.py::test_a_member_that_is_stopped_breaks_the_barrier_in_time_and_everybody_is_ended",
    ),
    "7 a killed peer leaves survivors spinning, and nacks storm": (
        "mesh/test_processes.py::test_kill_9_of_a_stage_in_mid_answer_goes_on_with_the_same_tokens",
        "mesh/test_processes.py::test_a_stopped_stage_is_left_behind_and_taken_back_when_it_continues",
        "services/test_stage_link.py::test_five_percent_of_faults_cost_at_most_ten_percent_extra_frames",
        "stage_worker/test_mx_barrier.py::test_a_member_that_dies_breaks_the_barrier_and_the_group_starts_anew_a_bounded_number_of_times",
    ),
    "8 a failure is lost and the client waits for ever": (
        "coordinator/test_core.py::test_whatever_fails_every_request_ends_once_and_no_token_is_ever_wrong",
        "coordinator/test_core.py::test_a_terminal_frame_is_the_last_thing_of_a_request",
    ),
    "10 an old coordinator's or route's messages are believed": (
        "mesh/test_processes.py::test_workers_find_a_restarted_coordinator_by_themselves",
        "services/test_journal_store.py::test_epochs_only_grow_even_when_the_clock_is_set_back",
        "coordinator/test_synchronizer.py::test_rows_of_older_routes_are_fenced_and_of_unopened_ones_refused",
    ),
    "11 a large message crashes or vanishes": (
        "services/test_codec.py::test_a_large_frame_is_encoded_as_a_header_and_parts",
        "services/test_server.py::test_a_message_over_the_limit_is_refused_with_resource_exhausted",
        "services/test_event_service.py::test_a_follower_that_is_too_slow_is_told_exactly_what_it_missed",
    ),
    "12 a split computes fluent nonsense": (
        "stage_worker/test_support.py::test_at_least_85_types_split_exactly_and_none_silently_wrong",
        "coordinator/test_core.py::test_a_pipeline_that_answers_the_probe_otherwise_than_the_full_worker_is_refused",
    ),
    "13 cache and recurrent state are counted wrong": (
        "mesh/test_hop_faults.py::test_a_cache_that_is_one_position_short_is_refused_by_its_own_stage_and_healed",
        "stage_worker/test_kv_cache.py::test_recurrent_state_moves_in_and_out_of_a_batch_unchanged",
        "stage_worker/test_kv_cache.py::test_a_rewind_of_one_row_never_disturbs_its_neighbours",
    ),
    "14 a replaced worker still runs": (
        "mesh/test_processes.py::test_a_second_process_of_the_same_name_replaces_the_first_which_ends",
        "stage_worker/test_mx_barrier.py::test_a_member_that_dies_breaks_the_barrier_and_the_group_starts_anew_a_bounded_number_of_times",
    ),
    "15 layers are dropped or held twice": (
        "coordinator/test_route.py::test_whatever_is_planned_covers_every_layer_exactly_once",
        "stage_worker/test_hosting.py::test_the_stages_together_hold_the_model_once",
    ),
    "16 liveness is green while nothing is computed": (
        "coordinator/test_failure_detector.py::test_a_worker_that_reports_for_ever_without_progress_is_stuck",
        "mesh/test_processes.py::test_health_says_whether_the_mesh_makes_tokens",
    ),
}
"""Row → tests, ``FILE::NAME`` below ``tests/``. Row 9 and 17 are shown below alone."""


@functools.cache
def names_in(path: str) -> frozenset[str]:
    tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, functions))


@pytest.mark.parametrize("row", HELD)
def test_the_tests_that_hold_this_row_exist(row: str) -> None:
    missing = []
    for held in HELD[row]:
        path, _, name = held.partition("::")
        if name not in names_in(path):
            missing.append(held)
    assert not missing


def booted(**policy: object) -> MemoryMesh:
    mesh = MemoryMesh()
    for name, span in (("stage-0", "0-3"), ("stage-1", "3-6")):
        mesh.join(name, span)
    assert mesh.run_until(lambda: bool(mesh.open_routes()))
    return mesh


def test_4_a_step_that_returns_before_an_earlier_one_ends_the_route_and_mixes_nothing() -> None:
    mesh = booted()
    client = mesh.request(1, (1, 2, 3), 20)
    mesh.run_until(lambda: len(client.tokens) == 5)
    (live,) = mesh.mesh.state.routes.values()
    oldest = live.scheduler.oldest
    assert oldest is not None
    ahead = replace(oldest.frame, step=oldest.frame.step + 1)
    mesh.feed(FrameReturned(ahead))
    assert mesh.mesh.state.counters["frames_unexpected"] == 1
    assert mesh.run_to_end()
    honest = booted()
    expected = honest.request(1, (1, 2, 3), 20)
    assert honest.run_to_end()
    assert client.tokens == expected.tokens


def test_9_text_is_derived_at_one_place_from_ids_that_are_the_truth() -> None:
    root = TESTS.parent
    users = {
        path.relative_to(root).as_posix()
        for room in ("stagemesh", "coordinator", "stage_worker", "services")
        for path in (root / room).rglob("*.py")
        if "import Detokenizer" in path.read_text() or "Detokenizer(" in path.read_text()
    }
    assert not {path for path in users if path.startswith(("stage_worker/", "coordinator/"))}
    assert "services/detokenizer.py" in users


def test_13_a_stage_that_is_a_position_off_is_never_asked_again_without_a_rewind_or_replay() -> (
    None
):
    mesh = booted()
    client = mesh.request(1, (1, 2, 3), 20)
    assert mesh.run_until(lambda: len(client.tokens) == 5)
    mesh.forget("stage-1", 1)
    seen: list[StepFrame] = []
    mesh.tampers.append(lambda frame: seen.append(frame) or frame)
    assert mesh.run_to_end()
    failed = next(f.step for f in seen if any(row.status is not RowStatus.OK for row in f.rows))
    kinds = [f.kind for f in seen if f.step > failed and f.hop_from == -1]
    asked = [kind for kind in kinds if kind is not FrameKind.CLOSE]
    assert asked[0] in (FrameKind.REWIND, FrameKind.PREFILL)
    assert client.summary.recoveries


@pytest.mark.parametrize("spans", [("0-3", "4-6"), ("0-4", "3-6"), ("0-3", "3-5"), ("1-3", "3-6")])
def test_15_spans_that_drop_or_double_a_layer_form_no_route(spans: tuple[str, str]) -> None:
    workers = [worker_info(f"stage-{index}", span) for index, span in enumerate(spans)]
    assert plan_pipeline(workers, cost={}) is None


def test_17_a_request_that_no_cache_can_hold_fails_alone_and_the_process_lives() -> None:
    mesh = MemoryMesh()
    for name, span in (("stage-0", "0-3"), ("stage-1", "3-6")):
        mesh.join(name, span, kv_budget_tokens=64)
    assert mesh.run_until(lambda: bool(mesh.open_routes()))
    doomed = mesh.request(1, tuple(range(1, 60)), 100)
    modest = mesh.request(2, (1, 2, 3), 20)
    assert mesh.run_to_end()
    assert doomed.error is not None
    assert doomed.error.reason == "CACHE_EXHAUSTED"
    assert len(modest.tokens) == 20
    assert all(worker.alive for worker in mesh.workers.values())
