"""The fault classes: what each does to a stream, and where.

A fault is transient (one step) where its cause is (a damaged message, a moved buffer), and lasts
from its step on where its cause does (a wrong weight, a wrong kernel). The step, the place within
it, and the values put there are drawn from the stream's own generator, so that a run can be
repeated.

    wire      bytes of a sealed frame between two stages
    sealed    the same, sealed again by whoever damaged it (the memory of the sender, its kernel)
    output    a stage's activation, before it is sealed
    cache     what a stage keeps of a request
    weights   the layers of a stage
    sampler   the last stage's specification
    answer    tokens behind the sampler
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from stage_worker.detect.rig import OpenStage
from stagemesh.sampling import SamplingSpec

Bytes = Callable[[bytes, random.Random, "Recorded"], bytes]
Output = Callable[[mx.array | None, mx.array, random.Random], mx.array]
Cache = Callable[[OpenStage, bytes, bytes, random.Random], None]
Weights = Callable[[list[Any], random.Random], None]
Sampler = Callable[[SamplingSpec, int], SamplingSpec]
Tokens = Callable[[list[int], int, int, random.Random], list[int]]


@dataclass(frozen=True, slots=True)
class Recorded:
    """Other activations of the same size: of this stream one step ago, and of another stream."""

    previous: bytes
    other: bytes


@dataclass(frozen=True, slots=True)
class Fault:
    """One class. Exactly one of the places is set. ``lasting``: from its step on."""

    name: str
    wire: Bytes | None = None
    sealed: Bytes | None = None
    output: Output | None = None
    cache: Cache | None = None
    weights: Weights | None = None
    sampler: Sampler | None = None
    answer: Tokens | None = None
    lasting: bool = False
    needs_companion: bool = False
    relabels: bool = False
    """The changed tokens come back under other positions than they were asked for."""


# -- bytes ----------------------------------------------------------------------------------------


def _flip(bit: int) -> Bytes:
    def change(payload: bytes, draw: random.Random, _: Recorded) -> bytes:
        words = np.frombuffer(payload, np.uint32).copy()
        words[draw.randrange(words.size)] ^= np.uint32(1 << bit)
        return words.tobytes()

    return change


def _swap(size: int) -> Bytes:
    def change(payload: bytes, draw: random.Random, _: Recorded) -> bytes:
        blocks = [payload[i : i + size] for i in range(0, len(payload), size)]
        first, second = draw.sample(range(len(blocks)), 2)
        blocks[first], blocks[second] = blocks[second], blocks[first]
        return b"".join(blocks)

    return change


def _zeroed(payload: bytes, draw: random.Random, _: Recorded) -> bytes:
    return bytes(len(payload))


def _burst(payload: bytes, draw: random.Random, _: Recorded) -> bytes:
    start = draw.randrange(max(len(payload) - 32, 1))
    noise = draw.randbytes(min(32, len(payload) - start))
    return payload[:start] + noise + payload[start + len(noise) :]


def _wrong_dtype(payload: bytes, draw: random.Random, _: Recorded) -> bytes:
    """float16 bits taken for bfloat16."""
    with np.errstate(over="ignore"):
        halves = np.frombuffer(payload, np.float32).astype(np.float16).view(np.uint16)
    return (halves.astype(np.uint32) << np.uint32(16)).tobytes()


def _byte_order(payload: bytes, draw: random.Random, _: Recorded) -> bytes:
    return np.frombuffer(payload, np.uint32).byteswap().tobytes()


def _truncated(payload: bytes, draw: random.Random, _: Recorded) -> bytes:
    half = len(payload) // 2
    return payload[:half] + bytes(len(payload) - half)


def _shifted(payload: bytes, draw: random.Random, _: Recorded) -> bytes:
    return payload[4:] + payload[:4]


def _stale(payload: bytes, draw: random.Random, recorded: Recorded) -> bytes:
    return recorded.previous


def _cross_talk(payload: bytes, draw: random.Random, recorded: Recorded) -> bytes:
    return recorded.other


# -- a stage's output -----------------------------------------------------------------------------


def _scaled(factor: float) -> Output:
    return lambda _entered, left, _draw: left * factor


def _noisy(share: float) -> Output:
    def change(_: mx.array | None, left: mx.array, draw: random.Random) -> mx.array:
        noise = mx.random.normal(left.shape, key=mx.random.key(draw.getrandbits(32)))
        size = mx.sqrt(mx.mean(left.astype(mx.float32) ** 2))
        return (left + share * size * noise).astype(left.dtype)

    return change


def _rounded(dtype: mx.Dtype) -> Output:
    return lambda _entered, left, _draw: left.astype(dtype).astype(left.dtype)


def _int8(_: mx.array | None, left: mx.array, draw: random.Random) -> mx.array:
    scale = mx.max(mx.abs(left), axis=-1, keepdims=True) / 127
    return (mx.round(left / scale) * scale).astype(left.dtype)


def _filled(value: float) -> Output:
    def change(_: mx.array | None, left: mx.array, draw: random.Random) -> mx.array:
        values = np.array(left.astype(mx.float32))
        values.reshape(-1)[draw.randrange(values.size)] = value
        return mx.array(values).astype(left.dtype)

    return change


def _skipped_stage(entered: mx.array | None, left: mx.array, draw: random.Random) -> mx.array:
    return left if entered is None else entered


def _stuck_element(_: mx.array | None, left: mx.array, draw: random.Random) -> mx.array:
    """One lane of the hardware always gives the same number."""
    values = np.array(left.astype(mx.float32))
    values[..., values.shape[-1] // 3] = 3.0
    return mx.array(values).astype(left.dtype)


# -- a stage's memory -----------------------------------------------------------------------------


def _over_keys(change: Callable[[Any, int, random.Random], None]) -> Cache:
    def apply(stage: OpenStage, request: bytes, _: bytes, draw: random.Random) -> None:
        for cache in stage.cache_of(request):
            if getattr(cache, "keys", None) is not None:
                change(cache, int(cache.offset), draw)

    return apply


def _both(cache: Any, change: Callable[[mx.array], mx.array]) -> None:
    cache.keys, cache.values = change(cache.keys), change(cache.values)


def _lost(cache: Any, length: int, draw: random.Random) -> None:
    _both(cache, mx.zeros_like)


def _off_by_one(cache: Any, length: int, draw: random.Random) -> None:
    _both(cache, lambda held: mx.concatenate([held[:, :, 1:], held[:, :, :1]], axis=2))


def _one_position_zero(cache: Any, length: int, draw: random.Random) -> None:
    at = draw.randrange(length)

    def change(held: mx.array) -> mx.array:
        held = mx.array(held)
        held[:, :, at] = 0
        return held

    _both(cache, change)


def _last_repeated(cache: Any, length: int, draw: random.Random) -> None:
    """The newest entry was not written: the one before stands in its place."""

    def change(held: mx.array) -> mx.array:
        held = mx.array(held)
        held[:, :, length - 1] = held[:, :, length - 2]
        return held

    _both(cache, change)


def _keys_for_values(cache: Any, length: int, draw: random.Random) -> None:
    cache.keys, cache.values = cache.values, cache.keys


def _swapped_layer_caches(stage: OpenStage, request: bytes, _: bytes, draw: random.Random) -> None:
    held = [one for one in stage.cache_of(request) if getattr(one, "keys", None) is not None]
    if len(held) > 1:
        one, other = held[0], held[1]
        one.keys, other.keys = other.keys, one.keys
        one.values, other.values = other.values, one.values


def _of_another_request(
    stage: OpenStage, request: bytes, companion: bytes, draw: random.Random
) -> None:
    for mine, theirs in zip(stage.cache_of(request), stage.cache_of(companion), strict=True):
        if getattr(mine, "keys", None) is None:
            continue
        count = min(int(mine.offset), int(theirs.offset))
        for name in ("keys", "values"):
            held = mx.array(getattr(mine, name))
            held[:, :, :count] = getattr(theirs, name)[:, :, :count]
            setattr(mine, name, held)


def _shortened(stage: OpenStage, request: bytes, _: bytes, draw: random.Random) -> None:
    """One entry less, and the stage knows nothing of it."""
    for cache in stage.cache_of(request):
        if hasattr(cache, "trim"):
            cache.trim(1)


def _forgotten(stage: OpenStage, request: bytes, _: bytes, draw: random.Random) -> None:
    stage.lose(request)


def _rewound(stage: OpenStage, request: bytes, _: bytes, draw: random.Random) -> None:
    """The stage goes back two positions by itself."""
    session = stage.session_of(request)
    session.rewind(session.length - 2)
    for cache in stage.cache_of(request):
        if hasattr(cache, "trim"):
            cache.trim(2)


# -- weights --------------------------------------------------------------------------------------


def _map_arrays(tree: Any, change: Callable[[mx.array], mx.array]) -> Any:
    if isinstance(tree, dict):
        return {name: _map_arrays(value, change) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_map_arrays(value, change) for value in tree]
    return change(tree)


def _swapped_layers(layers: list[Any], draw: random.Random) -> None:
    first, second = dict(layers[0].parameters()), dict(layers[1].parameters())
    layers[0].update(second)
    layers[1].update(first)


def _skipped_layer(layers: list[Any], draw: random.Random) -> None:
    """What a layer adds to its input becomes nothing."""
    layers[0].update(_map_arrays(dict(layers[0].parameters()), mx.zeros_like))


def _other_layer(layers: list[Any], draw: random.Random) -> None:
    def other(array: mx.array) -> mx.array:
        key = mx.random.key(draw.getrandbits(32))
        size = mx.sqrt(mx.mean(array.astype(mx.float32) ** 2))
        return (mx.random.normal(array.shape, key=key) * size).astype(array.dtype)

    layers[0].update(_map_arrays(dict(layers[0].parameters()), other))


def _noisy_weights(layers: list[Any], draw: random.Random) -> None:
    def noisy(array: mx.array) -> mx.array:
        key = mx.random.key(draw.getrandbits(32))
        return (array * (1 + 0.02 * mx.random.normal(array.shape, key=key))).astype(array.dtype)

    for layer in layers:
        layer.update(_map_arrays(dict(layer.parameters()), noisy))


def _coarse_weights(layers: list[Any], draw: random.Random) -> None:
    """Weights of 4 bits in one layer, where everybody agreed on 32."""

    def coarse(array: mx.array) -> mx.array:
        if array.ndim < 2:
            return array
        scale = mx.max(mx.abs(array), axis=-1, keepdims=True) / 7
        return (mx.round(array / scale) * scale).astype(array.dtype)

    layers[0].update(_map_arrays(dict(layers[0].parameters()), coarse))


# -- tokens ---------------------------------------------------------------------------------------


def _dropped(tokens: list[int], at: int, vocab: int, draw: random.Random) -> list[int]:
    return tokens[:at] + tokens[at + 1 :]


def _doubled(tokens: list[int], at: int, vocab: int, draw: random.Random) -> list[int]:
    return tokens[: at + 1] + tokens[at:-1]


def _swapped_tokens(tokens: list[int], at: int, vocab: int, draw: random.Random) -> list[int]:
    at = min(at, len(tokens) - 2)
    return [*tokens[:at], tokens[at + 1], tokens[at], *tokens[at + 2 :]]


def _altered(tokens: list[int], at: int, vocab: int, draw: random.Random) -> list[int]:
    return [*tokens[:at], (tokens[at] + draw.randrange(1, vocab)) % vocab, *tokens[at + 1 :]]


def _of_another_answer(tokens: list[int], at: int, vocab: int, draw: random.Random) -> list[int]:
    return [*tokens[:at], *(draw.randrange(vocab) for _ in tokens[at:])]


def _wrong_seed(spec: SamplingSpec, step: int) -> SamplingSpec:
    return replace(spec, seed=spec.seed + 1)


def _unkeyed(spec: SamplingSpec, step: int) -> SamplingSpec:
    """A generator that was advanced by something else."""
    return replace(spec, seed=spec.seed * 1009 + step)


def _wrong_temperature(spec: SamplingSpec, step: int) -> SamplingSpec:
    return replace(spec, temperature=spec.temperature + 0.6)


def _no_filter(spec: SamplingSpec, step: int) -> SamplingSpec:
    return replace(spec, top_k=2 if spec.top_k == 0 else 0, temperature=spec.temperature or 0.4)


FAULTS: Sequence[Fault] = (
    *(Fault(f"wire bit {bit}", wire=_flip(bit)) for bit in (0, 7, 15, 22, 23, 27, 30, 31)),
    Fault("wire values swapped", wire=_swap(4)),
    Fault("wire blocks swapped", wire=_swap(64)),
    Fault("wire zeroed", wire=_zeroed),
    Fault("wire burst", wire=_burst),
    Fault("wire truncated", wire=_truncated),
    Fault("sealed bit 22", sealed=_flip(22)),
    Fault("sealed bit 30", sealed=_flip(30)),
    Fault("sealed blocks swapped", sealed=_swap(64)),
    Fault("sealed zeroed", sealed=_zeroed),
    Fault("sealed shifted by one", sealed=_shifted),
    Fault("wrong dtype", sealed=_wrong_dtype),
    Fault("wrong byte order", sealed=_byte_order),
    Fault("stale activation", sealed=_stale),
    Fault("cross-talk", sealed=_cross_talk),
    Fault("output scaled 1 %", output=_scaled(1.01), lasting=True),
    Fault("output doubled", output=_scaled(2.0), lasting=True),
    Fault("output noise 1 %", output=_noisy(0.01), lasting=True),
    Fault("output noise 10 %", output=_noisy(0.1), lasting=True),
    Fault("rounded to bfloat16", output=_rounded(mx.bfloat16), lasting=True),
    Fault("rounded to float16", output=_rounded(mx.float16), lasting=True),
    Fault("rounded to int8", output=_int8, lasting=True),
    Fault("one NaN", output=_filled(float("nan"))),
    Fault("one infinity", output=_filled(float("inf"))),
    Fault("stuck element", output=_stuck_element, lasting=True),
    Fault("skipped stage", output=_skipped_stage, lasting=True),
    Fault("KV lost", cache=_over_keys(_lost)),
    Fault("KV off by one", cache=_over_keys(_off_by_one)),
    Fault("KV position zero", cache=_over_keys(_one_position_zero)),
    Fault("KV not written", cache=_over_keys(_last_repeated)),
    Fault("KV keys for values", cache=_over_keys(_keys_for_values)),
    Fault("KV of another layer", cache=_swapped_layer_caches),
    Fault("KV of another request", cache=_of_another_request, needs_companion=True),
    Fault("KV shortened", cache=_shortened),
    Fault("KV forgotten", cache=_forgotten),
    Fault("KV rewound", cache=_rewound),
    Fault("layers swapped", weights=_swapped_layers, lasting=True),
    Fault("layer skipped", weights=_skipped_layer, lasting=True),
    Fault("other weights in a layer", weights=_other_layer, lasting=True),
    Fault("weights noisy 2 %", weights=_noisy_weights, lasting=True),
    Fault("weights of 4 bits", weights=_coarse_weights, lasting=True),
    Fault("wrong seed", sampler=_wrong_seed, lasting=True),
    Fault("draw not keyed by position", sampler=_unkeyed, lasting=True),
    Fault("wrong temperature", sampler=_wrong_temperature, lasting=True),
    Fault("wrong filter", sampler=_no_filter, lasting=True),
    Fault("token dropped", answer=_dropped, relabels=True),
    Fault("token doubled", answer=_doubled, relabels=True),
    Fault("tokens swapped", answer=_swapped_tokens, relabels=True),
    Fault("token altered", answer=_altered),
    Fault("rest of another answer", answer=_of_another_answer),
)
"""Every class that is measured."""
