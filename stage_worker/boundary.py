"""Surgery on a model's module tree: where a span begins and ends.

A layer keeps its identity, attributes and place in every list that holds it; only its *class* is
swapped for a subclass whose ``__call__`` differs. So the model's own forward code runs unchanged
(it picks masks by ``layer.use_sliding``, counts caches, and so on) and needs no knowledge of spans:

* a layer outside the span returns its input;
* the first layer of a later stage takes the received activation in place of its input;
* the last layer of an earlier stage stores its output and ends the forward by raising
  `SpanFinished`, which costs about two microseconds and saves building a graph for norm and head;
* the model's very last layer may narrow its output to the positions whose logits are wanted;
* every layer of a whole model may be asked for a copy of its output (a *tap*);
* an embedding on a later stage yields zeros of the right shape (NaN while poisoned, see below).

Nothing of a request stays in the modules: what a call needs is in one `Crossing`, set before and
cleared after each forward by the owner, which serialises calls.

**Poison.** While `Crossing.poison` is set, everything computed ahead of the span is NaN. If a NaN
reaches the span's output, then something other than the activation crosses the cut, and the model
cannot be split.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, Self

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.quantized import QuantizedEmbedding
from mlx.utils import tree_flatten

_CROSSING = "_stagemesh_crossing"
_EMBEDDING_WIDTH = "_stagemesh_width"
_TAP_LAYER = "_stagemesh_layer"
HEAD_START_LAYERS = 3
"""Layers between two places where what has been built is sent off to be computed."""


class SpanFinished(BaseException):
    """Ends a forward behind the span's last layer. Not an Exception: no model code may catch it."""


class Crossing:
    """What one forward carries over the span's edges; owned by a SpanModel, never shared."""

    __slots__ = ("eager", "entering", "leaving", "poison", "select", "taps")

    def __init__(self) -> None:
        self.entering: mx.array | None = None
        self.leaving: Any = None
        self.select: Callable[[mx.array], mx.array] | None = None
        self.poison = False
        self.eager = False
        """Compute while the rest of the graph is still being built."""
        self.taps: dict[int, mx.array | None] | None = None

    def clear(self) -> None:
        """Forget the arrays of the forward that just ended."""
        self.entering = self.leaving = self.select = self.taps = None
        self.eager = False


def activation_name(kind: type) -> str:
    """The name of a layer's first parameter, under which some models pass the activation."""
    return list(inspect.signature(kind.__call__).parameters)[1]


@functools.cache
def _outside(base: type) -> type:
    name = activation_name(base)

    def call(self: Any, *args: Any, **options: Any) -> mx.array:
        x: mx.array = args[0] if args else options[name]
        return x * float("nan") if getattr(self, _CROSSING).poison else x

    return type(base.__name__, (base,), {"__call__": call})


@functools.cache
def _edge(base: type, enters: bool, leaves: bool, selects: bool) -> type:
    compute = base.__call__
    name = activation_name(base)

    def call(self: Any, *args: Any, **options: Any) -> Any:
        crossing: Crossing = getattr(self, _CROSSING)
        if enters and args:
            args = (crossing.entering, *args[1:])
        elif enters:
            options[name] = crossing.entering
        output = compute(self, *args, **options)
        if leaves:
            crossing.leaving = output
            raise SpanFinished
        if selects and crossing.select is not None:
            return crossing.select(output)
        return output

    return type(base.__name__, (base,), {"__call__": call})


@functools.cache
def _head_start(base: type) -> type:
    compute = base.__call__

    def call(self: Any, *args: Any, **options: Any) -> Any:
        output = compute(self, *args, **options)
        if getattr(self, _CROSSING).eager and isinstance(output, mx.array):
            mx.async_eval(output)  # type: ignore[no-untyped-call]
        return output

    return type(base.__name__, (base,), {"__call__": call})


def install_head_start(layers: list[Module], crossing: Crossing) -> None:
    """Let some of ``layers`` send off what has been built so far, if ``crossing.eager``.

    Building a step's graph takes Python about a twentieth of a decode step, in which nothing would
    be computed otherwise. Never behind the last layer: its output may not be wanted at all.
    """
    for layer in layers[:-1:HEAD_START_LAYERS]:
        _swap(layer, _head_start(type(layer)), crossing)


@functools.cache
def _tapped(base: type) -> type:
    compute = base.__call__

    def call(self: Any, *args: Any, **options: Any) -> Any:
        output = compute(self, *args, **options)
        taps = getattr(self, _CROSSING).taps
        if taps is not None and getattr(self, _TAP_LAYER) in taps:
            taps[getattr(self, _TAP_LAYER)] = output
        return output

    return type(base.__name__, (base,), {"__call__": call})


def install_taps(layers: list[Module], crossing: Crossing) -> None:
    """Let ``crossing.taps`` ask for outputs: key n receives the output of the n-th layer, from
    1."""
    for index, layer in enumerate(layers):
        object.__setattr__(layer, _TAP_LAYER, index + 1)
        _swap(layer, _tapped(type(layer)), crossing)


@functools.cache
def _blank_embedding(base: type) -> type:
    def call(self: Any, ids: mx.array) -> mx.array:
        crossing: Crossing = getattr(self, _CROSSING)
        # A fresh array: models scale their embeddings in place, which must not touch ``entering``.
        fill = float("nan") if crossing.poison else 0.0
        dtype = mx.float32 if crossing.entering is None else crossing.entering.dtype
        return mx.full((*ids.shape, getattr(self, _EMBEDDING_WIDTH)), fill, dtype)

    return type(base.__name__, (base,), {"__call__": call})


def _swap(module: Module, kind: type, crossing: Crossing) -> None:
    object.__setattr__(module, _CROSSING, crossing)
    module.__class__ = kind


def install(model: Module, layers: list[Module], first: int, last: int, crossing: Crossing) -> None:
    """Turn ``model`` into one that computes only ``layers[first:last]``, in place."""
    count = len(layers)
    if first > 0:
        for module in modules_outside(model, layers):
            if isinstance(module, (Embedding, QuantizedEmbedding)):
                object.__setattr__(module, _EMBEDDING_WIDTH, embedding_width(module))
                _swap(module, _blank_embedding(type(module)), crossing)
    for index, layer in enumerate(layers):
        if not first <= index < last:
            _swap(layer, _outside(type(layer)), crossing)
    for index in {first, last - 1}:
        enters = index == first and first > 0
        leaves = index == last - 1 and last < count
        selects = index == count - 1
        if enters or leaves or selects:
            kind = _edge(type(layers[index]), enters, leaves, selects)
            _swap(layers[index], kind, crossing)


def embedding_width(module: Module) -> int:
    """Size of the last axis of an embedding's output."""
    if isinstance(module, QuantizedEmbedding):
        return int(module.dims)
    return int(module.weight.shape[-1])


def modules_outside(model: Module, layers: Iterable[Module]) -> list[Module]:
    """Every module of ``model`` that is in none of ``layers``."""
    inside = {id(module) for layer in layers for module in modules_of(layer)}
    return [module for module in modules_of(model) if id(module) not in inside]


def modules_of(model: Any) -> list[Module]:
    """``model`` and every module below it. (mlx leaves this method untyped.)"""
    return list(model.modules())


class AccessRecorder:
    """Records which arrays a forward reads from the given modules, by swapping their classes.

    Building the lazy graph is enough; nothing has to be evaluated.
    """

    def __init__(self, modules: Iterable[Module]) -> None:
        self._modules = list(modules)
        self._classes = [type(module) for module in self._modules]
        self.seen: set[int] = set()

    def __enter__(self) -> Self:
        for module, kind in zip(self._modules, self._classes, strict=True):
            module.__class__ = self._recording(kind)
        return self

    def __exit__(self, *_error: object) -> None:
        for module, kind in zip(self._modules, self._classes, strict=True):
            module.__class__ = kind

    def _note(self, value: Any) -> Any:
        if isinstance(value, mx.array):
            self.seen.add(id(value))
        elif isinstance(value, (list, tuple)):
            self.seen.update(id(item) for item in value if isinstance(item, mx.array))
        return value

    def _recording(self, base: type) -> type:
        note = self._note

        def getitem(self: Any, key: str) -> Any:
            return note(dict.__getitem__(self, key))

        def get(self: Any, key: str, default: Any = None) -> Any:
            # Attribute access of an mlx module ends here too.
            return note(dict.get(self, key, default))

        return type(base.__name__, (base,), {"__getitem__": getitem, "get": get})


def drop_arrays(modules: Iterable[Module], keep: set[int]) -> None:
    """Delete every array held directly by ``modules`` whose ``id`` is not in ``keep``."""
    for module in modules:
        for key, value in list(module.items()):
            if isinstance(value, mx.array) and id(value) not in keep:
                del module[key]
            elif isinstance(value, list) and value and isinstance(value[0], mx.array):
                module[key] = [item if id(item) in keep else mx.zeros((0,)) for item in value]


def parameters(model: Any) -> list[tuple[str, mx.array]]:
    """Path and array of every parameter that ``model``, a Module, holds."""
    flat: Any = tree_flatten(model.parameters())
    return list(flat)
