"""Drawing tokens: filters agree with mlx-lm's, noise is a pure function of seed and position."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import sample_utils

from stage_worker import sampling
from stagemesh.sampling import SamplingSpec

VOCABULARY = 3000


def random_logits(seed: int, size: int = VOCABULARY, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def kept_by_mlx_lm(logits: np.ndarray, spec: SamplingSpec) -> set[int]:
    """The tokens that survive mlx-lm's own filters, in its order."""
    values = mx.array(logits)[None]
    values = values - mx.logsumexp(values, keepdims=True)
    if spec.top_p < 1.0:
        values = sample_utils.apply_top_p(values, spec.top_p)
    if spec.min_p > 0.0:
        values = sample_utils.apply_min_p(values, spec.min_p)
    if spec.top_k > 0:
        values = sample_utils.apply_top_k(values, spec.top_k)
    return set(np.flatnonzero(np.isfinite(np.array(values[0]))).tolist())


FILTERS = [
    SamplingSpec(temperature=1.0, top_p=0.9),
    SamplingSpec(temperature=1.0, top_p=0.999),
    SamplingSpec(temperature=1.0, top_p=0.05),
    SamplingSpec(temperature=1.0, min_p=0.05),
    SamplingSpec(temperature=1.0, top_k=1),
    SamplingSpec(temperature=1.0, top_k=40),
    SamplingSpec(temperature=1.0, top_p=0.8, min_p=0.02, top_k=25),
]


@pytest.mark.parametrize("spec", FILTERS, ids=str)
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_filters_keep_what_mlx_lm_keeps(spec: SamplingSpec, scale: float) -> None:
    for seed in range(20):
        logits = random_logits(seed, scale=scale)
        ours = set(np.flatnonzero(logits >= sampling.cut(logits, spec)).tolist())
        theirs = kept_by_mlx_lm(logits, spec)
        # float32 running sums may put one token on the other side of the nucleus' edge
        assert len(ours ^ theirs) <= (1 if spec.top_p < 1.0 else 0)


def test_no_filter_keeps_everything() -> None:
    assert sampling.cut(random_logits(1), SamplingSpec(temperature=1.0)) == -math.inf
    spec = SamplingSpec(temperature=1.0, top_k=VOCABULARY)
    assert sampling.cut(random_logits(1), spec) == -math.inf


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_bias_and_repetition_penalty_are_mlx_lms(penalty: float) -> None:
    history = [5, 9, 9, 700, 12, 5, 2999]
    bias = {9: 2.5, 100: -4.0}
    spec = SamplingSpec(
        repetition_penalty=penalty, repetition_context=4, logit_bias=tuple(bias.items())
    )
    logits = random_logits(2)
    processors = sample_utils.make_logits_processors(bias, penalty, 4)
    values = mx.array(logits)[None]
    for process in processors:
        values = process(mx.array(history), values)
    assert np.array_equal(sampling.adjust(logits, spec, history, 3), np.array(values[0]))
    assert np.array_equal(logits, random_logits(2))


def test_frequency_and_presence_look_at_generated_tokens_only() -> None:
    spec = SamplingSpec(frequency_penalty=0.5, presence_penalty=0.25)
    logits = random_logits(3)
    adjusted = sampling.adjust(logits, spec, [1, 2, 2, 7, 8, 8], 3)
    difference = logits - adjusted
    assert difference[8] == pytest.approx(1.25, abs=1e-5)
    assert difference[7] == pytest.approx(0.75, abs=1e-5)
    assert np.count_nonzero(difference) == 2


def test_a_repetition_context_of_zero_is_no_penalty() -> None:
    spec = SamplingSpec(repetition_penalty=2.0, repetition_context=0)
    assert np.array_equal(sampling.adjust(random_logits(4), spec, [1, 2], 0), random_logits(4))


def test_greedy_is_the_argmax_and_its_margin_the_top_two() -> None:
    rows = np.stack([random_logits(seed) for seed in range(6)])
    rows[0, 0] = 99.0
    rows[1, -1] = 99.0
    for line, drawn in zip(rows, sampling.greedy(rows), strict=True):
        ordered = np.sort(line)
        assert drawn.token_id == int(line.argmax())
        assert drawn.margin == pytest.approx(float(ordered[-1]) - float(ordered[-2]))
        single = sampling.draw(line, SamplingSpec(), 4, [], 0)
        assert (single.token_id, single.margin) == (drawn.token_id, drawn.margin)


def test_greedy_on_the_device_is_greedy() -> None:
    rows = np.stack([random_logits(seed) for seed in range(4)])
    here = sampling.greedy(rows)
    there = sampling.greedy_on_device(mx.array(rows))
    assert [draw.token_id for draw in here] == [draw.token_id for draw in there]
    assert [draw.margin for draw in here] == pytest.approx([d.margin for d in there], abs=1e-5)
    rows[2, 5] = math.nan
    assert [draw.finite for draw in sampling.greedy_on_device(mx.array(rows))][2] is False


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_non_finite_logits_are_reported_not_drawn(bad: float, temperature: float) -> None:
    logits = random_logits(5)
    logits[17] = bad
    spec = SamplingSpec(temperature=temperature, logprobs=2)
    assert sampling.draw(logits, spec, 1, [], 0).finite is False
    assert sampling.judge(logits, spec, 1, [], 0, 3) is None
    assert sampling.greedy(logits[None])[0].finite is False


def test_noise_depends_on_seed_and_position_and_nothing_else() -> None:
    noise = sampling.gumbel_noise(12345, 678, 1000)
    assert np.array_equal(noise, sampling.gumbel_noise(12345, 678, 1000))
    assert np.array_equal(noise[:200], sampling.gumbel_noise(12345, 678, 200))
    for seed, position in ((12346, 678), (12345, 679), (12345 + 2**32, 678), (678, 12345)):
        assert not np.isclose(noise, sampling.gumbel_noise(seed, position, 1000)).any()
    assert np.isfinite(sampling.gumbel_noise(2**64 - 1, 2**32 - 1, 1000)).all()


def test_noise_is_known_for_one_seed_and_position() -> None:
    """Frozen: a change here means that a replay on a newer worker draws other tokens."""
    noise = sampling.gumbel_noise(7, 3, 4)
    assert noise == pytest.approx(FROZEN_NOISE, abs=1e-12)


FROZEN_NOISE = [0.4369042196697707, 0.31533506069973044, -0.20243845975026664, 1.1307946839467036]


def test_drawing_follows_the_tempered_distribution() -> None:
    """Chi-square over 20,000 positions; 99.9 % quantile for 7 degrees of freedom is 24.3."""
    logits = np.array([1.0, 0.2, -0.5, 2.0, 0.0, 1.4, -1.0, 0.7], np.float32)
    for temperature in (0.7, 1.5):
        weights = np.exp(logits.astype(np.float64) / temperature)
        expected = weights / weights.sum() * 20_000
        spec = SamplingSpec(temperature=temperature, seed=99)
        counts = Counter(
            sampling.draw(logits, spec, position, [], 0).token_id for position in range(20_000)
        )
        found = np.array([counts[token] for token in range(8)])
        assert float(((found - expected) ** 2 / expected).sum()) < 24.3


def test_consecutive_positions_and_seeds_draw_independently() -> None:
    """Pairs of draws over a uniform vocabulary of 8: chi-square, 49 degrees, 99.9 % is 85.4."""
    logits = np.zeros(8, np.float32)
    spec = SamplingSpec(temperature=1.0)
    for pairs in (
        [((5, p), (5, p + 1)) for p in range(10_000)],
        [((s, 40), (s + 1, 40)) for s in range(10_000)],
    ):
        table = np.zeros((8, 8))
        for (seed, position), (next_seed, next_position) in pairs:
            one = sampling.draw(logits, replace(spec, seed=seed), position, [], 0)
            two = sampling.draw(logits, replace(spec, seed=next_seed), next_position, [], 0)
            table[one.token_id, two.token_id] += 1
        expected = len(pairs) / 64
        assert float(((table - expected) ** 2 / expected).sum()) < 85.4


@pytest.mark.parametrize("spec", FILTERS, ids=str)
def test_a_draw_never_leaves_the_filters(spec: SamplingSpec) -> None:
    logits = random_logits(6)
    allowed = set(np.flatnonzero(logits >= sampling.cut(logits, spec)).tolist())
    drawn = {sampling.draw(logits, spec, position, [], 0).token_id for position in range(60)}
    assert drawn <= allowed


def test_one_candidate_has_the_largest_margin() -> None:
    spec = SamplingSpec(temperature=1.0, top_k=1)
    drawn = sampling.draw(random_logits(7), spec, 5, [], 0)
    assert drawn.token_id == int(random_logits(7).argmax())
    assert drawn.margin == sampling.DISTANCE_MAX


def test_logprobs_are_of_the_distribution_before_temperature_and_filters() -> None:
    logits = random_logits(8)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    spec = SamplingSpec(temperature=1.7, top_k=5, logprobs=4)
    ranks = set()
    for seed in range(20):
        drawn = sampling.draw(logits, replace(spec, seed=seed), 11, [], 0)
        assert drawn.logprob == pytest.approx(exact[drawn.token_id], abs=1e-5)
        order = np.argsort(-logits).tolist()
        ranks.add(order.index(drawn.token_id))
        best = [token for token in order if token != drawn.token_id][:3]
        assert [token for token, _ in drawn.alternatives] == best
        assert [value for _, value in drawn.alternatives] == pytest.approx(exact[best], abs=1e-5)
    assert {0, 4} <= ranks, "the chosen token was among the likeliest, and was not"
    assert sampling.draw(logits, replace(spec, logprobs=1), 11, [], 0).alternatives == ()


def test_there_are_no_more_alternatives_than_other_tokens() -> None:
    drawn = sampling.draw(random_logits(8)[:3], SamplingSpec(logprobs=20), 0, [], 0)
    assert len(drawn.alternatives) == 2


JUDGED = [SamplingSpec(), SamplingSpec(temperature=0.8, seed=6), *FILTERS]


@pytest.mark.parametrize("spec", JUDGED, ids=str)
def test_judging_chooses_what_drawing_chooses(spec: SamplingSpec) -> None:
    for position in range(30):
        logits = random_logits(position)
        drawn = sampling.draw(logits, spec, position, [4, 5], 1)
        verdict = sampling.judge(logits, spec, position, [4, 5], 1, drawn.token_id)
        assert verdict is not None
        assert (verdict.reference_token_id, verdict.gap) == (drawn.token_id, 0.0)
        assert verdict.margin == drawn.margin


@pytest.mark.parametrize("spec", JUDGED, ids=str)
def test_every_other_token_has_a_finite_positive_gap(spec: SamplingSpec) -> None:
    logits = random_logits(30)
    chosen = sampling.draw(logits, spec, 8, [], 0).token_id
    for token in range(0, VOCABULARY, 100):
        verdict = sampling.judge(logits, spec, 8, [], 0, token)
        assert verdict is not None
        assert math.isfinite(verdict.gap)
        assert (verdict.gap > 0.0) == (token != chosen)


def test_a_token_just_outside_a_filter_has_a_small_gap() -> None:
    """Two machines may disagree about the last bit at the edge of a filter; that is not
    corruption."""
    logits = np.array([2.0, 1.0, 1.0 - 1e-5, -3.0], np.float32)
    spec = SamplingSpec(temperature=1.0, top_k=2)
    for position in range(200):
        wide = sampling.draw(logits, replace(spec, top_k=3), position, [], 0)
        if wide.token_id == 2:
            verdict = sampling.judge(logits, spec, position, [], 0, 2)
            assert verdict is not None
            assert verdict.gap < 1e-4
            return
    pytest.fail("no position drew the third token")


def test_plain_greedy_is_recognised() -> None:
    assert sampling.is_plain_greedy(SamplingSpec())
    for other in (
        SamplingSpec(temperature=0.1),
        SamplingSpec(logprobs=1),
        SamplingSpec(logit_bias=((1, 1.0),)),
        SamplingSpec(presence_penalty=0.1),
    ):
        assert not sampling.is_plain_greedy(other)
