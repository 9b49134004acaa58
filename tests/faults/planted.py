"""Named faults, planted into a hosted span: what a worker would compute with that bug.

Nothing a worker says of itself changes: its fingerprint, span and dtype are those of a worker that
is well, its cache lengths and digests count as before. Only the numbers are wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from stage_worker.hosting import SpanModel

Plant = Callable[[SpanModel], None]


def _layers(span: SpanModel) -> list[Any]:
    return list(span._model.layers)[span.span.first : span.span.last]


def _on_output(alter: Callable[[mx.array], mx.array]) -> Plant:
    """Alter what the span hands on."""

    def plant(span: SpanModel) -> None:
        forward = span.forward
        span.forward = lambda *args, **options: alter(forward(*args, **options))  # type: ignore[method-assign]

    return plant


def _on_cache(spoil: Callable[[Any], None]) -> Plant:
    """Spoil the first layer's cache behind each decode step of a request alone."""

    def plant(span: SpanModel) -> None:
        forward = span.forward

        def spoiled(tokens: mx.array, hidden: Any, cache: Any, **options: Any) -> mx.array:
            output = forward(tokens, hidden, cache, **options)
            first = cache[span.span.first]
            if tokens.shape[1] == 1 and isinstance(first.offset, int):
                mx.eval(output)
                spoil(first)
            return output

        span.forward = spoiled  # type: ignore[method-assign]

    return plant


def _wrong_layer_order(span: SpanModel) -> None:
    first, second = _layers(span)[:2]
    ours, theirs = first.parameters(), second.parameters()
    first.update(theirs)
    second.update(ours)


def _skipped_layer(span: SpanModel) -> None:
    # What a layer adds to the residual stream is nothing: as if it were not there.
    layer = _layers(span)[0]
    layer.self_attn.o_proj.weight = mx.zeros_like(layer.self_attn.o_proj.weight)
    layer.mlp.down_proj.weight = mx.zeros_like(layer.mlp.down_proj.weight)


def _duplicated_layer(span: SpanModel) -> None:
    first, second = _layers(span)[:2]
    second.update(first.parameters())


def _other_weights(span: SpanModel) -> None:
    module = _layers(span)[0].mlp.up_proj
    noise = mx.random.normal(module.weight.shape, key=mx.random.key(99))
    module.weight = 0.125 * noise.astype(module.weight.dtype)


class _LateRope:
    """A rope that places single tokens one position too far."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __call__(self, x: mx.array, offset: Any = 0) -> mx.array:
        return self._inner(x, offset=offset + 1 if x.shape[-2] == 1 else offset)


def _position_off_by_one(span: SpanModel) -> None:
    attention = _layers(span)[0].self_attn
    rope = attention.rope
    del attention.rope
    object.__setattr__(attention, "rope", _LateRope(rope))


def _wrong_rope_base(span: SpanModel) -> None:
    _layers(span)[0].self_attn.rope.base = 500.0


def _swap_halves(output: mx.array) -> mx.array:
    middle = output.shape[-1] // 2
    return mx.concatenate([output[..., middle:], output[..., :middle]], axis=-1)


def _repeat_last_entry(cache: Any) -> None:
    last = cache.offset - 1
    cache.keys[..., last, :] = cache.keys[..., last - 1, :]
    cache.values[..., last, :] = cache.values[..., last - 1, :]


def _lose_entries(cache: Any) -> None:
    cache.keys = mx.zeros_like(cache.keys)
    cache.values = mx.zeros_like(cache.values)


def _scaled_embedding(span: SpanModel) -> None:
    table = span._model.model.embed_tokens
    table.weight = table.weight * 1.05


def _other_final_norm(span: SpanModel) -> None:
    norm = span._model.model.norm
    norm.weight = norm.weight * 1.05


def _rolled_head(span: SpanModel) -> None:
    head = span._model.lm_head
    head.weight = mx.roll(head.weight, 1, axis=0)


MIDDLE: dict[str, Plant] = {
    "wrong layer order": _wrong_layer_order,
    "skipped layer": _skipped_layer,
    "duplicated layer": _duplicated_layer,
    "stale cache": _on_cache(_repeat_last_entry),
    "position off by one": _position_off_by_one,
    "bf16 where f32 was agreed": _on_output(lambda x: x.astype(mx.bfloat16).astype(mx.float32)),
    "other weights in one layer": _other_weights,
    "scaled activations": _on_output(lambda x: x * 1.02),
    "swapped hidden halves": _on_output(_swap_halves),
    "wrong rope base": _wrong_rope_base,
    "lost KV of one layer": _on_cache(_lose_entries),
}
"""Faults of a stage in the middle of a llama."""
FIRST: dict[str, Plant] = {"wrong embedding scale": _scaled_embedding}
"""Faults of the first stage."""
LAST: dict[str, Plant] = {
    "wrong final norm": _other_final_norm,
    "rolled head": _rolled_head,
}
"""Faults of the last stage."""
KEPT = {"stale cache", "position off by one", "lost KV of one layer"}
"""Faults that need a cache in use to show."""


def plant(name: str, span: SpanModel) -> None:
    """Plant the fault ``name`` into ``span``."""
    {**MIDDLE, **FIRST, **LAST}[name](span)


def bend(activation: mx.array) -> mx.array:
    """A hop that changes what it carries by a millionth."""
    return activation * (1 + 1e-6)
