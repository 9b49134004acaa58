"""What stages and a full worker say of the same boundary, and a request that goes on behind its
scores."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from stage_worker import digests
from stagemesh.checksum import chain_start, crc32c
from stagemesh.frame import FrameKind, StepRow
from stagemesh.sampling import RowOpening, SamplingSpec

PROMPT = (3, 17, 99, 4, 5, 120, 7, 42, 11)
SPEC = SamplingSpec(temperature=0.9, top_k=50, seed=77)
REQUEST = b"a".ljust(16, b".")


def opening(count: int = 40) -> RowOpening:
    return RowOpening(SPEC, len(PROMPT), chain_start(REQUEST, PROMPT), len(PROMPT) + count)


def test_a_full_worker_reports_each_boundary_as_the_stages_themselves_do(pipeline: Any) -> None:
    row = StepRow(REQUEST, 0, PROMPT, samples=True, opening=opening(), boundaries=(2, 4))
    split = pipeline(0, 2, 4, 6).send(FrameKind.PROBE, [row]).rows[0]
    whole = pipeline(0, 6).send(FrameKind.PROBE, [row]).rows[0]
    assert split.digests == whole.digests
    assert [(one.layer, one.position) for one in split.digests] == [
        (layer, position) for layer in (2, 4) for position in range(len(PROMPT))
    ]
    assert split.token.token_id == whole.token.token_id


def test_the_digest_of_a_scored_token_is_the_checksum_its_stage_marked(pipeline: Any) -> None:
    route = pipeline(0, 2, 6)
    route.send(FrameKind.PREFILL, [StepRow(REQUEST, 0, PROMPT, opening=opening())])
    frame = route.send(FrameKind.DECODE, [StepRow(REQUEST, len(PROMPT), (5,), samples=True)])
    full = pipeline(0, 6)
    full.send(FrameKind.PREFILL, [StepRow(REQUEST, 0, PROMPT, opening=opening())])
    scored = full.send(
        FrameKind.SCORE, [StepRow(REQUEST, len(PROMPT), (5, 6), boundaries=(2, 6, 9))]
    ).rows[0]
    assert [one.layer for one in scored.digests] == [2, 2]
    assert scored.digests[0].crc32c == frame.rows[0].marks[0].output_crc32c


def test_a_row_that_asks_for_nothing_is_told_nothing(pipeline: Any) -> None:
    row = StepRow(REQUEST, 0, PROMPT, samples=True, opening=opening())
    assert pipeline(0, 3, 6).send(FrameKind.PROBE, [row]).rows[0].digests == ()


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_a_request_goes_on_behind_its_scores_as_if_it_had_been_decoded_there(
    chunk: int, pipeline: Any
) -> None:
    """Prefill, score what was accepted elsewhere, trim one token, decode: chain and draws fit."""
    whole = pipeline(0, 6).generate("a", PROMPT, 30, SPEC)
    route, accepted = pipeline(0, 6), whole[:16]
    route.send(FrameKind.PREFILL, [StepRow(REQUEST, 0, PROMPT, opening=opening())])
    for start in range(0, len(accepted), chunk):
        piece = tuple(accepted[start : start + chunk])
        row = StepRow(REQUEST, len(PROMPT) + start, piece)
        scores = route.send(FrameKind.SCORE, [row]).rows[0].scores
        assert [one.gap for one in scores] == [0.0] * len(piece)
    position = len(PROMPT) + len(accepted) - 1
    route.send(FrameKind.REWIND, [StepRow(REQUEST, position, ())])
    answer, previous = list(accepted), None
    while len(answer) < 30:
        position = len(PROMPT) + len(answer) - 1
        row = StepRow(REQUEST, position, (answer[-1],), samples=True)
        token = route.send(FrameKind.DECODE, [row]).rows[0].token
        if previous is not None:
            token.verify(previous_chain=previous)
        answer.append(token.token_id)
        previous = token.chain
    assert answer == whole


def test_projections_move_by_about_the_relative_error() -> None:
    values = np.random.default_rng(1).normal(size=(1, 4096)).astype(np.float32)
    noise = np.random.default_rng(2).normal(size=values.shape).astype(np.float32)
    clean = digests.digests(mx.array(values), 1, 0)[0]
    noisy = digests.digests(mx.array(values + 0.1 * noise), 1, 0)[0]
    assert clean.crc32c == crc32c(values.tobytes())
    assert abs(clean.rms - 1.0) < 0.05
    assert 0.001 < abs(noisy.projection - clean.projection) + abs(noisy.rms - clean.rms) < 0.5


def test_an_activation_that_is_not_finite_still_has_a_digest() -> None:
    values = mx.array([[float("nan"), 1.0], [float("inf"), 1.0]])
    for one in digests.digests(values, 1, 0):
        assert one.rms == digests.FINITE_MAX
        one.pack()


def test_signs_are_the_same_everywhere() -> None:
    assert digests.signs(16).tolist() == digests.signs(64)[:16].tolist()
    assert set(digests.signs(512).tolist()) == {1.0, -1.0}


def test_only_boundaries_inside_a_span_are_answered() -> None:
    assert digests.wanted((1, 4, 4, 6, 9), 2, 6, 12) == (4, 6)
    assert digests.wanted((6,), 2, 6, 6) == ()
