"""The load-time probe: does this span compute what a span must?

Fixed tokens and a fixed activation run through the span: once whole, once more, in two chunks and a
decode step. The output must have the promised shape and dtype, be finite, come out bit for bit the
same twice, and agree between one shot and chunks within the dtype's tolerance, which fails when a
mask or a position is made from the wrong cache. While the probe runs, everything ahead of a later
stage's first layer is NaN (see `boundary`), so a model that sends anything beside the activation
over the cut shows it here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from stage_worker.tensors import to_bytes

if TYPE_CHECKING:
    from stage_worker.hosting import SpanModel

PREFILL_TOKENS = 5
CHUNK_TOKENS = 2
PROBE_TOKENS = PREFILL_TOKENS + CHUNK_TOKENS + 1
"""Prefill 5, prefill 2, decode 1: both mask shapes and a step without a mask."""

_TOLERANCE = {mx.float32: 1e-3, mx.float16: 3e-2, mx.bfloat16: 1e-1}
"""Largest relative difference (root mean square) between one shot and chunks."""
REARRANGED_MAX = 1e-3
"""… and that another order of summation, or another way to the same function, may make."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """``shape`` and ``dtype`` of the output; ``difference`` is relative; ``digest`` is hex SHA-256
    of the one-shot output's bytes; ``problem`` says what is wrong, or is None."""

    shape: tuple[int, ...]
    dtype: str
    finite: bool
    repeatable: bool
    difference: float
    digest: str
    problem: str | None


def probe(hosted: SpanModel) -> ProbeResult:
    """Run the probe. Never raises for what the model does; ``problem`` carries it."""
    tokens = _probe_tokens(hosted.vocab_size)
    hidden = None if hosted.is_first else _probe_activation(hosted)
    try:
        whole = _steps(hosted, tokens, hidden, (PROBE_TOKENS,))
        again = _steps(hosted, tokens, hidden, (PROBE_TOKENS,))
        chunked = _steps(hosted, tokens, hidden, (PREFILL_TOKENS, CHUNK_TOKENS, 1))
    except Exception as error:  # noqa: BLE001 - whatever the model raised is the finding
        failure = f"the forward fails: {type(error).__name__}: {error}"
        return ProbeResult((), "", False, False, float("inf"), "", failure)
    finite = _is_finite(hosted, whole)
    repeatable = to_bytes(whole) == to_bytes(again)
    difference = relative(whole, chunked)
    problem = _problem(hosted, whole, chunked, finite, repeatable, difference)
    digest = hashlib.sha256(to_bytes(whole)).hexdigest()
    return ProbeResult(
        tuple(whole.shape), str(whole.dtype), finite, repeatable, difference, digest, problem
    )


def _problem(
    hosted: SpanModel,
    whole: mx.array,
    chunked: mx.array,
    finite: bool,
    repeatable: bool,
    difference: float,
) -> str | None:
    width = hosted.vocab_size if hosted.is_last else hosted.hidden_size
    if whole.shape != (1, PROBE_TOKENS, width) or chunked.shape != whole.shape:
        return f"shape {tuple(whole.shape)} instead of {(1, PROBE_TOKENS, width)}"
    if not hosted.is_last and whole.dtype != hosted.dtype:
        return f"dtype {whole.dtype} instead of {hosted.dtype}"
    if not finite:
        return "the output is not finite: the model may send more than the activation over the cut"
    if not repeatable:
        return "the same input gave two different outputs"
    if not hosted.is_full and not difference <= _TOLERANCE.get(whole.dtype, 1e-3):
        return f"one shot and chunks differ by {difference:.2g}"
    return None


def _is_finite(hosted: SpanModel, output: mx.array) -> bool:
    """Activations must be finite; logits may be minus infinity for tokens a model never gives."""
    if hosted.is_last:
        return not bool(mx.any(mx.isnan(output) | (output == float("inf"))).item())
    return bool(mx.all(mx.isfinite(output)).item())


def _steps(
    hosted: SpanModel, tokens: mx.array, hidden: mx.array | None, lengths: tuple[int, ...]
) -> mx.array:
    cache = hosted.make_cache()
    outputs, start = [], 0
    for length in lengths:
        piece = slice(start, start + length)
        entering = None if hidden is None else hidden[:, piece]
        outputs.append(hosted.forward(tokens[:, piece], entering, cache))
        mx.eval(outputs[-1])
        start += length
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=1)


def _probe_tokens(vocab_size: int) -> mx.array:
    return mx.array([[(7 * i + 3) % vocab_size for i in range(PROBE_TOKENS)]], mx.int32)


def _probe_activation(hosted: SpanModel) -> mx.array:
    shape = (1, PROBE_TOKENS, hosted.hidden_size)
    return (0.5 * mx.random.normal(shape, key=mx.random.key(20))).astype(hosted.dtype)


def chunked_output(hosted: SpanModel) -> mx.array:
    """What the span makes of the probe's input in two chunks and a decode step."""
    tokens = _probe_tokens(hosted.vocab_size)
    hidden = None if hosted.is_first else _probe_activation(hosted)
    return _steps(hosted, tokens, hidden, (PREFILL_TOKENS, CHUNK_TOKENS, 1))


def relative(reference: mx.array, other: mx.array) -> float:
    """Relative difference (root mean square) over the finite elements; infinite for other
    shapes."""
    if reference.shape != other.shape:
        return float("inf")
    left, right = (
        mx.where(mx.isfinite(array), array, 0).astype(mx.float32) for array in (reference, other)
    )
    scale = mx.sqrt(mx.mean(left * left))
    ratio: Any = (mx.sqrt(mx.mean((left - right) ** 2)) / mx.maximum(scale, 1e-9)).item()
    return float(ratio)


def changed(before: mx.array, outputs: Callable[[], mx.array]) -> str | None:
    """What is wrong with a model that was rearranged and has to answer as ``before``; None:
    nothing."""
    try:
        difference = relative(before, outputs())
    except Exception as error:  # noqa: BLE001 - whatever the model raised is the finding
        return f"the forward fails: {type(error).__name__}: {error}"
    return None if difference <= REARRANGED_MAX else f"outputs differ by {difference:.2g}"
