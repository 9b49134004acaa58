"""Findings add up against a worker, scores against a tolerance, and routes part at one boundary."""

from __future__ import annotations

import math
import random

import pytest

from coordinator.corruption_detector import (
    AuditBudget,
    CorruptionDetector,
    DetectorSettings,
    Tier,
    bisect,
)
from coordinator.token_validator import Corruption, Finding
from stagemesh.frame import Score
from stagemesh.token import StageMark
from stagemesh.topology import Epoch, Route, Span, WorkerInfo, WorkerName

A, B = WorkerName("a"), WorkerName("b")
REQUEST = bytes(16)


def finding(worker=A, kind=Corruption.ORDERING) -> Finding:
    return Finding(kind, 0, 1, worker, REQUEST, 5, "why")


def test_quarantine_is_advised_once_at_the_limit():
    detector = CorruptionDetector(DetectorSettings(consecutive_max=3))
    assert [detector.note([finding()]) for _ in range(4)] == [(), (), (A,), ()]
    assert detector.counters["quarantines_advised"] == 1
    detector.reinstate(A)
    assert [detector.note([finding()]) for _ in range(3)] == [(), (), (A,)]


def test_of_one_row_only_the_first_finding_counts():
    detector = CorruptionDetector()
    detector.note([finding(A), finding(B)])
    detector.note([])
    assert detector.record(A).consecutive == 1
    assert detector.record(B).consecutive == 0


def test_clean_work_ends_a_series_but_not_at_once():
    detector = CorruptionDetector(DetectorSettings(clean_steps_to_forget=3))
    detector.note([finding()])
    detector.note_clean([A, B])
    detector.note_clean([A])
    assert detector.record(A).consecutive == 1
    detector.note_clean([A])
    assert detector.record(A).consecutive == 0


@pytest.mark.parametrize(
    ("kind", "tier"),
    [
        (Corruption.TRANSFER, Tier.TRANSPORT),
        (Corruption.ENCODING, Tier.PROTOCOL),
        (Corruption.ORDERING, Tier.PROTOCOL),
        (Corruption.DUPLICATION, Tier.PROTOCOL),
        (Corruption.LOSS, Tier.PROTOCOL),
        (Corruption.NUMERIC, Tier.ENVELOPE),
        (Corruption.SEMANTIC_SUSPICION, Tier.SHADOW),
    ],
)
def test_every_class_belongs_to_a_tier(kind, tier):
    detector = CorruptionDetector()
    detector.note([finding(kind=kind)])
    assert detector.record(A).by_tier[tier] == 1


def test_hop_faults_count_against_the_sender_and_the_hop():
    detector = CorruptionDetector()
    detector.note_hop_fault(A, B, "CHECKSUM_MISMATCH")
    detector.note_hop_fault(A, B, "SEQUENCE_GAP")
    detector.note_hop_fault(A, B, "NON_FINITE_ACTIVATION")
    assert detector.hop_faults() == {(A, B): 3}
    assert detector.record(A).by_tier == [1, 1, 1, 0, 0]
    assert detector.counters["envelope_exceeded"] == 1


def test_text_signals_are_counted_against_nobody():
    detector = CorruptionDetector()
    detector.note_text(["mojibake", "repetition"])
    detector.note_text([])
    assert detector.counters["text_signals"] == 2
    assert not detector.counters.unregistered()


def score(
    position: int, gap: float = 0.0, *, token_id: int = 1, reference: int | None = None
) -> Score:
    return Score(position, token_id, token_id if reference is None else reference, gap, 1.0)


def judged(scores, *, tolerance=0.0, emitted=(1, 1, 1, 1), first=10):
    detector = CorruptionDetector(DetectorSettings(tolerance=tolerance))
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
    assert found[0].corruption is Corruption.SEMANTIC_SUSPICION
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


def route(*spans: str) -> Route:
    layers = Span.parse(spans[-1]).last
    return Route(
        Epoch(1),
        tuple(
            WorkerInfo(
                WorkerName(f"w{span}"), "", Span.parse(span), layers, "00" * 32, "00", "bf16"
            )
            for span in spans
        ),
    )


def marks(*crcs: int) -> tuple[StageMark, ...]:
    return tuple(StageMark(1, 1, crc) for crc in crcs)


def test_the_first_boundary_that_differs_names_the_stage():
    ours = route("0-4", "4-8", "8-12", "12-16")
    spare = route("0-4", "4-8", "8-12", "12-16")
    suspect = bisect(ours, marks(1, 2, 3, 0), spare, marks(1, 9, 8, 0))
    assert (suspect.worker, suspect.stage, suspect.layer) == ("w4-8", 1, 8)


def test_when_every_boundary_agrees_it_is_the_last_stage():
    ours = route("0-4", "4-8")
    suspect = bisect(ours, marks(1, 0), route("0-4", "4-8"), marks(1, 0))
    assert (suspect.worker, suspect.stage) == ("w4-8", 1)


def test_routes_cut_differently_are_compared_where_their_boundaries_meet():
    ours = route("0-4", "4-8", "8-12")
    theirs = route("0-8", "8-12")
    assert bisect(ours, marks(1, 2, 0), theirs, marks(5, 0)).layer == 8
    assert bisect(ours, marks(1, 2, 0), theirs, marks(2, 0)).worker == "w8-12"


def test_routes_without_a_common_boundary_tell_nothing():
    assert bisect(route("0-4", "4-8"), marks(1, 0), route("0-8"), marks(0)) is None


def test_auditing_takes_its_share_of_compute_and_no_more():
    rng = random.Random(7)
    budget = AuditBudget(0.02)
    audits = 0
    for _ in range(20_000):
        budget.earn(0.05)
        if budget.draws(rng.random(), piece_s=0.05, audit_s=0.01):
            budget.spend(0.01)
            audits += 1
    assert 0.015 < budget.used <= 0.02
    assert audits > 1000


def test_an_obligatory_audit_ignores_the_draw_but_not_the_budget():
    budget = AuditBudget(0.02)
    assert not budget.draws(0.0, piece_s=1.0, audit_s=0.1, must=True)
    budget.earn(10.0)
    assert budget.draws(0.999, piece_s=1.0, audit_s=0.1, must=True)
    assert not budget.draws(0.999, piece_s=1.0, audit_s=0.1)
    assert budget.draws(0.999, piece_s=1.0, audit_s=0.0)
    assert AuditBudget().used == 0.0
