"""Drawing tokens: a pure function of (seed, position, logits, specification, history).

Greedy is the largest logit. Otherwise the Gumbel-max trick: the token that maximises ``logit /
temperature + gumbel``, over the tokens that pass the filters, is distributed as softmax says. The
noise of token i at position p is element i of a Philox stream whose 128-bit key is exactly (seed,
p): no generator state, no dependence on the batch, on how the prompt was chunked, or on what was
drawn before. So a replay draws what an undisturbed run would have drawn.

Order and meaning as in mlx_lm.sample_utils: bias, repetition, presence, frequency; then top_p,
min_p, top_k on the logits as they are; temperature last. Each filter keeps the tokens whose logit
is at least some *cut*, so together they are one number, the largest cut; ties at the cut stay.

All of it runs on the host in numpy: on a CPU an argmax over 49,152 logits takes 9 µs there and 200
µs in mlx, a sort 0.3 ms and 4.7 ms. Scores are float64, so that the result does not hang on the
rounding of a particular machine's float32 logarithm. Plain greedy rows on a GPU are reduced there
instead (`greedy_on_device`), and only the answers cross.

The *gap* of a token, for scoring, is how far its own score is from the best. A token outside the
filters gets the distance to the cut on top; so the gap stays small and finite when two machines
disagree about the last bit at the edge of a filter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from stagemesh.sampling import SamplingSpec

Floats = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]

_CANDIDATES = 1024
"""Largest logits sorted first for top_p; the whole vocabulary is sorted only if they hold too
little mass."""
_UNIFORM_STEP = 2.0**-32
DISTANCE_MAX = 1e9
"""Margins and gaps are capped here: finite everywhere, also when only one token passed the
filters."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One drawn token. ``margin``: best minus second-best score of what was maximised
    (`DISTANCE_MAX` when only one token passed the filters). ``finite``: the logits held no NaN and
    no +infinity."""

    token_id: int
    margin: float
    finite: bool = True
    logprob: float = 0.0
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a given token compares with the one that would have been drawn."""

    reference_token_id: int
    gap: float
    margin: float


def is_plain_greedy(spec: SamplingSpec) -> bool:
    """Nothing but the largest logit is wanted: rows like this are drawn together."""
    return spec.temperature == 0.0 and spec.logprobs == 0 and not adjusts(spec)


def adjusts(spec: SamplingSpec) -> bool:
    """Bias or a penalty changes the logits."""
    return bool(
        spec.logit_bias
        or spec.repetition_penalty != 1.0
        or spec.frequency_penalty != 0.0
        or spec.presence_penalty != 0.0
    )


def greedy(logits: Floats) -> list[Draw]:
    """Largest logit of each row of ``logits`` [rows, vocabulary]."""
    if len(logits) == 1:  # of a decode step: a row by itself is looked through in half the time
        row = logits[0]
        return [_top_two(row, int(row.argmax()))]
    best = logits.argmax(axis=1)
    return [_top_two(row, int(index)) for row, index in zip(logits, best, strict=True)]


def greedy_on_device(logits: mx.array) -> list[Draw]:
    """`greedy` for logits [rows, vocabulary] that live on a GPU: three numbers a row cross to the
    host."""
    best = mx.argmax(logits, axis=-1, keepdims=True)
    top = mx.max(logits, axis=-1, keepdims=True)
    others = mx.where(mx.arange(logits.shape[-1])[None] == best, -mx.inf, logits)
    margin = (top - mx.max(others, axis=-1, keepdims=True)).astype(mx.float32)
    top = top.astype(mx.float32)
    mx.eval(best, top, margin)
    columns = (np.asarray(memoryview(column)).reshape(-1) for column in (best, top, margin))  # type: ignore[arg-type]
    return [
        Draw(int(token_id), min(float(gap), DISTANCE_MAX), math.isfinite(value))
        for token_id, value, gap in zip(*columns, strict=True)
    ]


def draw(
    logits: Floats, spec: SamplingSpec, position: int, history: Sequence[int], prompt_length: int
) -> Draw:
    """The token at absolute ``position`` after ``history`` (all tokens before it, prompt included).

    ``logits`` float32 [vocabulary]; not modified. ``history[prompt_length:]`` counts as generated.
    """
    adjusted = adjust(logits, spec, history, prompt_length)
    if spec.temperature == 0.0:
        drawn = _top_two(adjusted, int(adjusted.argmax()))
    elif not math.isfinite(adjusted.max()):
        drawn = Draw(int(adjusted.argmax()), 0.0, finite=False)
    else:
        scores = perturbed(adjusted, spec, position)
        drawn = _top_two(scores, int(scores.argmax()))
    if spec.logprobs == 0 or not drawn.finite:
        return drawn
    logprobs = adjusted - _log_sum_exp(adjusted)
    others = [token for token in _largest(logprobs, spec.logprobs) if token != drawn.token_id]
    wanted = others[: spec.logprobs - 1]
    return Draw(
        drawn.token_id,
        drawn.margin,
        True,
        max(float(logprobs[drawn.token_id]), -1e9),
        tuple((int(token), max(float(logprobs[token]), -1e9)) for token in wanted),
    )


def judge(
    logits: Floats,
    spec: SamplingSpec,
    position: int,
    history: Sequence[int],
    prompt_length: int,
    token_id: int,
) -> Verdict | None:
    """What `draw` would have chosen, and how far ``token_id`` is from it; None for non-finite
    logits."""
    adjusted = adjust(logits, spec, history, prompt_length)
    if not math.isfinite(adjusted.max()):
        return None
    if spec.temperature == 0.0:
        drawn = _top_two(adjusted, int(adjusted.argmax()))
        gap = float(adjusted[drawn.token_id]) - float(adjusted[token_id])
        return Verdict(drawn.token_id, min(gap, DISTANCE_MAX), drawn.margin)
    edge = cut(adjusted, spec)
    scores = _noisy(adjusted, spec, position)
    kept = np.where(adjusted >= edge, scores, -np.inf)
    drawn = _top_two(kept, int(kept.argmax()))
    gap = max(float(kept[drawn.token_id] - scores[token_id]), 0.0)
    gap += max(edge - float(adjusted[token_id]), 0.0)
    return Verdict(drawn.token_id, min(gap, DISTANCE_MAX), drawn.margin)


def adjust(
    logits: Floats, spec: SamplingSpec, history: Sequence[int], prompt_length: int
) -> Floats:
    """Logits after bias and penalties; the same array when there are none.

    The repetition penalty looks at the last ``repetition_context`` tokens of prompt and answer (0:
    none); the frequency and presence penalties at all generated tokens.
    """
    if not adjusts(spec):
        return logits
    adjusted = logits.copy()
    for token_id, bias in spec.logit_bias:
        adjusted[token_id] += np.float32(bias)
    if spec.repetition_penalty != 1.0 and spec.repetition_context:
        recent = np.unique(np.asarray(history[-spec.repetition_context :], np.int64))
        chosen = adjusted[recent]
        penalty = np.float32(spec.repetition_penalty)
        adjusted[recent] = np.where(chosen < 0, chosen * penalty, chosen / penalty)
    if spec.frequency_penalty != 0.0 or spec.presence_penalty != 0.0:
        generated = np.asarray(history[prompt_length:], np.int64)
        tokens, counts = np.unique(generated, return_counts=True)
        penalties = spec.presence_penalty + spec.frequency_penalty * counts
        adjusted[tokens] -= penalties.astype(np.float32)
    return adjusted


def cut(logits: Floats, spec: SamplingSpec) -> float:
    """Smallest logit that passes top_p, min_p and top_k; -infinity when all are off."""
    edge = -math.inf
    if spec.top_p < 1.0:
        edge = max(edge, _nucleus_cut(logits, spec.top_p))
    if spec.min_p > 0.0:
        edge = max(edge, float(logits.max()) + math.log(spec.min_p))
    if 0 < spec.top_k < logits.size:
        edge = max(edge, float(np.partition(logits, logits.size - spec.top_k)[-spec.top_k]))
    return edge


def perturbed(logits: Floats, spec: SamplingSpec, position: int) -> Scores:
    """What sampling maximises: filtered, tempered logits plus noise; -infinity outside the
    filters."""
    edge = cut(logits, spec)
    if edge == -math.inf:
        return _noisy(logits, spec, position)
    kept = np.flatnonzero(logits >= edge)
    scores = np.full(logits.size, -np.inf)
    noise = _gumbel(_uniform(spec.seed, position, logits.size)[kept])
    scores[kept] = logits[kept].astype(np.float64) / spec.temperature + noise
    return scores


def gumbel_noise(seed: int, position: int, count: int) -> Scores:
    """Standard Gumbel noise for token ids 0 … count-1; depends on nothing but ``seed`` and
    ``position``."""
    return _gumbel(_uniform(seed, position, count))


def _noisy(logits: Floats, spec: SamplingSpec, position: int) -> Scores:
    noise = gumbel_noise(spec.seed, position, logits.size)
    return np.asarray(logits.astype(np.float64) / spec.temperature + noise, np.float64)


def _uniform(seed: int, position: int, count: int) -> Scores:
    """Numbers in the open interval (0, 1) on a grid of 2**-32."""
    stream = np.random.Philox(key=np.array([seed, position], np.uint64))
    words = stream.random_raw((count + 1) // 2).view(np.uint32)[:count]
    return np.asarray((words + 0.5) * _UNIFORM_STEP, np.float64)


def _gumbel(uniform: Scores) -> Scores:
    return np.asarray(-np.log(-np.log(uniform)), np.float64)


def _nucleus_cut(logits: Floats, top_p: float) -> float:
    """Logit of the last token of the smallest set of best tokens whose mass reaches ``top_p``."""
    weights = np.exp((logits - logits.max()).astype(np.float64))
    wanted = top_p * float(weights.sum())
    for count in (min(_CANDIDATES, logits.size), logits.size):
        best = np.sort(np.partition(logits, logits.size - count)[-count:])[::-1]
        mass = np.cumsum(np.exp((best - best[0]).astype(np.float64)))
        if mass[-1] >= wanted:
            return float(best[int(np.searchsorted(mass, wanted))])
    return float(best[-1])


def _top_two(scores: Floats | Scores, best: int) -> Draw:
    """The margin comes by ``argmax`` again: behind a forward, ``max`` would be code that has to
    come from memory, which takes longer than looking at every score."""
    top = scores.item(best)
    if not math.isfinite(top):
        return Draw(best, 0.0, finite=False)
    second = max(_largest_of(scores[:best]), _largest_of(scores[best + 1 :]))
    return Draw(best, min(top - second, DISTANCE_MAX))


def _largest_of(scores: Floats | Scores) -> float:
    """Of scores without NaN; of none it is -infinity."""
    return scores.item(scores.argmax()) if scores.size else -math.inf


def _log_sum_exp(logits: Floats) -> float:
    top = float(logits.max())
    return top + math.log(float(np.exp((logits - top).astype(np.float64)).sum()))


def _largest(values: Floats, count: int) -> npt.NDArray[np.int64]:
    """Indices of the ``count`` largest values, largest first."""
    count = min(count, values.size)
    best = np.argpartition(values, values.size - count)[-count:]
    return best[np.argsort(-values[best], kind="stable")].astype(np.int64)
