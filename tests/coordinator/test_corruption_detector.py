"""Scores are held against a tolerance."""

from __future__ import annotations

import math

import pytest

from coordinator.corruption_detector import CorruptionDetector
from coordinator.token_validator import Corruption
from stagemesh.frame import Score

REQUEST = bytes(16)


def score(
    position: int, gap: float = 0.0, *, token_id: int = 1, reference: int | None = None
) -> Score:
    return Score(position, token_id, token_id if reference is None else reference, gap, 1.0)


def judged(scores, *, tolerance=0.0, emitted=(1, 1, 1, 1), first=10):
    detector = CorruptionDetector(tolerance)
    result, found = detector.check_scores(
        scores, emitted, first_position=first, worker="a", request=REQUEST
    )
    return detector, result, found


def test_scores_that_agree_advance_the_watermark():
    detector, result, found = judged([score(10), score(11), score(12)])
    assert (result.verified_to, result.agrees, found) == (13, True, ())
    assert detector.counters["scores_checked"] == 3


def test_a_gap_over_the_tolerance_is_a_mismatch_at_its_position():
    detector, result, found = judged(
        [score(10), score(11, 0.3, reference=2), score(12)], tolerance=0.25
    )
    assert (result.verified_to, result.mismatch.position) == (11, 11)
    assert (found[0].corruption, found[0].worker) == (Corruption.SEMANTIC_SUSPICION, "a")
    assert "reference chose 2, not 1" in found[0].detail
    assert detector.counters["shadow_mismatches"] == 1


def test_a_near_tie_within_the_tolerance_is_accepted_and_noted():
    _, result, found = judged([score(10, 0.2, reference=2)], tolerance=0.25)
    assert (result.verified_to, result.near_ties, found) == (11, 1, ())


def test_with_bit_exact_kernels_another_choice_is_a_mismatch_even_at_gap_zero():
    _, result, _ = judged([score(10, 0.0, reference=2)], tolerance=0.0)
    assert not result.agrees


@pytest.mark.parametrize("gap", [math.nan, math.inf])
def test_a_gap_that_is_not_finite_is_a_mismatch_at_any_tolerance(gap):
    _, result, _ = judged([score(10, gap)], tolerance=1e9)
    assert not result.agrees


def test_scores_for_other_positions_or_tokens_confirm_nothing():
    assert judged([score(10), score(12)])[1].verified_to == 11
    assert judged([score(9)])[1].verified_to == 10
    assert judged([score(10), score(11)], emitted=(1, 7))[1].verified_to == 11
    assert judged([score(10)], emitted=())[1].verified_to == 10
