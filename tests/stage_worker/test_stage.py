"""A route of stages gives what one model gives; and every way in which a row can fail is seen to
fire."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step

from stage_worker.activation_checks import TIMED_EVERY
from stage_worker.stage import Stage
from stagemesh.checksum import chain_next, chain_over, chain_start, crc32c, history_digest
from stagemesh.errors import EpochFenced, FrameMalformed, RouteRefused
from stagemesh.frame import FrameKind, RowStatus, StepFrame, StepRow
from stagemesh.sampling import RowOpening, SamplingSpec
from stagemesh.tensor import DType, Tensor

PROMPT = (3, 17, 99, 4, 5, 120, 7, 42, 11)
OTHER = (8, 1, 2)
SPLITS = [(0, 6), (0, 3, 6), (0, 1, 4, 6)]
SAMPLED = SamplingSpec(temperature=0.9, top_p=0.95, top_k=50, repetition_penalty=1.2, seed=77)


def greedy_reference(model: Any, prompt: tuple[int, ...], count: int) -> list[int]:
    steps = generate_step(mx.array(prompt), model, max_tokens=count)
    return [int(token) for token, _ in steps]


@pytest.mark.parametrize("cuts", SPLITS)
def test_every_split_gives_mlx_lms_own_greedy_tokens(
    cuts: tuple[int, ...], pipeline: Any, tiny_llama: Any
) -> None:
    assert pipeline(*cuts).generate("a", PROMPT, 24) == greedy_reference(tiny_llama, PROMPT, 24)


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_prefill_in_chunks_changes_nothing(chunk: int, pipeline: Any) -> None:
    whole = pipeline(0, 3, 6).generate("a", PROMPT, 12)
    assert pipeline(0, 3, 6).generate("a", PROMPT, 12, chunk=chunk) == whole


def test_sampled_tokens_are_the_same_on_every_split(pipeline: Any) -> None:
    answers = [pipeline(*cuts).generate("a", PROMPT, 16, SAMPLED) for cuts in SPLITS]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0] != pipeline(0, 6).generate("a", PROMPT, 16)


@pytest.mark.parametrize("spec", [SamplingSpec(), SAMPLED, replace(SAMPLED, frequency_penalty=0.5)])
def test_a_replay_of_prompt_and_accepted_tokens_continues_the_answer(
    spec: SamplingSpec, pipeline: Any
) -> None:
    whole = pipeline(0, 3, 6).generate("a", PROMPT, 20, spec)
    rest = pipeline(0, 6).generate("a", PROMPT, 13, spec, accepted=whole[:7], chunk=5)
    assert whole[:7] + rest == whole


def test_tokens_carry_chain_marks_and_a_valid_checksum(pipeline: Any, rig: Any) -> None:
    mesh = pipeline(0, 2, 6)
    row = mesh.prefill("a", PROMPT)
    token = row.token
    token.verify(previous_chain=chain_start(rig.key("a"), PROMPT))
    assert (token.position, token.epoch, token.source) == (len(PROMPT), 1, "worker-1")
    assert token.marks == row.marks
    assert [mark.cache_length for mark in row.marks] == [len(PROMPT)] * 2
    assert {mark.history_digest for mark in row.marks} == {history_digest(PROMPT)}
    assert row.marks[0].output_crc32c == crc32c(mesh.hops[1].tensor.payload)
    assert row.marks[1].output_crc32c == 0
    second = mesh.decode({"a": (len(PROMPT), token.token_id)}).rows[0].token
    second.verify(previous_chain=token.chain)
    assert second.position == len(PROMPT) + 1


def test_the_digest_does_not_depend_on_chunks(pipeline: Any) -> None:
    rows = [pipeline(0, 6).prefill("a", PROMPT, chunk=size) for size in (2, 512)]
    assert rows[0].marks == rows[1].marks
    assert rows[0].token.chain == rows[1].token.chain


def test_logprobs_come_only_when_asked(pipeline: Any) -> None:
    plain = pipeline(0, 6).prefill("a", PROMPT).token
    asked = pipeline(0, 6).prefill("a", PROMPT, SamplingSpec(logprobs=4)).token
    assert plain.logprob == 0.0
    assert plain.alternatives == ()
    assert asked.token_id == plain.token_id
    assert asked.logprob < 0.0
    assert len(asked.alternatives) == 3
    assert asked.token_id not in dict(asked.alternatives)
    assert asked.logprob >= asked.alternatives[0][1]


def test_rows_of_a_prefill_step_are_packed_in_row_order(pipeline: Any, rig: Any) -> None:
    mesh = pipeline(0, 3, 6)
    rows = [
        StepRow(rig.key(name), 0, ids, True, rig.opening_for(name, ids))
        for name, ids in (("a", PROMPT), ("b", OTHER))
    ]
    answer = mesh.send(FrameKind.PREFILL, rows)
    tensor = mesh.hops[1].tensor
    assert tensor.shape == (len(PROMPT) + len(OTHER), 64)
    assert tensor.dtype is DType.F32
    alone = [pipeline(0, 3, 6).prefill(n, ids) for n, ids in (("a", PROMPT), ("b", OTHER))]
    assert [row.token.token_id for row in answer.rows] == [row.token.token_id for row in alone]
    assert [row.marks for row in answer.rows] == [row.marks for row in alone]


# -- rewind, close, reopen ------------------------------------------------------------------------


def test_rewind_and_go_on_gives_the_same_tokens_and_chain(pipeline: Any, rig: Any) -> None:
    mesh = pipeline(0, 3, 6)
    whole = mesh.generate("a", PROMPT, 10, SAMPLED)
    target = len(PROMPT) + 4
    row = mesh.send(FrameKind.REWIND, [StepRow(rig.key("a"), target, ())]).rows[0]
    assert row.status is RowStatus.OK
    assert {mark.cache_length for mark in row.marks} == {target}
    assert {m.history_digest for m in row.marks} == {history_digest([*PROMPT, *whole[:4]])}
    for index in range(4, 9):
        token = mesh.decode({"a": (len(PROMPT) + index, whole[index])}).rows[0].token
        assert token.token_id == whole[index + 1]
    chain = chain_over(chain_start(rig.key("a"), PROMPT), len(PROMPT), whole)
    assert token.chain == chain


def test_close_frees_everything_and_may_be_repeated(pipeline: Any, rig: Any) -> None:
    mesh = pipeline(0, 3, 6)
    mesh.generate("a", PROMPT, 3)
    assert [stage.requests for stage in mesh.stages] == [1, 1]
    assert [stage.kv_tokens for stage in mesh.stages] == [len(PROMPT) + 2] * 2
    for _ in range(2):
        row = mesh.send(FrameKind.CLOSE, [StepRow(rig.key("a"), 0, ())]).rows[0]
        assert row.status is RowStatus.OK
        for stage in mesh.stages:
            assert (stage.requests, stage.kv_tokens, stage.reserved_tokens) == (0, 0, 0)


def test_a_second_opening_starts_the_request_over(pipeline: Any) -> None:
    mesh = pipeline(0, 3, 6)
    mesh.generate("a", OTHER, 5)
    assert mesh.generate("a", PROMPT, 6) == pipeline(0, 6).generate("a", PROMPT, 6)
    assert [stage.reserved_tokens for stage in mesh.stages] == [64, 64]


def test_a_probe_samples_greedily_and_leaves_nothing_behind(pipeline: Any, rig: Any) -> None:
    mesh = pipeline(0, 3, 6, budget=1)
    opening = rig.opening_for("p", PROMPT, SamplingSpec(temperature=5.0, logprobs=1, seed=4))
    frames = [
        mesh.send(FrameKind.PROBE, [StepRow(rig.key("p"), 0, PROMPT, True, given)])
        for given in (opening, None)
    ]
    best = pipeline(0, 6).generate("a", PROMPT, 1)[0]
    assert [frame.rows[0].token.token_id for frame in frames] == [best, best]
    assert frames[0].rows[0].token.logprob < 0.0
    assert [stage.requests for stage in mesh.stages] == [0, 0]


# -- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [SamplingSpec(), SAMPLED])
@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_scores_agree_with_every_token_of_an_honest_answer(
    spec: SamplingSpec, chunk: int, pipeline: Any, rig: Any
) -> None:
    whole = pipeline(0, 3, 6).generate("a", PROMPT, 8, spec)
    full = pipeline(0, 6)
    full.prefill("a", PROMPT, spec, samples=False)
    scores: list[Any] = []
    for first in range(0, len(whole), chunk):
        ids = tuple(whole[first : first + chunk])
        row = StepRow(rig.key("a"), len(PROMPT) + first, ids)
        scores += full.send(FrameKind.SCORE, [row]).rows[0].scores
    assert [score.position for score in scores] == [len(PROMPT) + i for i in range(8)]
    assert [score.reference_token_id for score in scores] == whole
    assert all(score.gap == 0.0 and score.margin > 0.0 for score in scores)


def test_a_wrong_token_has_a_gap_and_the_ones_behind_it_are_judged_after_it(
    pipeline: Any, rig: Any
) -> None:
    whole = pipeline(0, 6).generate("a", PROMPT, 6)
    wrong = list(whole)
    wrong[3] = (whole[3] + 1) % 199
    full = pipeline(0, 6)
    full.prefill("a", PROMPT, samples=False)
    row = full.send(FrameKind.SCORE, [StepRow(rig.key("a"), len(PROMPT), tuple(wrong))]).rows[0]
    assert [score.gap > 0.0 for score in row.scores][:4] == [False, False, False, True]
    assert row.scores[3].reference_token_id == whole[3]
    assert row.scores[3].gap >= row.scores[3].margin


def test_without_kept_logits_the_first_token_of_a_score_row_is_not_judged(
    pipeline: Any, rig: Any
) -> None:
    full = pipeline(0, 6)
    whole = full.generate("a", PROMPT, 4)
    row = StepRow(rig.key("a"), len(PROMPT) + 3, (whole[3], 5))
    scores = full.send(FrameKind.SCORE, [row]).rows[0].scores
    assert [score.position for score in scores] == [len(PROMPT) + 4]


# -- rows that fail -------------------------------------------------------------------------------


def decode_row(rig: Any, name: str, position: int, token: int = 5) -> StepRow:
    return StepRow(rig.key(name), position, (token,), samples=True)


def test_a_decode_at_the_wrong_position_fails_that_row_only(pipeline: Any, rig: Any) -> None:
    mesh = pipeline(0, 3, 6)
    mesh.prefill("a", PROMPT)
    good = mesh.prefill("b", OTHER).token
    for wrong in (len(PROMPT) - 1, len(PROMPT) + 1):
        rows = [decode_row(rig, "a", wrong), decode_row(rig, "b", len(OTHER), good.token_id)]
        answer = mesh.send(FrameKind.DECODE, rows).rows
        assert answer[0].status is RowStatus.POSITION_MISMATCH
        assert (answer[0].fault_stage, answer[0].marks, answer[0].token) == (0, (), None)
        assert answer[1].token is not None
        mesh.send(FrameKind.REWIND, [StepRow(rig.key("b"), len(OTHER), ())])
    assert mesh.stages[0].stage_counters["rows_failed.position_mismatch"] == 2
    assert mesh.stages[1].stage_counters["rows_failed.position_mismatch"] == 0


def test_an_opening_behind_position_zero_is_refused(pipeline: Any, rig: Any) -> None:
    row = StepRow(rig.key("a"), 2, PROMPT, True, rig.opening_for("a", PROMPT))
    answer = pipeline(0, 6).send(FrameKind.PREFILL, [row]).rows[0]
    assert answer.status is RowStatus.POSITION_MISMATCH


@pytest.mark.parametrize("kind", [FrameKind.PREFILL, FrameKind.DECODE, FrameKind.REWIND])
def test_a_request_the_stage_does_not_know_is_a_lost_cache(
    kind: FrameKind, pipeline: Any, rig: Any
) -> None:
    row = StepRow(rig.key("ghost"), 0, () if kind is FrameKind.REWIND else (5,))
    answer = pipeline(0, 6).send(kind, [row]).rows[0]
    assert answer.status is RowStatus.CACHE_LOST


def test_a_later_stage_that_lost_its_cache_says_so_by_its_index(pipeline: Any, rig: Any) -> None:
    mesh = pipeline(0, 3, 6)
    token = mesh.prefill("a", PROMPT).token
    mesh.stages[1]._held.forget(rig.key("a"))
    answer = mesh.decode({"a": (len(PROMPT), token.token_id)}).rows[0]
    assert (answer.status, answer.fault_stage) == (RowStatus.CACHE_LOST, 1)
    assert len(answer.marks) == 1


def test_a_reserve_over_the_budget_is_refused_before_any_work(pipeline: Any, rig: Any) -> None:
    mesh = pipeline(0, 6, budget=100)
    mesh.prefill("a", PROMPT)
    row = StepRow(rig.key("b"), 0, OTHER, True, rig.opening_for("b", OTHER))
    assert mesh.send(FrameKind.PREFILL, [row]).rows[0].status is RowStatus.CACHE_EXHAUSTED
    mesh.send(FrameKind.CLOSE, [StepRow(rig.key("a"), 0, ())])
    assert mesh.send(FrameKind.PREFILL, [row]).rows[0].status is RowStatus.OK


def test_growth_beyond_the_reserve_needs_room_in_the_budget(pipeline: Any, rig: Any) -> None:
    mesh = pipeline(0, 6, budget=len(PROMPT) + 1)
    row = StepRow(rig.key("a"), 0, PROMPT, True, rig.opening_for("a", PROMPT, reserve=0))
    mesh.send(FrameKind.PREFILL, [row])
    statuses = [
        mesh.send(FrameKind.DECODE, [decode_row(rig, "a", len(PROMPT) + i)]).rows[0].status
        for i in range(2)
    ]
    assert statuses == [RowStatus.OK, RowStatus.CACHE_EXHAUSTED]


@pytest.mark.parametrize(
    ("kind", "ids", "opens"),
    [
        (FrameKind.DECODE, (1, 2), False),
        (FrameKind.DECODE, (1,), True),
        (FrameKind.PREFILL, (), True),
        (FrameKind.PREFILL, (199,), True),
        (FrameKind.SCORE, (), False),
    ],
)
def test_rows_that_ask_for_nonsense_are_invalid(
    kind: FrameKind, ids: tuple[int, ...], opens: bool, pipeline: Any, rig: Any
) -> None:
    mesh = pipeline(0, 6)
    mesh.prefill("a", PROMPT)
    first = 0 if opens else len(PROMPT)
    opening = rig.opening_for("a", PROMPT) if opens else None
    answer = mesh.send(kind, [StepRow(rig.key("a"), first, ids, True, opening)]).rows[0]
    assert answer.status is RowStatus.INVALID


def test_a_request_twice_in_one_step_is_invalid_the_second_time(pipeline: Any, rig: Any) -> None:
    mesh = pipeline(0, 6)
    mesh.prefill("a", PROMPT)
    rows = [decode_row(rig, "a", len(PROMPT)), decode_row(rig, "a", len(PROMPT) + 1)]
    answer = mesh.send(FrameKind.DECODE, rows).rows
    assert [row.status for row in answer] == [RowStatus.OK, RowStatus.INVALID]


def test_sampling_ahead_of_the_prefills_end_is_invalid_and_undone(pipeline: Any, rig: Any) -> None:
    mesh = pipeline(0, 6)
    mesh.prefill("a", PROMPT)
    mesh.send(FrameKind.REWIND, [StepRow(rig.key("a"), 4, ())])
    answer = mesh.send(FrameKind.DECODE, [decode_row(rig, "a", 4)]).rows[0]
    assert answer.status is RowStatus.INVALID
    assert mesh.stages[0].kv_tokens == 4


def test_a_row_that_arrives_failed_passes_untouched_and_keeps_its_lines(
    pipeline: Any, rig: Any
) -> None:
    mesh = pipeline(0, 2, 4, 6)
    for name, ids in (("a", PROMPT), ("b", OTHER)):
        mesh.prefill(name, ids)
    broken = decode_row(rig, "a", len(PROMPT)).failed(
        RowStatus.COMPUTE_FAILED, stage=7, detail="elsewhere"
    )
    answer = mesh.send(FrameKind.DECODE, [broken, decode_row(rig, "b", len(OTHER))])
    assert answer.rows[0] == broken
    assert answer.rows[1].token is not None
    for hop in mesh.hops[1:]:
        lines = np.frombuffer(hop.tensor.payload, np.float32).reshape(2, 64)
        assert not lines[0].any()
        assert lines[1].any()
    assert all(stage.kv_tokens == len(PROMPT) + len(OTHER) + 1 for stage in mesh.stages)


def poison(stage: Stage, token_id: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make forwards raise after their caches grew whenever ``token_id`` is among the tokens."""
    compute = stage.model.forward

    def forward(tokens: mx.array, *args: Any, **options: Any) -> mx.array:
        output = compute(tokens, *args, **options)
        if (tokens == token_id).any().item():
            raise RuntimeError("poisoned")
        return output

    monkeypatch.setattr(stage.model, "forward", forward)


def test_a_forward_that_raises_fails_only_the_guilty_row(
    pipeline: Any, rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = pipeline(0, 3, 6)
    mesh = pipeline(0, 3, 6)
    for each in (calm, mesh):
        for name, ids in (("a", PROMPT), ("b", OTHER), ("c", PROMPT[:5])):
            each.prefill(name, ids)
    wanted = {"a": (len(PROMPT), 9), "c": (5, 10)}
    expected = calm.decode(wanted)
    with monkeypatch.context() as patched:
        poison(mesh.stages[1], 66, patched)
        answer = mesh.decode({"a": wanted["a"], "b": (len(OTHER), 66), "c": wanted["c"]})
    assert [row.status for row in answer.rows] == [
        RowStatus.OK,
        RowStatus.COMPUTE_FAILED,
        RowStatus.OK,
    ]
    assert "poisoned" in answer.rows[1].fault_detail
    assert answer.rows[1].fault_stage == 1
    found = [answer.rows[0].token, answer.rows[2].token]
    assert [t.token_id for t in found] == [row.token.token_id for row in expected.rows]
    assert mesh.stages[1].stage_counters["batches_split"] == 1
    lost = mesh.decode({"b": (len(OTHER) + 1, 5)}).rows[0]
    assert (lost.status, lost.fault_stage) == (RowStatus.CACHE_LOST, 1)
    follow = {"a": (len(PROMPT) + 1, 12), "c": (6, 13)}
    assert [r.token.token_id for r in mesh.decode(follow).rows] == [
        r.token.token_id for r in calm.decode(follow).rows
    ]


def test_a_lost_cache_does_not_split_the_batch_it_was_in(pipeline: Any, rig: Any) -> None:
    mesh, calm = pipeline(0, 3, 6), pipeline(0, 3, 6)
    for each in (calm, mesh):
        for name, ids in (("a", PROMPT), ("b", OTHER), ("c", PROMPT[:5])):
            each.prefill(name, ids)
    wanted = {"a": (len(PROMPT), 9), "b": (len(OTHER), 66), "c": (5, 10)}
    expected = calm.decode(wanted)
    mesh.stages[1]._held.caches.drop(rig.key("b"))
    answer = mesh.decode(wanted)
    assert [row.status for row in answer.rows] == [
        RowStatus.OK,
        RowStatus.CACHE_LOST,
        RowStatus.OK,
    ]
    for index in (0, 2):
        assert answer.rows[index].token.token_id == expected.rows[index].token.token_id
    counters = mesh.stages[1].stage_counters
    assert (counters["batches_split"], counters["rows_batched"]) == (0, 2)


def spoil(frame: StepFrame, change: Any, *, marked: bool = True) -> StepFrame:
    """The frame with other values; ``marked`` as if the stage before had computed them."""
    values = np.frombuffer(frame.tensor.payload, np.float32).reshape(frame.tensor.shape).copy()
    change(values)
    rows, start = [], 0
    for row in frame.rows:
        lines = values[start : start + row.token_count].tobytes()
        start += row.token_count
        mark = replace(row.marks[-1], output_crc32c=crc32c(lines)) if marked else row.marks[-1]
        rows.append(replace(row, marks=(*row.marks[:-1], mark)))
    tensor = replace(frame.tensor, payload=values.tobytes())
    return replace(frame, rows=tuple(rows), tensor=tensor)


def test_lines_that_are_not_the_ones_the_stage_before_marked_are_refused_row_by_row(
    pipeline: Any, rig: Any
) -> None:
    def swapped(frame: StepFrame) -> StepFrame:
        return spoil(frame, lambda values: values[1].sort(), marked=False)

    mesh = pipeline(0, 3, 6)
    for name, ids in (("a", PROMPT), ("b", OTHER)):
        mesh.prefill(name, ids)
    rows = [decode_row(rig, "a", len(PROMPT)), decode_row(rig, "b", len(OTHER))]
    answer = mesh.send(FrameKind.DECODE, rows, alter=swapped).rows
    assert [row.status for row in answer] == [RowStatus.OK, RowStatus.CORRUPTED]
    assert answer[1].fault_stage == 0
    assert "marked" in answer[1].fault_detail


def test_received_nan_is_blamed_on_the_sender_and_the_row_can_be_repeated(
    pipeline: Any, rig: Any
) -> None:
    def nan_in_second(frame: StepFrame) -> StepFrame:
        return spoil(frame, lambda values: values.__setitem__((1, 7), np.nan))

    mesh = pipeline(0, 3, 6)
    for name, ids in (("a", PROMPT), ("b", OTHER)):
        mesh.prefill(name, ids)
    rows = [decode_row(rig, "a", len(PROMPT)), decode_row(rig, "b", len(OTHER))]
    answer = mesh.send(FrameKind.DECODE, rows, alter=nan_in_second).rows
    assert [row.status for row in answer] == [RowStatus.OK, RowStatus.NON_FINITE]
    assert answer[1].fault_stage == 0
    mesh.send(FrameKind.REWIND, [StepRow(rig.key("b"), len(OTHER), ())])
    assert mesh.send(FrameKind.DECODE, [rows[1]]).rows[0].token is not None


@pytest.mark.parametrize(
    "tensor",
    [
        None,
        Tensor(DType.F32, (2, 64), bytes(512)),
        Tensor(DType.F32, (1, 32), bytes(128)),
        Tensor(DType.F16, (1, 64), bytes(128)),
    ],
)
def test_an_activation_of_another_shape_or_dtype_is_invalid_and_the_senders_fault(
    tensor: Tensor | None, pipeline: Any, rig: Any
) -> None:
    mesh = pipeline(0, 3, 6)
    mesh.prefill("a", PROMPT)
    row = decode_row(rig, "a", len(PROMPT))
    answer = mesh.send(FrameKind.DECODE, [row], alter=lambda f: replace(f, tensor=tensor)).rows[0]
    assert (answer.status, answer.fault_stage) == (RowStatus.INVALID, 0)


def scale_output(stage: Stage, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = stage.model.forward
    monkeypatch.setattr(stage.model, "forward", lambda *a, **o: compute(*a, **o) * factor)


@pytest.mark.parametrize(
    ("factor", "status"),
    [
        (1e4, RowStatus.OUT_OF_ENVELOPE),
        (1e-4, RowStatus.OUT_OF_ENVELOPE),
        (float("nan"), RowStatus.NON_FINITE),
        (float("inf"), RowStatus.NON_FINITE),
    ],
)
@pytest.mark.parametrize("index", [0, 1])
def test_a_stage_that_computes_outsized_or_non_finite_numbers_is_named(
    factor: float,
    status: RowStatus,
    index: int,
    pipeline: Any,
    rig: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mesh = pipeline(0, 2, 4, 6)
    mesh.send(FrameKind.PROBE, [StepRow(rig.key("p"), 0, PROMPT, True)])
    token = mesh.prefill("a", PROMPT).token
    with monkeypatch.context() as patched:
        scale_output(mesh.stages[index], factor, patched)
        answer = mesh.decode({"a": (len(PROMPT), token.token_id)}).rows[0]
    assert (answer.status, answer.fault_stage) == (status, index)
    assert mesh.stages[index].kv_tokens == len(PROMPT)


def test_non_finite_logits_are_the_last_stages_fault_and_are_undone(
    pipeline: Any, rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for spec in (SamplingSpec(), SAMPLED):
        mesh = pipeline(0, 3, 6)
        token = mesh.prefill("a", PROMPT, spec).token
        with monkeypatch.context() as patched:
            scale_output(mesh.stages[1], float("nan"), patched)
            answer = mesh.decode({"a": (len(PROMPT), token.token_id)}).rows[0]
        assert (answer.status, answer.fault_stage) == (RowStatus.NON_FINITE, 1)
        assert answer.token is None
        assert mesh.stages[1].kv_tokens == len(PROMPT)
        mesh.send(FrameKind.REWIND, [StepRow(rig.key("a"), len(PROMPT), ())])
        assert mesh.decode({"a": (len(PROMPT), token.token_id)}).rows[0].token is not None


def test_non_finite_logits_are_seen_when_scoring(
    pipeline: Any, rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = pipeline(0, 6)
    mesh.prefill("a", PROMPT, samples=False)
    with monkeypatch.context() as patched:
        scale_output(mesh.stages[0], float("nan"), patched)
        answer = mesh.send(FrameKind.SCORE, [StepRow(rig.key("a"), len(PROMPT), (1, 2))]).rows[0]
    assert answer.status is RowStatus.NON_FINITE
    assert answer.scores == ()


def test_a_cache_that_cannot_be_trimmed_refuses_the_rewind_and_keeps_the_request(
    pipeline: Any, rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = pipeline(0, 6)
    mesh.prefill("a", PROMPT)
    with monkeypatch.context() as patched:
        patched.setattr(mesh.stages[0].model, "trimmable", False)
        answer = mesh.send(FrameKind.REWIND, [StepRow(rig.key("a"), 2, ())]).rows[0]
        assert answer.status is RowStatus.INVALID
        assert "trim" not in mesh.stages[0].capabilities
    assert mesh.stages[0].kv_tokens == len(PROMPT)


def test_a_rewind_ahead_of_the_cache_is_a_position_mismatch(pipeline: Any, rig: Any) -> None:
    mesh = pipeline(0, 6)
    mesh.prefill("a", PROMPT)
    answer = mesh.send(FrameKind.REWIND, [StepRow(rig.key("a"), len(PROMPT) + 1, ())]).rows[0]
    assert answer.status is RowStatus.POSITION_MISMATCH


def test_a_cache_object_that_disagrees_with_the_session_is_caught(pipeline: Any, rig: Any) -> None:
    mesh = pipeline(0, 6)
    mesh.prefill("a", PROMPT)
    stage = mesh.stages[0]
    stage.model.trim(stage._held.caches.single(rig.key("a"), len(PROMPT)), 1)
    answer = mesh.send(FrameKind.DECODE, [decode_row(rig, "a", len(PROMPT))]).rows[0]
    assert answer.status is RowStatus.POSITION_MISMATCH


# -- epochs and addresses -------------------------------------------------------------------------


def test_opening_a_newer_epoch_forgets_the_older_one(pipeline: Any, rig: Any) -> None:
    mesh = pipeline(0, 6)
    mesh.prefill("a", PROMPT)
    mesh.stages[0].open(1, 0, 1)
    assert mesh.stages[0].requests == 1
    mesh.stages[0].open(2, 0, 1)
    assert mesh.stages[0].requests == 0
    with pytest.raises(EpochFenced):
        mesh.send(FrameKind.DECODE, [decode_row(rig, "a", len(PROMPT))])
    assert mesh.stages[0].stage_counters["frames_fenced"] == 1
    with pytest.raises(EpochFenced):
        mesh.stages[0].open(1, 0, 1)


def test_a_fenced_stage_computes_nothing_until_it_is_opened_again(pipeline: Any, rig: Any) -> None:
    mesh = pipeline(0, 6)
    mesh.prefill("a", PROMPT)
    mesh.stages[0].fence(0)
    assert mesh.stages[0].requests == 1
    mesh.stages[0].fence(1)
    assert (mesh.stages[0].requests, mesh.stages[0].reserved_tokens) == (0, 0)
    with pytest.raises(EpochFenced):
        mesh.send(FrameKind.DECODE, [decode_row(rig, "a", len(PROMPT))])
    mesh.stages[0].open(2, 0, 1)
    mesh.epoch = 2
    assert mesh.prefill("a", PROMPT).token is not None


@pytest.mark.parametrize(("index", "count"), [(0, 1), (1, 2), (0, 0), (2, 2)])
def test_a_span_takes_only_the_place_it_fits(index: int, count: int, pipeline: Any) -> None:
    stage = pipeline(0, 3, 6).stages[0]
    with pytest.raises(RouteRefused):
        stage.open(5, index, count)


def test_a_frame_for_another_stage_or_without_a_kind_is_malformed(pipeline: Any, rig: Any) -> None:
    stage = pipeline(0, 6).stages[0]
    for kind, hop in ((FrameKind.DECODE, 1), (FrameKind.UNSPECIFIED, 0)):
        frame = StepFrame(kind, rig.FINGERPRINT, 1, 1, hop - 1, hop, ())
        with pytest.raises(FrameMalformed):
            stage.step(frame)


def test_timings_and_counters_describe_the_last_step(pipeline: Any) -> None:
    mesh = pipeline(0, 3, 6)
    mesh.prefill("a", PROMPT)
    timing = mesh.stages[0].last_timings
    assert (timing.rows, timing.tokens, timing.kind) == (1, len(PROMPT), FrameKind.PREFILL)
    assert 0 < timing.compute_ns <= timing.total_ns
    assert mesh.stages[1].stage_counters["tokens_computed"] == len(PROMPT)


def test_capabilities_say_what_the_stage_can_do(pipeline: Any) -> None:
    first, last = pipeline(0, 3, 6).stages
    assert first.capabilities == {"batch", "trim"}
    assert last.capabilities == {"batch", "trim", "score"}
    assert pipeline(0, 6).stages[0].capabilities == {"batch", "trim", "score", "boundaries"}


def test_chain_next_is_what_the_stage_used(pipeline: Any, rig: Any) -> None:
    opening = RowOpening(SamplingSpec(), len(PROMPT), b"c" * 16, 64)
    row = StepRow(rig.key("a"), 0, PROMPT, True, opening)
    token = pipeline(0, 6).send(FrameKind.PREFILL, [row]).rows[0].token
    assert token.chain == chain_next(b"c" * 16, len(PROMPT), token.token_id)


def test_one_check_of_sizes_in_eight_is_timed_and_counts_for_all(pipeline: Any) -> None:
    """In CPU time of the compute thread: what others do to the machine is no cost of a check."""
    mesh = pipeline(0, 3, 6)
    first = mesh.stages[0]
    looks = iter(range(0, 1_000_000, 5000))
    first._sizes._cpu_ns = lambda: next(looks)
    mesh.generate("a", PROMPT, 2 * TIMED_EVERY)
    assert first.stage_counters["validation_us.numeric"] == 2 * TIMED_EVERY * 5
    assert next(looks) == 4 * 5000
