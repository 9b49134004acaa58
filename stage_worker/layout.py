"""What a model's forward does between its layers, found by watching one.

`survey` runs the unsplit model once over unread weights: mlx builds graphs lazily, so shapes,
dtypes and the flow of Python objects can be seen without computing or reading anything. It records,
for each layer, the array that came in and went out, which cache it was handed, and which caches the
model itself indexed (for masks and positions). From that follow the boundary's shape and dtype at
any cut, and most reasons a model cannot be cut: its layers return tuples, run twice, hand on
something other than the previous layer's very output, or share a cache across the cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import make_prompt_cache

from stage_worker.boundary import activation_name
from stagemesh.errors import ModelRefused
from stagemesh.topology import Span

SURVEY_TOKENS = 3
"""Length of the surveyed prefill: more than one, so that a mask is made."""


@dataclass(slots=True)
class LayerTrace:
    """What one layer saw in the surveyed prefill."""

    calls: int = 0
    entered: Any = None
    left: Any = None
    caches: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Layout:
    """The surveyed model. ``cache_of[i]`` is the index of layer i's cache in the model's list, or
    None.

    ``indexed`` are the caches that the model reads itself, beside handing them to layers.
    """

    layers: list[Module]
    traces: tuple[LayerTrace, ...]
    template: list[Any]
    cache_of: tuple[int | None, ...]
    indexed: frozenset[int]
    logits: Any

    @property
    def layer_count(self) -> int:
        return len(self.layers)

    def boundary(self, layer: int) -> tuple[int, mx.Dtype]:
        """Width (last axis) and dtype of the activation that enters ``layer``."""
        trace = self.traces[min(layer, self.layer_count - 1)]
        array = trace.entered if layer < self.layer_count else trace.left
        if not isinstance(array, mx.array):  # a model that cannot be cut has no boundary
            return 0, self.logits.dtype
        return int(array.shape[-1]), array.dtype


class _IndexedList(list[Any]):
    """A cache list that notes which entries are read by index rather than by iteration."""

    def __init__(self, caches: list[Any]) -> None:
        super().__init__(caches)
        self.indexed: set[int] = set()

    def __getitem__(self, index: Any) -> Any:
        self.indexed.update(
            range(*index.indices(len(self)))
            if isinstance(index, slice)
            else [range(len(self))[index]]
        )
        return super().__getitem__(index)


def find_layers(model: Module) -> list[Module]:
    """The model's layers in order. Raises ModelRefused when it does not offer them."""
    try:
        layers = list(model.layers)
    except (AttributeError, TypeError) as error:
        raise ModelRefused("the model offers no list of layers; use the full worker") from error
    if not layers or not all(isinstance(layer, Module) for layer in layers):
        raise ModelRefused("the model's layers are not modules; use the full worker")
    if len({id(layer) for layer in layers}) != len(layers):
        raise ModelRefused("the model repeats a layer object; use the full worker")
    return layers


def survey(model: Module) -> Layout:
    """Watch one lazy forward of the whole model. Raises ModelRefused if it cannot even be built."""
    layers = find_layers(model)
    traces = tuple(LayerTrace() for _ in layers)
    template = make_prompt_cache(model)
    caches = _IndexedList(make_prompt_cache(model))
    position = {id(cache): index for index, cache in enumerate(caches)}
    with _Watch(layers, traces, position):
        try:
            logits = model(mx.zeros((1, SURVEY_TOKENS), mx.int32), cache=caches)
        except Exception as error:
            raise ModelRefused(f"the model's own forward fails: {error}") from error
    return Layout(
        layers,
        traces,
        template,
        tuple(min(trace.caches) if trace.caches else None for trace in traces),
        frozenset(caches.indexed),
        logits,
    )


class _Watch:
    """Swaps each layer's class for one that notes its calls; restores them on exit."""

    def __init__(
        self, layers: list[Module], traces: tuple[LayerTrace, ...], position: dict[int, int]
    ) -> None:
        self._layers = layers
        self._classes = [type(layer) for layer in layers]
        self._traces = traces
        self._position = position

    def __enter__(self) -> None:
        for layer, kind, trace in zip(self._layers, self._classes, self._traces, strict=True):
            layer.__class__ = self._noting(kind, trace)

    def __exit__(self, *_error: object) -> None:
        for layer, kind in zip(self._layers, self._classes, strict=True):
            layer.__class__ = kind

    def _noting(self, base: type, trace: LayerTrace) -> type:
        compute, position = base.__call__, self._position
        name = activation_name(base)

        def call(self: Any, *args: Any, **options: Any) -> Any:
            trace.calls += 1
            trace.entered = args[0] if args else options.get(name)
            given = {position.get(id(value)) for value in (*args, *options.values())}
            trace.caches.update(index for index in given if index is not None)
            trace.left = compute(self, *args, **options)
            return trace.left

        return type(base.__name__, (base,), {"__call__": call})


def reasons_against(layout: Layout, span: Span) -> Iterator[str]:
    """Why ``span`` cannot be hosted apart from the rest of the model; nothing when it can."""
    for index, trace in enumerate(layout.traces):
        if trace.calls != 1:
            yield f"layer {index} runs {trace.calls} times in one forward"
        elif not isinstance(trace.left, mx.array):
            yield f"layer {index} returns a {type(trace.left).__name__}, not one activation"
        elif not isinstance(trace.entered, mx.array):
            yield f"layer {index} does not take the activation as its first argument"
        elif trace.entered.ndim != 3 or trace.entered.shape[:2] != (1, SURVEY_TOKENS):
            yield f"layer {index} takes an activation that is not [batch, tokens, hidden]"
        elif len(trace.caches) > 1:
            yield f"layer {index} reads the caches of other layers"
    for cut in (span.first, span.last):
        if 0 < cut < layout.layer_count:
            before, after = layout.traces[cut - 1], layout.traces[cut]
            if before.left is not after.entered:
                yield f"the model changes the activation between layers {cut - 1} and {cut}"
    inside = {c for i, c in enumerate(layout.cache_of) if i in span and c is not None}
    outside = {c for i, c in enumerate(layout.cache_of) if i not in span and c is not None}
    if inside & outside:
        yield "layers on both sides of the cut share a KV cache"
