"""Exponentials on a CPU for which mlx computes them one at a time.

mlx's CPU backend adds and multiplies many numbers per instruction, but on x86-64 it calls the C
library once for every exponential: 9 ns each. Attention takes one per score and a gated MLP one per
hidden value, so they are most of what attention costs: of the 15 ms that one layer of SmolLM2 takes
to attend from 128 tokens to 1,088, the two matrix products need less than two. Here the same
functions are written with operations that are fast everywhere:

    2^t = 2^n (1 + ...),  n = round(t),  f = t - n in [-1/2, 1/2],  2^f by a polynomial of degree 6

with n added to the exponent's bits. (The usual reduction, e.g. Muller, *Elementary Functions*,
ch. 11; its coefficients were fitted for the relative error, which is 1e-7, as float32 has it.) The
maximum of a row is subtracted first, as softmax does everywhere, and the sum is divided out of the
product instead of the weights. What is not a number stays none.

Measured (x86-64, one thread, ms, mlx's own and this): attention from 16 tokens to 976 1.8 and 0.8,
from 128 to 128 1.8 and 0.7; a gated MLP of 1,536 and 128 rows 2.7 and 0.5; fifteen layers of
SmolLM2 over a chunk of 128 tokens behind 960 others 360 and 200.

A model calls these functions by the names its module imported. `install` gives the modules of one
model, and no other in the process, methods that find the fast ones under those names. Few numbers,
other dtypes, quantized caches and attention sinks are passed on to mlx-lm's own. Whether it pays is
measured once in each process (`pays`); nothing is done where bit-identical results are promised.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models import activations, base

from stage_worker import blas, probing, trials

log = logging.getLogger(__name__)

SCORES_MIN = 16_384
"""Fewer scores are not worth the number of operations they take here."""
GATES_MIN = 8_192
GAIN_MIN = 1.5
LOG2_E = math.log2(math.e)
EXPONENT_MIN = -126.0
"""Of the smallest float32 with full precision: what is below counts as that, 1e-38."""
MASKED = -1e30
_ROUNDING = 1.5 * 2.0**23
"""Added, it leaves the nearest integer in a float32's lowest bits."""
_MANTISSA_BITS = 23
_POLYNOMIAL = (
    1.0,
    0.6931472055771001,
    0.2402264846228119,
    0.055503290351536505,
    0.009618373251354787,
    0.0013399848290688021,
    0.0001537070481582017,
)
"""Of 2^f, lowest power first."""
_TRIAL_NUMBERS = 65_536


def exp2(t: mx.array) -> mx.array:
    """2 to the power of ``t`` (float32, at least EXPONENT_MIN and below 128), elementwise."""
    shifted = t + _ROUNDING
    fraction = t - (shifted - _ROUNDING)
    result = fraction * _POLYNOMIAL[-1] + _POLYNOMIAL[-2]
    for coefficient in reversed(_POLYNOMIAL[:-2]):
        result = result * fraction + coefficient
    bits = shifted.view(mx.int32) << _MANTISSA_BITS
    power: mx.array = (result.view(mx.int32) + bits).view(mx.float32)
    return power


class Exponentials:
    """The functions for one model. ``scores_min``, ``gates_min``: for fewer numbers mlx-lm's own
    are asked. Keeps the mask that all layers share while a step is built."""

    def __init__(self) -> None:
        self.scores_min = SCORES_MIN
        self.gates_min = GATES_MIN
        self._mask: mx.array | str | None = None
        self._shape = (0, 0)
        self._added: mx.array | None = None

    def forget(self) -> None:
        """The step is built."""
        self._mask = self._added = None

    def swiglu(self, gate: mx.array, x: mx.array) -> mx.array:
        """`mlx_lm.models.activations.swiglu`: silu(gate) * x, elementwise."""
        if gate.size < self.gates_min or gate.dtype != mx.float32 or x.dtype != mx.float32:
            theirs: mx.array = activations.swiglu(gate, x)
            return theirs
        power = exp2(mx.clip(gate * -LOG2_E, EXPONENT_MIN, -EXPONENT_MIN))
        return gate * x / (power + 1.0)

    def attend(
        self,
        queries: mx.array,
        keys: Any,
        values: Any,
        cache: Any,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """`mlx_lm.models.base.scaled_dot_product_attention`: ``queries`` [B, heads, L, size],
        ``keys`` and ``values`` [B, heads or a divisor of them, S, size]; ``mask`` bool (True: seen)
        or added, broadcast to [B, heads, L, S], or "causal"."""
        if sinks is not None or not self._suits(queries, keys, values, cache):
            theirs: mx.array = base.scaled_dot_product_attention(
                queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks
            )
            return theirs
        rows, heads, length, size = queries.shape
        groups, seen = keys.shape[1], keys.shape[2]
        # The queries of heads that share keys are one matrix: fewer and larger products.
        lines = heads // groups * length
        scaled = (queries * (scale * LOG2_E)).reshape(rows, groups, lines, size)
        scores = scaled @ keys.swapaxes(-1, -2)
        if mask is not None:
            apart = scores.reshape(rows, heads, length, seen) + self._added_for(mask, length, seen)
            scores = apart.reshape(rows, groups, lines, seen)
        scores = scores - mx.max(scores, axis=-1, keepdims=True)
        weights = exp2(mx.maximum(scores, EXPONENT_MIN))
        # A sum along rows is a product with ones, which is computed many numbers at a time.
        found = (weights @ values) / (weights @ mx.ones((seen, 1)))
        output: mx.array = found.reshape(rows, heads, length, values.shape[-1])
        return output

    def _suits(self, queries: mx.array, keys: Any, values: Any, cache: Any) -> bool:
        if hasattr(cache, "bits") or not isinstance(keys, mx.array):
            return False
        rows, heads, length, _ = queries.shape
        return (
            queries.dtype == keys.dtype == values.dtype == mx.float32
            and heads % keys.shape[1] == 0
            and rows * heads * length * keys.shape[2] >= self.scores_min
        )

    def _added_for(self, mask: mx.array | str, length: int, seen: int) -> mx.array:
        if self._added is None or self._shape != (length, seen) or self._mask is not mask:
            self._mask, self._shape = mask, (length, seen)
            self._added = _added(mask, length, seen)
        return self._added


def _added(mask: mx.array | str, length: int, seen: int) -> mx.array:
    """What a mask adds to scores that are powers of two."""
    if isinstance(mask, str):
        mask = mx.arange(seen - length, seen)[:, None] >= mx.arange(seen)
    if mask.dtype == mx.bool_:
        return mx.where(mask, 0.0, MASKED)
    return mx.maximum(mask.astype(mx.float32) * LOG2_E, MASKED)


# -- where a model finds them ---------------------------------------------------------------------


def install(modules: Iterable[Module], outputs: Callable[[], mx.array], fast: Exponentials) -> int:
    """Let the methods of ``modules`` find the fast functions; returns how many were changed.

    ``outputs`` runs the model on fixed input. If it raises or answers otherwise afterwards, with
    the fast functions for however few numbers, everything is put back and 0 returned.
    """
    before = outputs()
    mx.eval(before)
    changed = _install(modules, fast)
    usual = fast.scores_min, fast.gates_min
    fast.scores_min = fast.gates_min = 0
    problem = probing.changed(before, outputs) if changed else None
    fast.scores_min, fast.gates_min = usual
    if problem is None:
        return len(changed)
    log.warning("exponentials stay mlx's own: %s", problem)
    for module, kind in changed:
        module.__class__ = kind
    return 0


def _install(modules: Iterable[Module], fast: Exponentials) -> list[tuple[Module, type]]:
    found = {
        "scaled_dot_product_attention": (base.scaled_dot_product_attention, fast.attend),
        "swiglu": (activations.swiglu, fast.swiglu),
    }
    kinds: dict[type, type] = {}
    changed = []
    for module in modules:
        kind = type(module)
        if kind not in kinds:
            kinds[kind] = _with(kind, found)
        if kinds[kind] is not kind:
            module.__class__ = kinds[kind]
            changed.append((module, kind))
    return changed


def _with(kind: type, fast: Mapping[str, tuple[Any, Any]]) -> type:
    """A subclass whose methods see other functions under these names; ``kind`` if none would."""
    methods = {}
    for name, method in inspect.getmembers(kind, inspect.isfunction):
        found = {
            each: new
            for each, (old, new) in fast.items()
            if each in _names(method.__code__) and method.__globals__.get(each) is old
        }
        if found:
            methods[name] = _rebound(method, found)
    return type(kind.__name__, (kind,), methods) if methods else kind


def _names(code: types.CodeType) -> set[str]:
    """Global names a function uses, in functions inside it too."""
    inside = [_names(part) for part in code.co_consts if isinstance(part, types.CodeType)]
    return set(code.co_names).union(*inside)


def _rebound(method: types.FunctionType, found: dict[str, Any]) -> types.FunctionType:
    copied = types.FunctionType(
        method.__code__,
        method.__globals__ | found,
        method.__name__,
        method.__defaults__,
        method.__closure__,
    )
    copied.__kwdefaults__ = method.__kwdefaults__
    return copied


@functools.cache
def pays() -> bool:
    """Whether exponentials are faster this way, in this process and on this processor."""
    if mx.default_device().type != mx.DeviceType.cpu or blas.describe().deterministic:
        return False
    numbers = -mx.abs(mx.random.normal((_TRIAL_NUMBERS,), key=mx.random.key(5)))
    mx.eval(numbers)
    found = trials.costs(
        {"mlx": lambda: mx.eval(mx.exp(numbers)), "here": lambda: mx.eval(exp2(numbers))}
    )
    log.info("exponentials, as multiples: mlx %.2f, here %.2f", found["mlx"], found["here"])
    return found["mlx"] > GAIN_MIN * found["here"]
