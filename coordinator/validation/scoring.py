"""From evidence to a verdict.

**Numbers.** *agreement*: share of answer indices at which the reference, in the same context, would
choose the delivered token. *common prefix*: tokens before the first divergence of the two free
runs. *|Δlogit|*: absolute difference of the log-probabilities of every token the mesh reported (the
delivered one and up to 19 alternatives per index): the logits up to their common normaliser. *KL*:
of the mesh's distribution from the reference's over those tokens and one bucket for all others, in
nats, averaged over indices.

**Exact mode** (tau 0): every token, every reported log-probability, every recorded boundary digest
and every cache length must be equal. **Margin mode**: an index whose token differs must be
*explained*: the delivered token's gap in the reference is within tau and its rank is at most 2;
such indices may be at most 1.3 % (and one); the share of differences over tau at most 1 ‰; mean
KL at most what the tolerance says. Text, length and cache lengths must agree in both. The text that
must agree is that of the reference's own tokens; behind an explained flip, its decoding of the
tokens delivered.

**Score**: share of answer indices that hold (in exact mode: everything checked there is equal; in
margin mode: the token agrees or is explained, and no difference there exceeds 16 tau); 0 for a run
that ended in an error, is too short or whose text or prompt differs. The overall score is the mean
over runs weighted by tokens. It is 1 in a run that is well; the converse need not hold in margin
mode, where rates count too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from coordinator.validation.culprit import digests_hold, find_culprit, marks_hold
from coordinator.validation.evidence import (
    Delivered,
    Divergence,
    Expectation,
    Judgement,
    Observation,
    RunScore,
    Tolerance,
)

RANK_MAX = 2
"""A token that the reference ranks third or lower is never explained by rounding."""
MISMATCH_SHARE_MAX = 0.013
"""Explained flips: the highest rate seen from changed batch shapes alone."""
OVER_TAU_SHARE_MAX = 1e-3
"""Ten times what the quantile that defines tau leaves beyond tau / 2."""
OUTLIER_TAUS = 16.0
"""A single difference beyond so many tau is no rounding."""
QUANTILE = 0.9999
"""The quantile of clean differences that tau is twice of."""


def score_run(
    seen: Observation,
    expected: Expectation,
    tolerance: Tolerance,
    *,
    temperature: float = 0.0,
    digests_decide: bool | None = None,
) -> RunScore:
    """The verdict on one run. ``digests_decide``: boundary digests count as evidence of where
    (default: in exact mode only)."""
    pairs = list(zip(seen.tokens, expected.judgements, strict=False))
    differences = [value for token, judged in pairs for value in _differences(token, judged)]
    divergence = _first_divergence(pairs, tolerance, temperature)
    mismatches = [judged for token, judged in pairs if token.token_id != judged.token_id]
    mean_kl = _mean([_kl(token, judged) for token, judged in pairs])
    prefix = _common_prefix(seen.token_ids, expected.token_ids)
    explained = not tolerance.exact and divergence is not None and divergence.explained
    text_agrees = seen.text == (expected.delivered_text if explained else expected.text)
    lengths_agree = all(marks_hold(seen, index) for index in range(len(seen.tokens)))
    holding = [_holds(seen, expected, index, tolerance, temperature) for index in range(len(pairs))]
    whole = _whole_run_problems(seen, expected, text_agrees)
    problems = [*whole, *_index_problems(holding), *(() if lengths_agree else ("cache lengths",))]
    if not tolerance.exact:
        problems += _rate_problems(tolerance, mismatches, pairs, differences, mean_kl)
    ok = not problems
    decide = tolerance.exact if digests_decide is None else digests_decide
    return RunScore(
        ok=ok,
        score=0.0 if whole else _mean([float(one) for one in holding]),
        tokens=len(seen.tokens),
        agreement=1.0 - len(mismatches) / max(1, len(pairs)) if pairs else 0.0,
        common_prefix=prefix,
        first_divergence=divergence,
        max_abs_dlogit=max(differences, default=0.0),
        mean_abs_dlogit=_mean(differences),
        mean_kl=mean_kl,
        text_agrees=text_agrees,
        cache_lengths_agree=lengths_agree,
        boundaries_compared=sum(len(judged.digests) for _, judged in pairs),
        problems=tuple(problems),
        culprit=None if ok else find_culprit(seen, expected, holding, digests_decide=decide),
        differences=tuple(differences),
    )


def overall_score(runs: Sequence[RunScore]) -> float:
    """Mean of the runs' scores weighted by their tokens (a run without tokens weighs as one)."""
    weights = [max(1, run.tokens) for run in runs]
    total = sum(weights)
    if not total:
        return 0.0
    return sum(run.score * weight for run, weight in zip(runs, weights, strict=True)) / total


def calibrated_tau(differences: Sequence[float]) -> float:
    """Twice the 99.99 % quantile of clean differences (the largest one when there are few)."""
    if not differences:
        return 0.0
    ordered = sorted(differences)
    return 2.0 * ordered[min(len(ordered) - 1, math.ceil(QUANTILE * len(ordered)) - 1)]


# -- parts ----------------------------------------------------------------------------------------


def _differences(token: Delivered, judged: Judgement) -> Iterator[float]:
    for (_, ours), theirs in zip(token.logprobs, judged.logprobs, strict=False):
        yield abs(ours - theirs)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _kl(token: Delivered, judged: Judgement) -> float:
    """KL divergence over the reported tokens and one bucket for the rest, nats."""
    ours: dict[int, float] = {}
    theirs: dict[int, float] = {}
    for (token_id, our), their in zip(token.logprobs, judged.logprobs, strict=False):
        ours[token_id], theirs[token_id] = our, their
    total = 0.0
    for token_id, our in ours.items():
        total += math.exp(our) * (our - theirs[token_id])
    rest_ours = 1.0 - math.fsum(math.exp(one) for one in ours.values())
    rest_theirs = 1.0 - math.fsum(math.exp(one) for one in theirs.values())
    floor = 1e-6  # below it the rest is the rounding of the sum
    if rest_ours > floor and rest_theirs > floor:
        total += rest_ours * math.log(rest_ours / rest_theirs)
    return max(0.0, total)


def _common_prefix(ours: Sequence[int], theirs: Sequence[int]) -> int:
    for index, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            return index
    return min(len(ours), len(theirs))


def _is_explained(judged: Judgement, tolerance: Tolerance, temperature: float) -> bool:
    if tolerance.exact:
        return False
    return judged.rank <= RANK_MAX and tolerance.covers_gap(judged.gap, temperature)


def _first_divergence(
    pairs: Sequence[tuple[Delivered, Judgement]], tolerance: Tolerance, temperature: float
) -> Divergence | None:
    for index, (token, judged) in enumerate(pairs):
        if token.token_id != judged.token_id:
            return Divergence(
                position=index,
                ours=token.token_id,
                reference=judged.token_id,
                logit_ours=judged.logits[0],
                logit_reference=judged.logits[1],
                margin=judged.margin,
                gap=judged.gap,
                rank=judged.rank,
                explained=_is_explained(judged, tolerance, temperature),
            )
    return None


def _holds(
    seen: Observation,
    expected: Expectation,
    index: int,
    tolerance: Tolerance,
    temperature: float,
) -> bool:
    """Whether the answer index passes every check that concerns it alone."""
    token, judged = seen.tokens[index], expected.judgements[index]
    same = token.token_id == judged.token_id
    largest = max(_differences(token, judged), default=0.0)
    if tolerance.exact:
        return same and largest == 0.0 and digests_hold(seen, expected, index)
    if not (same or _is_explained(judged, tolerance, temperature)):
        return False
    return largest <= OUTLIER_TAUS * tolerance.tau


def _whole_run_problems(seen: Observation, expected: Expectation, text_agrees: bool) -> list[str]:
    if seen.failure is not None:
        return [f"ended in {seen.failure.reason}: {seen.failure.message}"]
    found = []
    if seen.prompt != expected.prompt:
        found.append("the prompt was tokenized differently")
    if len(seen.tokens) != seen.wanted or len(expected.judgements) < len(seen.tokens):
        found.append(f"{len(seen.tokens)} tokens of {seen.wanted}")
    if not text_agrees:
        found.append("text")
    return found


def _index_problems(holding: Sequence[bool]) -> list[str]:
    failed = [index for index, holds in enumerate(holding) if not holds]
    return [f"{len(failed)} answer indices differ, first {failed[0]}"] if failed else []


def _rate_problems(
    tolerance: Tolerance,
    mismatches: Sequence[Judgement],
    pairs: Sequence[tuple[Delivered, Judgement]],
    differences: Sequence[float],
    mean_kl: float,
) -> list[str]:
    found = []
    if len(mismatches) > max(1.0, MISMATCH_SHARE_MAX * len(pairs)):
        found.append(f"{len(mismatches)} of {len(pairs)} tokens flipped")
    over = sum(difference > tolerance.tau for difference in differences)
    if over > OVER_TAU_SHARE_MAX * len(differences) and over > 1:
        found.append(f"{over} of {len(differences)} differences exceed tau {tolerance.tau:.3g}")
    if mean_kl > tolerance.mean_kl_max:
        found.append(f"mean KL {mean_kl:.3g}")
    return found
