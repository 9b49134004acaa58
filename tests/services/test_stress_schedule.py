"""A stress run is a function of its seed: faults, times, places, questions and ids."""

import dataclasses
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.stress import paths
from services.stress.expected import expect, margin_least
from services.stress.paths import Where
from services.stress.plan import (
    BETWEEN_STAGES,
    FRAME_FAULTS,
    FaultName,
    Plan,
    Workload,
    builtin,
    parse,
)
from services.stress.schedule import LEAD_S, schedule
from services.stress.workload import Question, draw_question, question_of, request_id
from stagemesh.errors import InvalidConfiguration
from stagemesh.guards import FRAME_REJECTIONS

ALL = builtin("all")
PLANS = st.dictionaries(st.sampled_from(FaultName), st.integers(1, 4), min_size=1).map(Plan)


@given(PLANS, st.integers(0, 2**40), st.floats(1.0, 2000.0), st.integers(2, 6))
@settings(max_examples=200, deadline=None)
def test_the_schedule_is_a_function_of_its_arguments_and_stays_in_bounds(
    plan, seed, duration_s, stages
):
    first = schedule(plan, seed, duration_s, stages)
    assert first == schedule(plan, seed, duration_s, stages)
    assert [one.number for one in first] == list(range(len(first)))
    assert {one.fault for one in first} == set(plan.faults), "a run meets every fault of its plan"
    for one in first:
        highest = stages if one.fault in FRAME_FAULTS | {FaultName.SIGKILL} else stages - 1
        assert 0 <= one.place <= highest
        assert one.fault not in BETWEEN_STAGES or 0 < one.place < stages
        assert one.at_s > LEAD_S or one.at_s == pytest.approx(LEAD_S, abs=0.1)
        assert sorted(one.order[0]) == sorted(one.order[1])
        assert bool(one.order[0]) == (one.fault is FaultName.SWIZZLE_CLOG)


def test_another_seed_is_another_schedule():
    times = {schedule(ALL, seed, 60.0, 3) for seed in range(20)}
    assert len(times) == 20


def test_every_fault_comes_in_the_first_round_and_as_often_as_it_weighs_later():
    plan = Plan({FaultName.DROP: 3, FaultName.SIGKILL: 1}, every_s=1.0)
    found = schedule(plan, 1, 402.0, 3)
    assert {one.fault for one in found[:2]} == set(plan.faults)
    counts = Counter(one.fault for one in found)
    assert counts[FaultName.DROP] == pytest.approx(3 * counts[FaultName.SIGKILL], abs=4)
    assert len(found) == 401


def test_a_run_too_short_for_a_round_brings_its_faults_closer_together():
    found = schedule(ALL, 5, 20.0, 3)
    assert len(found) == len(FaultName)
    assert max(one.at_s for one in found) <= 20.0


def test_the_first_kill_meets_a_stage_and_later_ones_the_full_worker_too():
    plan = Plan({FaultName.SIGKILL: 1}, every_s=1.0)
    runs = [schedule(plan, seed, 12.0, 2) for seed in range(40)]
    assert {run[0].place for run in runs} == {0, 1}
    assert {one.place for run in runs for one in run[1:]} == {0, 1, 2}


def test_a_plan_without_faults_has_an_empty_schedule():
    assert schedule(builtin("none"), 1, 100.0, 3) == ()


def test_places_are_spread_over_all_stages_and_both_directions():
    plan = Plan({FaultName.DROP: 1}, every_s=1.0)
    assert {one.place for one in schedule(plan, 3, 100.0, 3)} == {0, 1, 2, 3}


# -- plans -----------------------------------------------------------------------------------------


def test_a_plan_file_says_what_it_changes_and_the_rest_is_usual():
    text = "every_s = 2.0\n[workload]\nprompt_tokens = [3, 9]\n"
    text += "[faults]\nall = 1\nsigkill = 4\ndrop = 0"
    plan = parse(text, is_json=False)
    assert plan.every_s == 2.0
    assert plan.workload == Workload(prompt_tokens=(3, 9))
    assert plan.faults[FaultName.SIGKILL] == 4
    assert FaultName.DROP not in plan.faults
    assert len(plan.faults) == len(FaultName) - 1
    assert parse(json.dumps({"faults": {"drop": 1}}), is_json=True).faults == {FaultName.DROP: 1}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("evry_s = 2.0", "evry_s"),
        ("every_s = 0", "every_s"),
        ("every_s = true", "every_s"),
        ("[faults]\nflood = 1", "flood"),
        ("[faults]\ndrop = -1", "drop"),
        ("[faults]\ndrop = 1.5", "drop"),
        ("[workload]\nanswers = 0", "answers"),
        ("[workload]\nanswer_tokens = [9, 3]", "answer_tokens"),
        ("[workload]\nsampled = 2", "sampled"),
        ("faults = 3", "faults"),
        ("not toml at all", "faults"),
    ],
)
def test_a_plan_that_cannot_be_used_names_the_key(text: str, key: str):
    with pytest.raises(InvalidConfiguration) as caught:
        parse(text, is_json=False)
    assert caught.value.metadata["setting"] == key


def test_words_are_plans_too():
    assert set(builtin("all").faults) == set(FaultName)
    assert set(builtin("drop, sigkill").faults) == {FaultName.DROP, FaultName.SIGKILL}
    assert builtin("drop,plan.toml") is None


def test_one_stage_has_no_place_for_a_truncated_activation():
    assert FaultName.TRUNCATE not in builtin("all").possible(1).faults
    assert FaultName.TRUNCATE in builtin("all").possible(2).faults


# -- questions and paths ---------------------------------------------------------------------------


def test_questions_are_a_function_of_the_seed_and_within_the_workload():
    workload = Workload(prompt_tokens=(4, 40), answer_tokens=(2, 6), answers=50)
    pool = [draw_question(workload, 3, 256, number) for number in range(50)]
    assert pool == [draw_question(workload, 3, 256, number) for number in range(50)]
    assert pool != [draw_question(workload, 4, 256, number) for number in range(50)]
    assert draw_question(workload, 3, 256, 7, 1) not in pool
    assert len(pool[0].prompt) == 40
    assert len(pool[1].prompt) == 4
    assert all(2 <= one.count <= 6 for one in pool)
    assert all(3 <= token < 256 for one in pool for token in one.prompt)
    assert {one.temperature for one in pool} == {0.0, 0.8}
    assert {one.shadow for one in pool} == {True, False}


class Undecided:
    """Knows the answers; those of some questions are close to a tie."""

    def __init__(self, margins: list[float]) -> None:
        self.margins = iter(margins)

    async def answer(self, question: Question) -> tuple[tuple[int, ...], float]:
        return (question.number,) * question.count, next(self.margins)


def drawn(number: int, attempt: int) -> Question:
    return draw_question(Workload(), 3, 256, number, attempt)


async def test_a_question_that_ends_in_a_near_tie_is_not_asked():
    side = Undecided([0.5, 0.001, 0.004, 0.6])
    found = await expect(side, drawn, 2, lambda *_: None, margin=0.005)
    assert list(found) == [drawn(0, 0), drawn(1, 2)]
    assert all(set(tokens) == {question.number} for question, tokens in found.items())


async def test_a_bit_exact_library_is_asked_anything():
    found = await expect(Undecided([0.0, 0.0]), drawn, 2, lambda *_: None)
    assert list(found) == [drawn(0, 0), drawn(1, 0)]
    assert margin_least("f32", exact=True) == 0.0
    assert 0.0 < margin_least("f32", exact=False) < margin_least("bf16", exact=False)


async def test_a_model_that_is_forever_undecided_is_said_so():
    with pytest.raises(InvalidConfiguration, match="near tie"):
        await expect(Undecided([0.0] * 100), drawn, 1, lambda *_: None, margin=0.005)


def test_every_question_is_asked_once_before_any_is_asked_again():
    asked = [question_of(1, number, 10) for number in range(100)]
    assert asked[:10] == list(range(10))
    assert set(asked[10:]) == set(range(10))


def test_ids_are_different_and_come_again_with_the_seed():
    ids = [request_id(1, number, attempt) for number in range(50) for attempt in range(2)]
    assert len(set(ids)) == 100
    assert request_id(1, 7) == ids[14]


def test_every_fault_has_a_path_by_which_the_mesh_should_answer_it():
    assert set(paths.PATHS) == set(FaultName)
    assert all(paths.PATHS.values())


HOP = Where(("stage-1",), "stage-0", epochs=(7,))


def taken(fault: FaultName, where: Where = HOP, **after: int) -> str:
    """What is said if these numbers grew, and others beside them."""
    before = {"client:tokens": 5, **dict.fromkeys(after, 3)}
    grown = {name: 3 + more for name, more in after.items()}
    return paths.taken(fault, where, before, {**before, **grown, "client:tokens": 99})


def test_a_path_is_taken_when_its_number_grows():
    name = "counter:frames_rejected.checksum_mismatch@stage-1"
    path = "counter:frames_rejected.[!s]*@stage-1"
    assert taken(FaultName.CORRUPT, **{name: 1}) == path
    assert taken(FaultName.CORRUPT, **{name: 0}) == ""
    assert paths.untaken({FaultName.SIGKILL}, {name: 1}) == ["event:RecoveryFinished"]
    assert paths.untaken({FaultName.DELAY}, {name: 1}) == []


@pytest.mark.parametrize("fault", set(FaultName) - {FaultName.DELAY})
def test_that_answers_went_on_is_the_answer_to_nothing_but_a_delay(fault: FaultName):
    assert taken(fault) == ""
    assert taken(FaultName.DELAY) == "client:tokens"


@pytest.mark.parametrize(
    ("fault", "counter"),
    [
        (FaultName.DROP, "counter:frames_retransmitted@stage-0"),
        (FaultName.DUPLICATE, "counter:duplicates_answered@stage-1"),
        (FaultName.REORDER, "counter:frames_held@stage-1"),
        (FaultName.CORRUPT, "counter:frames_rejected.frame_malformed@stage-1"),
        (FaultName.STALE, "counter:frames_fenced@stage-1"),
        (FaultName.LOST_ANSWER, "counter:duplicates_answered@stage-1"),
        (FaultName.RESET, "counter:links_reopened@stage-0"),
        (FaultName.SLOW_READER, "counter:window_waits@stage-0"),
        (FaultName.SIGKILL, "event:WorkerLost@stage-1"),
        (FaultName.SIGSTOP, "route:closed@stage-1"),
        (FaultName.OTHER_WEIGHTS, "event:WorkerRefused@stage-1"),
    ],
)
def test_a_fault_is_answered_where_it_happened(fault: FaultName, counter: str):
    """A neighbour's fault moves the same number elsewhere, and with it the whole mesh's."""
    name = counter.partition("@")[0]
    assert taken(fault, **{counter: 1})
    assert not taken(fault, **{name: 9, f"{name}@stage-2": 9, f"{name}@coordinator": 9})


def test_as_many_answers_are_wanted_as_frames_were_met_unless_their_route_has_ended():
    where = dataclasses.replace(HOP, times=3)
    name = "counter:frames_retransmitted@stage-0"
    assert not taken(FaultName.DROP, where, **{name: 2})
    assert taken(FaultName.DROP, where, **{name: 3}) == name
    ended = {"event:RouteClosed@7": 1}
    assert taken(FaultName.DROP, where, **{name: 2}, **ended) == "event:RouteClosed@7"
    assert not taken(FaultName.DROP, where, **{"event:RouteClosed@8": 1})


def test_a_hole_behind_a_damaged_frame_is_not_its_refusal():
    named = [reason for reason in FRAME_REJECTIONS if reason.startswith("s")]
    assert named == ["sequence_gap"], "the pattern leaves this one out and no other"
    assert not taken(FaultName.CORRUPT, **{"counter:frames_rejected.sequence_gap@stage-1": 1})


def test_forged_packets_that_nobody_noticed_are_found():
    assert paths.is_forging_unnoticed(30, {"counter:frames_checked": 900, "client:tokens": 50})
    assert not paths.is_forging_unnoticed(30, {"counter:links_reopened": 1})
    assert not paths.is_forging_unnoticed(30, {"counter:frames_rejected_checksum": 1})
    assert not paths.is_forging_unnoticed(3, {}), "they may have carried what nobody needs"
