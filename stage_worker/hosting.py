"""Hosting a span of any mlx-lm model: the model's own forward, cut at two layers.

The recipe: load everything lazily, `survey` the unsplit model (nothing is read), refuse what cannot
be cut, swap the classes of the layers at and outside the span (`boundary`), run the cut model once
over unread weights to see which arrays outside its layers it still needs (an embedding on the first
stage, norm and head on the last), drop every other array, and only then read the rest. So memory
holds the span's tensors and nothing else, and no model architecture is named here.

A SpanModel has no state of any request: caches are passed in (`span_caches` says which a span has),
and a lock serialises forwards.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx_lm.models.cache import make_prompt_cache

from stage_worker import boundary, exponentials, probing, span_caches, tiling, weights
from stage_worker.boundary import parameters
from stage_worker.layout import Layout, reasons_against, survey
from stage_worker.loading import (
    DTypePolicy,
    apply_policy,
    evaluate,
    load_module,
    module_path,
)
from stage_worker.machine import memory_budget_bytes
from stage_worker.probing import ProbeResult
from stage_worker.tensor_parallel import CheckedCollectives, divide
from stage_worker.tensors import to_bytes
from stage_worker.tiling import Arrangement
from stagemesh.errors import InvalidConfiguration, ModelRefused
from stagemesh.topology import Span

AUTO = DTypePolicy.AUTO
MEET_S_MAX = 600.0
"""How long members of a device group wait for the slowest to read its part of the weights."""

_Identify = Callable[[set[str]], tuple[str, str]]
"""Fingerprints of the model and of the span, given the module paths whose arrays the span holds."""


class SpanModel:
    """Layers ``[span.first, span.last)`` of a model, ready to run. Build one with `load` or
    `from_model`.

    ``hidden_size`` is the last axis of the boundary activation and ``dtype`` its mlx dtype;
    ``nbytes`` are the bytes of the arrays held; ``batchable`` and ``trimmable`` say what the span's
    caches can do (a rotating cache is trimmable only until it wraps). ``fingerprint`` is the whole
    model's, ``span_fingerprint`` covers the tensors held; both are hex SHA-256. ``arrangement``:
    how weights lie in memory (see `tiling`). ``layers`` are the modules of *every* layer, those
    outside the span without their arrays. ``owned_slots``: entries of the model's list of caches
    that the span owns.
    """

    def __init__(
        self,
        model: Module,
        config: Mapping[str, Any],
        span: Span | None,
        identify: _Identify,
        collectives: CheckedCollectives | None = None,
    ) -> None:
        layout = survey(model)
        span = _checked_span(layout, span, config)
        self._model = model
        self._lock = threading.Lock()
        self._collectives = collectives
        self._crossing = boundary.Crossing()
        self._exponentials = exponentials.Exponentials()
        self.config = dict(config)
        self.span = span
        self.layer_count = layout.layer_count
        self.model_type = str(config["model_type"])
        self.is_first = span.first == 0
        self.is_last = span.last == layout.layer_count
        self.is_full = self.is_first and self.is_last
        self.vocab_size = int(layout.logits.shape[-1])
        self.hidden_size, self.dtype = layout.boundary(span.first if span.first > 0 else span.last)
        self.owned_slots, self._companions, self._alias = span_caches.plan(layout, span)
        owned = [layout.template[slot] for slot in self.owned_slots]
        self.trimmable = all(span_caches.can_trim(cache) for cache in owned)
        self.batchable = all(span_caches.can_merge(cache) for cache in owned)
        # A whole model whose layers are unusual runs untouched; its logits are narrowed afterwards.
        self._narrows_early = not any(reasons_against(layout, span))
        if self._narrows_early:
            boundary.install(model, layout.layers, span.first, span.last, self._crossing)
            own = layout.layers[span.first : span.last]
            boundary.install_head_start(own, self._crossing)
        self.has_taps = self.is_full and self._narrows_early
        self.layers: Sequence[Module] = tuple(layout.layers)
        if self.has_taps:
            boundary.install_taps(layout.layers, self._crossing)
        layers = layout.layers
        del layout  # its graph would keep every array alive that is dropped below
        self.fingerprint, self.span_fingerprint = identify(self._prune(layers))
        evaluate([*layers, model])
        if collectives is not None:
            with collectives.meeting.patience(MEET_S_MAX):
                collectives.meeting.barrier(
                    "loaded", 1, {"span": self.span_fingerprint, "dtype": str(self.dtype)}
                )
        self.nbytes = sum(array.nbytes for _, array in parameters(model))
        self.probe()
        # Each process times its own kernels; members of a group must all compute alike.
        stays = collectives is not None
        self.arrangement = self._arrange(Arrangement.STORED if stays else tiling.best())
        if not stays and exponentials.pays():
            self._hasten()
        mx.clear_cache()  # buffers of the sources and of the probe

    # -- building ---------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        directory: Path,
        span: Span | None = None,
        *,
        dtype: DTypePolicy = AUTO,
        verify: bool = False,
        home: Path | None = None,
        progress: weights.Progress | None = None,
        collectives: CheckedCollectives | None = None,
    ) -> SpanModel:
        """Host ``span`` (None: every layer) of the model in ``directory``.

        AUTO unpacks to float32 on a CPU unless the span would then outgrow this machine's memory.
        ``verify`` hashes the stored bytes of the span's tensors again instead of trusting the
        cached manifest. ``collectives``: hold one member's part of the span; all members of the
        group load together. Raises ModelNotFound, ModelDamaged (naming the tensor), ModelRefused
        (saying why it cannot be split), InvalidConfiguration (the span is not within the model).
        """
        manifest = weights.manifest(directory, home=home, progress=progress)
        if dtype is AUTO and _float32_bytes(directory, manifest, span) > memory_budget_bytes():
            dtype = DTypePolicy.STORED
        loaded = load_module(directory, dtype)
        if collectives is not None:
            divide(loaded.model, loaded.config, collectives.meeting.group)

        def identify(held: set[str]) -> tuple[str, str]:
            names = {name for path in held for name in loaded.sources.get(path, ())}
            records = [manifest.tensors[name] for name in sorted(names)]
            if verify:
                weights.verify(directory, records)
            return manifest.fingerprint, weights.span_fingerprint(records)

        return cls(loaded.model, loaded.config, span, identify, collectives)

    @classmethod
    def from_model(
        cls,
        model: Module,
        config: Mapping[str, Any],
        span: Span | None = None,
        *,
        dtype: DTypePolicy = DTypePolicy.STORED,
    ) -> SpanModel:
        """Host ``span`` of a model in memory, which is left untouched and shares its arrays."""
        digests = {path: _array_digest(path, array) for path, array in parameters(model)}
        copied = _copy_structure(model)
        apply_policy(copied, dtype)

        def identify(held: set[str]) -> tuple[str, str]:
            kept = ((path, digest) for path, digest in digests.items() if module_path(path) in held)
            return weights.digest_of(digests.items()), weights.digest_of(kept)

        return cls(copied, config, span, identify)

    def _prune(self, layers: list[Module]) -> set[str]:
        """Drop every array the span does not read; returns the module paths that still hold
        some."""
        outside = boundary.modules_outside(self._model, layers[self.span.first : self.span.last])
        with boundary.AccessRecorder(outside) as recorder:
            self._rehearse()
        if not self.is_full:
            boundary.drop_arrays(outside, recorder.seen)
        return {module_path(path) for path, _ in parameters(self._model)}

    def _arrange(self, arrangement: Arrangement) -> Arrangement:
        """Lay the span's weights out for decoding; returns how they lie then. An embedding that is
        only looked up stays as it is."""
        modules = self._own_modules()
        outside = boundary.modules_outside(self._model, self.layers)
        has_head = any(isinstance(module, Linear) for module in outside)
        only_looks_up = self.is_first and (has_head or not self.is_last)
        modules += [m for m in outside if not (only_looks_up and isinstance(m, Embedding))]
        count = tiling.arrange(modules, lambda: probing.chunked_output(self), arrangement)
        return arrangement if count else Arrangement.STORED

    def _hasten(self) -> None:
        """Compute attention and gates with exponentials that this processor is fast at."""
        exponentials.install(
            self._own_modules(), lambda: probing.chunked_output(self), self._exponentials
        )

    def _own_modules(self) -> list[Module]:
        """Every module of the span's layers."""
        layers = self.layers[self.span.first : self.span.last]
        return [module for layer in layers for module in boundary.modules_of(layer)]

    # -- caches -----------------------------------------------------------------------------------

    def make_owned_cache(self) -> list[Any]:
        """Fresh caches for one request: one per entry of ``owned_slots``, all empty."""
        fresh = make_prompt_cache(self._model)
        return [fresh[slot] for slot in self.owned_slots]

    def wrap_cache(self, owned: Sequence[Any]) -> list[Any]:
        """The full-length list for ``owned``; entries outside the span alias one of the same
        kind."""
        return [owned[position] for position in self._alias]

    def make_cache(self) -> list[Any]:
        """`make_owned_cache`, wrapped to the model's full length."""
        return self.wrap_cache(self.make_owned_cache())

    def owned_cache(self, cache: Sequence[Any]) -> list[Any]:
        """The owned caches of a full-length list; the inverse of `wrap_cache`."""
        return [cache[slot] for slot in self.owned_slots]

    def cache_length(self, cache: Sequence[Any]) -> int | None:
        """Positions cached for one request, or None when no cache of the span counts them."""
        for slot in self.owned_slots:
            offset = span_caches.offset_of(cache[slot])
            if offset is not None:
                return offset
        return None

    def trim(self, cache: Sequence[Any], count: int) -> int:
        """Forget the last ``count`` positions; returns how many were forgotten (0: cannot be
        trimmed)."""
        owned = self.owned_cache(cache)
        if not owned or not all(span_caches.can_trim(entry) for entry in owned):
            return 0
        return int(min(entry.trim(count) for entry in owned))

    # -- computing --------------------------------------------------------------------------------

    def forward(
        self,
        tokens: mx.array,
        hidden: mx.array | None,
        cache: Sequence[Any],
        *,
        logits_last: int | None = None,
        logits_at: mx.array | None = None,
        taps: dict[int, mx.array | None] | None = None,
    ) -> mx.array:
        """One step over the span. The output is lazy; what lies ahead of it may already compute.

        ``tokens`` int32 [B, T]; ``hidden`` [B, T, hidden_size], None on the first stage; ``cache``
        as from `wrap_cache`. Returns the boundary activation [B, T, hidden_size], or on the last
        stage logits [B, T, vocab_size]. There, ``logits_last=n`` computes the head only for the
        last n positions ([B, n, V]), and ``logits_at`` (int32 [B]) for one position per row ([B, 1,
        V]). ``taps``: its keys are layer boundaries whose activations [B, T, hidden_size] are
        wanted as well, as values; only where ``has_taps``.
        """
        select = _selection(logits_last, logits_at) if self.is_last else None
        with self._lock, self._governing():
            self._crossing.eager = self._collectives is None
            output = self._run(tokens, hidden, cache, select, taps)
        if select is not None and not self._narrows_early:
            return select(output)
        return output

    def _governing(self) -> contextlib.AbstractContextManager[None]:
        """While layers are divided over devices, none of their collectives goes unchecked."""
        if self._collectives is None:
            return contextlib.nullcontext()
        return self._collectives.governing()

    def _run(
        self,
        tokens: mx.array,
        hidden: mx.array | None,
        cache: Sequence[Any],
        select: Callable[[mx.array], mx.array] | None = None,
        taps: dict[int, mx.array | None] | None = None,
    ) -> mx.array:
        crossing = self._crossing
        crossing.entering, crossing.select, crossing.taps = hidden, select, taps
        try:
            output = self._model(tokens, cache=cache)
        except boundary.SpanFinished:
            output = crossing.leaving
        finally:
            crossing.clear()
            self._exponentials.forget()
        for slot in self._companions:
            span_caches.advance(cache[slot], *tokens.shape)
        return output  # type: ignore[no-any-return]

    # -- checking ---------------------------------------------------------------------------------

    def probe(self) -> ProbeResult:
        """Run the span on fixed input and check what comes out. Raises ModelRefused if it
        disagrees."""
        self._crossing.poison = not self.is_first
        try:
            result = probing.probe(self)
        finally:
            self._crossing.poison = False
        if result.problem is not None:
            raise ModelRefused(
                f"the load-time probe disagrees: {result.problem}",
                model_type=self.model_type,
                span=self.span,
            )
        return result

    def _rehearse(self) -> None:
        """Build the graph of a prefill and a decode step. Raises ModelRefused if the cut breaks
        it."""
        cache = self.make_cache()
        for count in (3, 1):
            hidden = mx.zeros((1, count, self.hidden_size), self.dtype)
            try:
                self._run(mx.zeros((1, count), mx.int32), None if self.is_first else hidden, cache)
            except Exception as error:
                raise ModelRefused(
                    "cannot be split: the forward fails without the other layers "
                    f"({type(error).__name__}: {error}); serve it with the full worker",
                    model_type=self.model_type,
                    span=self.span,
                ) from error

    def __repr__(self) -> str:
        return (
            f"SpanModel({self.model_type} [{self.span}] of {self.layer_count}, {self.dtype}, "
            f"{self.nbytes / 2**20:.0f} MiB)"
        )


def _selection(
    last: int | None, positions: mx.array | None
) -> Callable[[mx.array], mx.array] | None:
    if positions is not None:
        rows = positions[:, None, None]
        return lambda hidden: mx.take_along_axis(
            hidden, mx.broadcast_to(rows, (hidden.shape[0], 1, hidden.shape[-1])), axis=1
        )
    if last is not None:
        return lambda hidden: hidden[:, -last:]
    return None


def _checked_span(layout: Layout, span: Span | None, config: Mapping[str, Any]) -> Span:
    """``span``, or all layers for None. Raises InvalidConfiguration, ModelRefused."""
    whole = Span(0, layout.layer_count)
    if span is None or span == whole:
        return whole
    if span.last > layout.layer_count:
        raise InvalidConfiguration(
            f"span {span} exceeds the model's {layout.layer_count} layers", setting="span"
        )
    for reason in reasons_against(layout, span):
        raise ModelRefused(
            f"cannot be split: {reason}; serve it with the full worker",
            model_type=config["model_type"],
            span=span,
        )
    return span


def _float32_bytes(directory: Path, manifest: weights.Manifest, span: Span | None) -> int:
    """About how many bytes the span's tensors take as float32."""
    config = weights.read_config(directory)
    quantization = config.get("quantization") or config.get("quantization_config") or {}
    packed_bits = int(quantization.get("bits") or 4)
    growth = {"F32": 1.0, "F16": 2.0, "BF16": 2.0, "U32": 32 / packed_bits}
    total = sum(record.size * growth.get(record.dtype, 4.0) for record in manifest.tensors.values())
    layers = int((config.get("text_config") or config).get("num_hidden_layers") or 0)
    share = len(span) / layers if span is not None and layers else 1.0
    return int(total * min(1.0, share))


def _copy_structure(model: Module) -> Module:
    """A copy of the module tree that shares every array."""
    memo: dict[int, Any] = {}
    for module in boundary.modules_of(model):
        for value in module.values():
            if isinstance(value, mx.array):
                memo[id(value)] = value
    return copy.deepcopy(model, memo)


def _array_digest(path: str, array: mx.array) -> str:
    head = f"{path} {array.dtype} {tuple(array.shape)}\n".encode()
    return hashlib.sha256(head + to_bytes(array.reshape(-1))).hexdigest()
