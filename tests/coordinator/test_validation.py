"""From evidence to a verdict and a culprit: every rule fires, and only when it should."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from coordinator.validation.evidence import (
    Delivered,
    Expectation,
    Failure,
    Judgement,
    Observation,
    StagePlace,
    Tolerance,
)
from coordinator.validation.scoring import calibrated_tau, overall_score, score_run
from stagemesh.checksum import history_digest
from stagemesh.token import StageMark
from stagemesh.topology import Span

PROMPT = (5, 6, 7)
TOKENS = (10, 11, 12, 13)
EXACT = Tolerance()
MARGIN = Tolerance(0.01)
STAGES = (
    StagePlace("left", Span(0, 2)),
    StagePlace("middle", Span(2, 4)),
    StagePlace("right", Span(4, 6)),
)


def _marks(index: int, crcs: tuple[int, ...] = (100, 200, 0)) -> tuple[StageMark, ...]:
    length = len(PROMPT) + index
    history = history_digest((*PROMPT, *TOKENS[:index]))
    return tuple(StageMark(length, history, crc + index if crc else 0) for crc in crcs)


def _token(index: int, token_id: int | None = None) -> Delivered:
    chosen = TOKENS[index] if token_id is None else token_id
    logprobs = ((chosen, math.log(0.5)), (99, math.log(0.3)))
    return Delivered(chosen, len(PROMPT) + index, 1, logprobs, _marks(index))


def _judgement(index: int) -> Judgement:
    return Judgement(
        token_id=TOKENS[index],
        margin=0.5,
        gap=0.0,
        rank=1,
        logits=(2.0, 2.0),
        logprobs=(math.log(0.5), math.log(0.3)),
        digests=((100 + index,), (200 + index,)),
    )


def seen() -> Observation:
    tokens = tuple(_token(index) for index in range(len(TOKENS)))
    return Observation(PROMPT, len(TOKENS), tokens, "text", STAGES)


def expected() -> Expectation:
    judgements = tuple(_judgement(index) for index in range(len(TOKENS)))
    return Expectation(PROMPT, TOKENS, "text", "text", judgements)


def with_token(index: int, **changes: object) -> Observation:
    base = seen()
    changed = replace(base.tokens[index], **changes)  # type: ignore[arg-type]
    return replace(base, tokens=(*base.tokens[:index], changed, *base.tokens[index + 1 :]))


def with_judgement(index: int, **changes: object) -> Expectation:
    base = expected()
    changed = replace(base.judgements[index], **changes)  # type: ignore[arg-type]
    all_of = (*base.judgements[:index], changed, *base.judgements[index + 1 :])
    return replace(base, judgements=all_of)


@pytest.mark.parametrize("tolerance", [EXACT, MARGIN])
def test_equal_evidence_is_well_in_both_modes(tolerance: Tolerance) -> None:
    verdict = score_run(seen(), expected(), tolerance)
    assert verdict.ok
    assert (verdict.score, verdict.agreement, verdict.common_prefix) == (1.0, 1.0, 4)
    assert (verdict.max_abs_dlogit, verdict.mean_kl) == (0.0, 0.0)
    assert (verdict.first_divergence, verdict.culprit) == (None, None)
    assert verdict.boundaries_compared == 8


def test_a_flip_within_tau_is_explained_in_margin_mode_and_an_error_in_exact_mode() -> None:
    flipped = with_judgement(2, token_id=77, gap=0.008, rank=2, margin=0.009, logits=(1.992, 2.0))
    verdict = score_run(seen(), flipped, MARGIN)
    assert verdict.ok
    assert verdict.agreement == 0.75
    divergence = verdict.first_divergence
    assert divergence is not None
    assert (divergence.position, divergence.ours, divergence.reference) == (2, 12, 77)
    assert (divergence.logit_ours, divergence.logit_reference) == (1.992, 2.0)
    assert (divergence.margin, divergence.gap, divergence.rank) == (0.009, 0.008, 2)
    assert divergence.explained
    exact = score_run(seen(), flipped, EXACT)
    assert not exact.ok
    assert exact.score == 0.75
    assert exact.culprit is not None
    assert (exact.culprit.kind, exact.culprit.worker) == ("logits", "right")


def test_behind_an_explained_flip_the_text_is_that_of_the_delivered_tokens() -> None:
    flipped = with_judgement(2, token_id=77, gap=0.008, rank=2)
    other = replace(flipped, token_ids=(10, 11, 77, 13), delivered_text="next")
    verdict = score_run(replace(seen(), text="next"), other, MARGIN)
    assert (verdict.ok, verdict.text_agrees, verdict.score) == (True, True, 1.0)
    for text in ("text", "garbage", ""):
        verdict = score_run(replace(seen(), text=text), other, MARGIN)
        assert (verdict.ok, verdict.text_agrees, verdict.score) == (False, False, 0.0)
        assert verdict.problems == ("text",)
        assert verdict.culprit is not None
        assert (verdict.culprit.kind, verdict.culprit.worker) == ("delivery", "detokenizer")


@pytest.mark.parametrize(("gap", "rank"), [(0.02, 2), (0.008, 3)])
def test_a_flip_that_tau_does_not_explain_fails(gap: float, rank: int) -> None:
    flipped = with_judgement(1, token_id=77, gap=gap, rank=rank)
    verdict = score_run(seen(), flipped, MARGIN)
    assert not verdict.ok
    assert verdict.first_divergence is not None
    assert not verdict.first_divergence.explained


def test_a_low_temperature_magnifies_what_tau_explains() -> None:
    flipped = with_judgement(1, token_id=77, gap=0.019, rank=2)
    assert not score_run(seen(), flipped, MARGIN, temperature=1.0).ok
    assert score_run(seen(), flipped, MARGIN, temperature=0.5).ok


def test_two_explained_flips_in_a_short_answer_are_too_many() -> None:
    base = expected()
    flip = {"token_id": 77, "gap": 0.001, "rank": 2}
    judgements = (*(replace(one, **flip) for one in base.judgements[:2]), *base.judgements[2:])
    verdict = score_run(seen(), replace(base, judgements=judgements), MARGIN)
    assert not verdict.ok
    assert any("flipped" in problem for problem in verdict.problems)


def test_one_bit_of_a_log_probability_fails_exact_mode_only() -> None:
    bent = with_judgement(3, logprobs=(math.nextafter(math.log(0.5), 0.0), math.log(0.3)))
    assert score_run(seen(), bent, MARGIN).ok
    verdict = score_run(seen(), bent, EXACT)
    assert not verdict.ok
    assert verdict.culprit is not None
    assert (verdict.culprit.kind, verdict.culprit.position) == ("logits", 3)


def long_answer(count: int, flips: int) -> tuple[Observation, Expectation]:
    """``count`` tokens of which so many are flips that tau explains, far apart."""
    every = count // max(1, flips)
    ids = tuple(10 + index % 50 for index in range(count))
    tokens = []
    judgements = []
    for index, token_id in enumerate(ids):
        history = history_digest((*PROMPT, *ids[:index]))
        marks = tuple(StageMark(len(PROMPT) + index, history, crc) for crc in (100, 200, 0))
        logprobs = ((token_id, math.log(0.5)), (99, math.log(0.3)))
        tokens.append(Delivered(token_id, len(PROMPT) + index, 1, logprobs, marks))
        flips_here = index % every == 0 and index // every < flips
        chosen = {"token_id": 77, "gap": 0.001, "rank": 2} if flips_here else {"token_id": token_id}
        judgements.append(replace(_judgement(0), digests=((100,), (200,)), **chosen))
    return (
        Observation(PROMPT, count, tuple(tokens), "text", STAGES),
        Expectation(PROMPT, ids, "text", "text", tuple(judgements)),
    )


@pytest.mark.parametrize(
    ("count", "flips", "ok"), [(200, 2, True), (200, 3, False), (40, 1, True), (40, 2, False)]
)
def test_explained_flips_are_rare_or_fail(count: int, flips: int, ok: bool) -> None:
    """At most 1.3 %: 2.6 of 200; and one however short the answer is."""
    verdict = score_run(*long_answer(count, flips), MARGIN)
    assert verdict.agreement == pytest.approx(1 - flips / count)
    assert verdict.ok is ok
    assert verdict.problems == (() if ok else (f"{flips} of {count} tokens flipped",))
    assert verdict.score == 1.0


@pytest.mark.parametrize(("taus", "ok"), [(15.0, True), (17.0, False)])
def test_one_difference_of_many_taus_is_no_rounding_though_one_over_tau_is(
    taus: float, ok: bool
) -> None:
    observed, base = long_answer(200, 0)
    far = replace(base.judgements[120], logprobs=(math.log(0.5), math.log(0.3) - taus * MARGIN.tau))
    judgements = (*base.judgements[:120], far, *base.judgements[121:])
    verdict = score_run(observed, replace(base, judgements=judgements), MARGIN)
    assert verdict.max_abs_dlogit == pytest.approx(taus * MARGIN.tau)
    assert verdict.ok is ok
    assert verdict.problems == (() if ok else ("1 answer indices differ, first 120",))
    assert verdict.score == (1.0 if ok else 199 / 200)


def test_differences_are_absolute_and_their_mean_is_over_every_reported_token() -> None:
    bent = with_judgement(1, logprobs=(math.log(0.5) + 0.004, math.log(0.3) - 0.006))
    verdict = score_run(seen(), bent, MARGIN)
    assert verdict.max_abs_dlogit == pytest.approx(0.006)
    assert verdict.mean_abs_dlogit == pytest.approx((0.004 + 0.006) / (2 * len(TOKENS)))
    assert verdict.differences == pytest.approx((0, 0, 0.004, 0.006, 0, 0, 0, 0))


@pytest.mark.parametrize(("mean_kl_max", "ok"), [(1e-3, False), (1e-2, True)])
def test_how_far_distributions_may_drift_apart_is_the_tolerances(
    mean_kl_max: float, ok: bool
) -> None:
    base = expected()
    drifted = tuple(
        replace(one, logprobs=(math.log(0.47), math.log(0.32))) for one in base.judgements
    )
    tolerance = Tolerance(0.5, mean_kl_max)
    verdict = score_run(seen(), replace(base, judgements=drifted), tolerance)
    assert 1e-3 < verdict.mean_kl < 1e-2
    assert verdict.ok is ok
    assert verdict.problems == (() if ok else (f"mean KL {verdict.mean_kl:.3g}",))


def test_distributions_that_drift_apart_fail_though_every_token_agrees() -> None:
    base = expected()
    drifted = tuple(
        replace(one, logprobs=(math.log(0.45), math.log(0.33))) for one in base.judgements
    )
    verdict = score_run(seen(), replace(base, judgements=drifted), MARGIN)
    assert not verdict.ok
    assert verdict.agreement == 1.0
    assert any("differences exceed tau" in problem for problem in verdict.problems)
    assert any("KL" in problem for problem in verdict.problems)


def test_kl_is_what_the_formula_says() -> None:
    base = expected()
    bent = tuple(replace(one, logprobs=(math.log(0.4), math.log(0.3))) for one in base.judgements)
    verdict = score_run(seen(), replace(base, judgements=bent), MARGIN)
    wanted = 0.5 * math.log(0.5 / 0.4) + 0.2 * math.log(0.2 / 0.3)
    assert verdict.mean_kl == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("index", "boundary", "worker", "kind"),
    [
        (0, 0, "left", "compute"),
        (0, 1, "middle", "compute"),
        (2, 0, "left", "state"),
        (3, 1, "middle", "state"),
    ],
)
def test_the_first_boundary_that_differs_names_the_stage(
    index: int, boundary: int, worker: str, kind: str
) -> None:
    digests = [(100 + index,), (200 + index,)]
    digests[boundary] = (1, 2, 3)
    digests = [one if at <= boundary else (4,) for at, one in enumerate(digests)]
    verdict = score_run(seen(), with_judgement(index, digests=tuple(digests)), EXACT)
    assert not verdict.ok
    culprit = verdict.culprit
    assert culprit is not None
    assert (culprit.worker, culprit.stage, culprit.kind) == (worker, boundary, kind)
    assert culprit.position == index
    assert culprit.boundary.startswith(f"{worker}→")


def test_any_cut_of_the_prompt_is_allowed_at_the_first_token() -> None:
    assert score_run(seen(), with_judgement(0, digests=((9, 100), (200, 8))), EXACT).ok


def test_a_boundary_that_was_not_recorded_accuses_nobody() -> None:
    assert score_run(seen(), with_judgement(2, digests=((), ())), EXACT).ok
    assert score_run(seen(), with_judgement(2, digests=()), EXACT).ok


def test_the_first_row_on_another_route_is_not_held_against_a_single_step() -> None:
    replayed = with_token(2, epoch=2)
    later = with_token(3, epoch=2).tokens[3]
    replayed = replace(replayed, tokens=(*replayed.tokens[:3], later))
    assert score_run(replayed, with_judgement(2, digests=((1,), (2,))), EXACT).ok
    assert not score_run(replayed, with_judgement(3, digests=((1,), (2,))), EXACT).ok


def test_a_cache_of_the_wrong_length_names_its_stage() -> None:
    marks = list(_marks(1))
    marks[1] = replace(marks[1], cache_length=3)
    verdict = score_run(with_token(1, marks=tuple(marks)), expected(), MARGIN)
    assert not verdict.ok
    assert not verdict.cache_lengths_agree
    assert verdict.culprit is not None
    assert (verdict.culprit.worker, verdict.culprit.kind) == ("middle", "cache_length")


def test_a_stage_that_consumed_other_tokens_is_named() -> None:
    marks = list(_marks(2))
    marks[0] = replace(marks[0], history_digest=1)
    verdict = score_run(with_token(2, marks=tuple(marks)), expected(), EXACT)
    assert verdict.culprit is not None
    assert (verdict.culprit.worker, verdict.culprit.kind) == ("left", "history")


def test_a_failed_answer_scores_nothing_and_names_the_worker_it_names() -> None:
    failure = Failure("STAGE_UNREACHABLE", "gone", "middle")
    broken = replace(seen(), tokens=seen().tokens[:2], failure=failure)
    verdict = score_run(broken, expected(), EXACT)
    assert (verdict.ok, verdict.score) == (False, 0.0)
    assert verdict.culprit is not None
    assert (verdict.culprit.kind, verdict.culprit.stage) == ("error", 1)
    nobody = score_run(replace(broken, failure=Failure("X", "y")), expected(), EXACT).culprit
    assert nobody is not None
    assert nobody.stage == -1


@pytest.mark.parametrize(
    ("change", "kind", "component"),
    [
        ({"text": "other"}, "delivery", "detokenizer"),
        ({"wanted": 5}, "delivery", "coordinator"),
    ],
)
def test_what_is_lost_between_tokens_and_client_is_blamed_on_delivery(
    change: dict[str, object], kind: str, component: str
) -> None:
    verdict = score_run(replace(seen(), **change), expected(), EXACT)  # type: ignore[arg-type]
    assert (verdict.ok, verdict.score) == (False, 0.0)
    assert verdict.culprit is not None
    assert (verdict.culprit.kind, verdict.culprit.worker) == (kind, component)


def test_another_cut_of_the_prompt_is_blamed_on_the_tokenizer() -> None:
    verdict = score_run(seen(), replace(expected(), prompt=(5, 6, 8)), EXACT)
    assert not verdict.ok
    assert verdict.culprit is not None
    assert verdict.culprit.kind == "tokenizer"


def test_an_answer_of_the_full_worker_has_no_boundaries_to_hold() -> None:
    tokens = tuple(replace(_token(i), marks=_marks(i, (0,))) for i in range(len(TOKENS)))
    rerouted = replace(seen(), tokens=tokens)
    assert score_run(rerouted, expected(), EXACT).ok
    verdict = score_run(rerouted, with_judgement(1, token_id=77), EXACT)
    assert verdict.culprit is not None
    assert verdict.culprit.worker == "full-worker"


def test_without_digests_a_difference_behind_the_boundaries_is_nobodys() -> None:
    verdict = score_run(seen(), with_judgement(1, token_id=77, gap=5.0, rank=9), MARGIN)
    assert verdict.culprit is not None
    assert (verdict.culprit.kind, verdict.culprit.certain) == ("unknown", False)


def test_nothing_delivered_is_not_a_pass() -> None:
    verdict = score_run(replace(seen(), tokens=()), expected(), MARGIN)
    assert (verdict.ok, verdict.score) == (False, 0.0)


def test_the_overall_score_weighs_runs_by_tokens() -> None:
    well = score_run(seen(), expected(), EXACT)
    assert overall_score([]) == 0.0
    assert overall_score([well, replace(well, score=0.0, tokens=12)]) == pytest.approx(0.25)


def test_tau_is_twice_the_quantile_of_clean_differences() -> None:
    assert calibrated_tau([]) == 0.0
    assert calibrated_tau([0.5, 0.25]) == 1.0
    many = [0.001] * 99_999 + [9.0]
    assert calibrated_tau(many) == pytest.approx(0.002)
