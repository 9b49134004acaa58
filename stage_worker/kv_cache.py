"""KV caches of a stage: one per request, or several requests side by side in a batch.

A request is prefilled into caches of its own (a *single*: the model's own cache objects, batch size
1). When a decode step has several rows, their caches are laid side by side in a *batch*: every row
has a *slot* (an index on the batch axis), right-justified, so that one slice assignment per layer
appends one position to all rows at once; a row shorter than the batch has padding on its left,
which the mask hides. The numbers of a row do not depend on its slot, its padding or its neighbours.

Requests come and go between steps, and copying every cache each time would cost more than the step.
So a request that leaves only frees its slot, and one that joins takes a free slot if it is not
longer than the batch is wide: one row is copied. Free slots are computed along (on zeros) and
reused; the batch is copied only to grow, to get wider, or when more than a quarter of its slots are
free or most of its width is padding. Several batches live side by side when microbatches alternate.

Padding is memory that nobody asked for, and the budget counts positions without it. So beyond a
room in which another forward would cost more than padding does, requests of very different length
are not laid side by side (`side_by_side`): such a batch holds at most about one and a half times
the positions of its requests.

A row leaves its batch (`single`) by copying out the positions its session counts, whatever the
batch has appended since: so a step that failed half-way is undone for every row by taking it out.

Batchable are exactly the cache kinds `_empty_batch` knows: plain KV caches and recurrent state.
Rotating and chunked caches are served row by row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, BatchKVCache, CacheList, KVCache

from stage_worker.hosting import SpanModel

FREE_SLOTS_SHARE_MAX = 0.25
"""A batch with more free slots than this is copied without them: they cost compute in every
step."""

PADDING_FACTOR = 1.5
"""Positions of a large batch, padding included, at most so many times those of its requests, …"""
PADDING_FREE = 256
"""… and this many per request on top: caches grow in steps of this size anyway."""

CACHE_STEP = BatchKVCache.step
"""Positions by which mlx-lm's caches grow."""
ROOM_MIN = 64
"""Positions that a batch has free when it was copied: growing copies it again."""

Owned = list[Any]


class BatchUnsupported(Exception):
    """A cache of a kind that cannot be laid side by side."""


@dataclass(slots=True)
class Batch:
    """Requests side by side. ``slots[i]`` is the request in slot i, None when free; ``padding[i]``
    its padding in positions; ``width`` the positions every slot holds, padding included."""

    slots: list[bytes | None]
    padding: list[int]
    width: int
    owned: Owned
    states: list[list[Any]] = field(default_factory=list)
    """Recurrent states as they were before the step in progress, so that a failed step can be
    undone."""

    @property
    def live(self) -> list[bytes]:
        return [request for request in self.slots if request is not None]

    @property
    def free(self) -> list[int]:
        return [slot for slot, request in enumerate(self.slots) if request is None]

    @property
    def is_mostly_padding(self) -> bool:
        """Of every request's positions; as when the one that made it wide has left."""
        shared = min(self.padding[self.slots.index(request)] for request in self.live)
        return shared > max(PADDING_FREE, self.width // 2)

    def slot_of(self, request: bytes) -> int:
        return self.slots.index(request)


@dataclass(frozen=True, slots=True)
class BatchView:
    """What a batched forward needs: the model's full-length cache list, how many slots it has, and
    the slot of each row of the step."""

    cache: list[Any]
    slot_count: int
    slot_of_row: tuple[int, ...]


class CacheStore:
    """The KV caches of all requests of one epoch on one stage."""

    def __init__(self, model: SpanModel) -> None:
        self._model = model
        self._singles: dict[bytes, Owned] = {}
        self._batches: list[Batch] = []
        self._running: Batch | None = None
        self.rows_copied = 0
        """Rows copied into, out of or along with batches; a figure for benchmarks."""

    def clear(self) -> None:
        """Free every cache."""
        self._singles.clear()
        self._batches.clear()

    def open(self, request: bytes) -> None:
        """Give ``request`` fresh, empty caches."""
        self.drop(request)
        self._singles[request] = self._model.make_owned_cache()

    def drop(self, request: bytes) -> None:
        """Free the caches of ``request``, if there are any."""
        self._singles.pop(request, None)
        batch = self._batch_of(request)
        if batch is not None:
            self._free(batch, batch.slot_of(request))

    def __contains__(self, request: bytes) -> bool:
        return request in self._singles or self._batch_of(request) is not None

    def single(self, request: bytes, length: int) -> list[Any]:
        """Full-length cache list of ``request`` alone, taken out of its batch if need be.
        ``length`` is the number of positions that count. Raises KeyError for an unknown request."""
        batch = self._batch_of(request)
        if batch is not None:
            self._take_out(batch, request, length)
        return self._model.wrap_cache(self._singles[request])

    def trim(self, request: bytes, length: int, target: int) -> bool:
        """Shorten the cache of ``request`` from ``length`` to ``target`` positions; False if it
        cannot be."""
        if not self._model.trimmable:
            return False
        cache = self.single(request, length)
        excess = (self._model.cache_length(cache) or length) - target
        return excess == 0 or self._model.trim(cache, excess) == excess

    def batch(self, lengths: Mapping[bytes, int]) -> BatchView:
        """Lay the requests in ``lengths`` (request → positions that count) side by side.

        An existing batch is kept as far as possible; whoever else is in it is taken out.
        ``lengths`` of requests that are not part of this step are not needed: a batch knows its
        width and padding.
        """
        batch = self._closest(lengths)
        if batch is None:
            batch = Batch([], [], 0, [])
            self._batches.append(batch)
        for request in batch.live:
            if request not in lengths:
                self._take_out(batch, request, batch.width - batch.padding[batch.slot_of(request)])
        joining = [request for request in lengths if request not in batch.slots]
        for request in joining:
            self.single(request, lengths[request])
        self._join(batch, {request: lengths[request] for request in joining})
        if len(batch.free) > FREE_SLOTS_SHARE_MAX * len(batch.slots) or batch.is_mostly_padding:
            self._compact(batch)
        batch.states = [list(leaf.cache) for leaf in _leaves(batch.owned) if _is_state(leaf)]
        self._running = batch
        slots = tuple(batch.slot_of(request) for request in lengths)
        return BatchView(self._model.wrap_cache(batch.owned), len(batch.slots), slots)

    def advanced(self) -> None:
        """The step over the batch made last succeeded: every slot of it is one position longer."""
        if self._running is not None:
            self._running.width += 1
            self._running.states = []
            self._running = None

    def restore(self, lengths: Mapping[bytes, int]) -> None:
        """A batched step failed: take its requests out as they were before it."""
        self._running = None
        for request, length in lengths.items():
            batch = self._batch_of(request)
            if batch is not None:
                for leaf, state in zip(_states(batch.owned), batch.states, strict=False):
                    leaf.cache = list(state)
                self._take_out(batch, request, length)

    # -- batches ----------------------------------------------------------------------------------

    def _batch_of(self, request: bytes) -> Batch | None:
        for batch in self._batches:
            if request in batch.slots:
                return batch
        return None

    def _closest(self, requests: Iterable[bytes]) -> Batch | None:
        """The batch in which most of the requests already are."""
        votes: dict[int, int] = {}
        for request in requests:
            for index, batch in enumerate(self._batches):
                if request in batch.slots:
                    votes[index] = votes.get(index, 0) + 1
        return self._batches[max(votes, key=votes.__getitem__)] if votes else None

    def _free(self, batch: Batch, slot: int) -> None:
        batch.slots[slot] = None
        if not batch.live:
            self._batches.remove(batch)

    def _take_out(self, batch: Batch, request: bytes, length: int) -> None:
        slot = batch.slot_of(request)
        first = batch.padding[slot]
        owned = [_extracted(cache, slot, first, length) for cache in batch.owned]
        # Evaluated now: a lazy slice would keep the batch's arrays from being updated in place.
        mx.eval([leaf.state for leaf in _leaves(owned)])
        self._singles[request] = owned
        self.rows_copied += 1
        self._free(batch, slot)

    def _join(self, batch: Batch, joining: dict[bytes, int]) -> None:
        if not joining:
            return
        sources = {request: self._singles.pop(request) for request in joining}
        if not batch.slots:
            batch.owned = [_empty_batch(cache) for cache in next(iter(sources.values()))]
        held, width = len(batch.slots), max(batch.width, *joining.values())
        seats = [*batch.free, *range(held, held + len(joining))][: len(joining)]
        count = max(held, 1 + max(seats))
        if count > held or width > batch.width:
            self._make_room(batch, next(iter(sources.values())), count, width)
        for slot, (request, length) in zip(seats, joining.items(), strict=True):
            batch.slots[slot], batch.padding[slot] = request, width - length
            for target, source in _paired(batch.owned, sources[request]):
                _place(target, slot, source, width, length)
        self.rows_copied += len(joining)
        self._renumber(batch)

    def _make_room(self, batch: Batch, like: Owned, count: int, width: int) -> None:
        """Copy the batch once, to ``count`` slots of ``width`` positions. ``like``: one request's
        caches, for the shapes."""
        held, added = len(batch.slots), width - batch.width
        for target, source in _paired(batch.owned, like):
            _enlarge(target, source, batch.width, count, width)
        batch.slots += [None] * (count - held)
        batch.padding = [padding + added for padding in batch.padding] + [width] * (count - held)
        batch.width = width
        self.rows_copied += held

    def _compact(self, batch: Batch) -> None:
        """Copy the batch without its free slots and without padding that all rows share. Its room
        stays, or the step that follows would copy it once more to grow."""
        kept = [slot for slot, request in enumerate(batch.slots) if request is not None]
        shared = min(batch.padding[slot] for slot in kept)
        chosen = mx.array(kept)
        for leaf in _leaves(batch.owned):
            if isinstance(leaf, BatchKVCache):
                if leaf.keys is not None:
                    leaf.keys = _chosen(leaf.keys, kept, shared)
                    leaf.values = _chosen(leaf.values, kept, shared)
            else:
                leaf.cache = [None if state is None else state[chosen] for state in leaf.cache]
        batch.slots = [batch.slots[slot] for slot in kept]
        batch.padding = [batch.padding[slot] - shared for slot in kept]
        batch.width -= shared
        self.rows_copied += len(kept)
        self._renumber(batch)

    def _renumber(self, batch: Batch) -> None:
        """Tell mlx-lm's cache objects what the lists here say."""
        padding = mx.array(batch.padding)
        offset = mx.array([batch.width - count for count in batch.padding])
        for leaf in _leaves(batch.owned):
            if isinstance(leaf, BatchKVCache):
                leaf.state = (leaf.keys, leaf.values, offset, padding, batch.width)


# -- cache objects --------------------------------------------------------------------------------


def side_by_side(lengths: Mapping[bytes, int], room: int) -> list[set[bytes]]:
    """Requests grouped so that padding stays within bounds; most often one group. ``room``:
    positions that a batch may have whatever its padding."""
    groups: list[set[bytes]] = []
    longest = total = 0
    for request in sorted(lengths, key=lambda one: -lengths[one]):
        length, count = lengths[request], len(groups[-1]) + 1 if groups else 1
        total += length
        allowed = max(room, PADDING_FACTOR * total + PADDING_FREE * count)
        if not groups or count * longest > allowed:
            groups.append(set())
            longest = total = length
        groups[-1].add(request)
    return groups


def bytes_per_position(model: SpanModel) -> int:
    """What one position of one request takes on this span. States of fixed size are not counted."""
    cache = model.make_cache()
    hidden = None if model.is_first else mx.zeros((1, 1, model.hidden_size), model.dtype)
    mx.eval(model.forward(mx.zeros((1, 1), mx.int32), hidden, cache))
    total = 0
    for leaf in _leaves(model.owned_cache(cache)):
        for name in ("keys", "values"):
            array = getattr(leaf, name, None)
            if isinstance(array, mx.array):
                total += array.nbytes // array.shape[2]
    return total


def can_batch(owned: Iterable[Any]) -> bool:
    """Every cache is of a kind that can be laid side by side."""
    try:
        for cache in owned:
            _empty_batch(cache)
    except BatchUnsupported:
        return False
    return True


def evaluate(owned: Iterable[Any]) -> None:
    """Compute everything pending in the caches of a full-length or owned list."""
    mx.eval([leaf.state for leaf in _leaves(owned)])


def _leaves(owned: Iterable[Any]) -> Iterator[Any]:
    for cache in owned:
        if isinstance(cache, CacheList):
            yield from _leaves(cache.caches)
        else:
            yield cache


def _paired(targets: Iterable[Any], sources: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(_leaves(targets), _leaves(sources), strict=True)


def _is_state(leaf: Any) -> bool:
    return type(leaf) is ArraysCache


def _states(owned: Iterable[Any]) -> Iterator[Any]:
    return (leaf for leaf in _leaves(owned) if _is_state(leaf))


def _empty_batch(cache: Any) -> Any:
    """The batched counterpart of a single cache, without rows. Raises BatchUnsupported."""
    if type(cache) is KVCache:
        return BatchKVCache([])
    if type(cache) is ArraysCache:
        return ArraysCache(len(cache.cache))
    if type(cache) is CacheList:
        return CacheList(*(_empty_batch(part) for part in cache.caches))
    raise BatchUnsupported(type(cache).__name__)


def _enlarge(target: Any, source: Any, before: int, count: int, width: int) -> None:
    """Make a batch leaf of ``before`` positions one of ``count`` slots and ``width`` positions,
    with zeros where nothing was, and room for the steps that follow: else the next one would copy
    everything again."""
    if not isinstance(target, BatchKVCache):
        for index, (old, one) in enumerate(zip(target.cache, source.cache, strict=True)):
            if one is not None:
                target.cache[index] = _larger(old, (count, *one.shape[1:]), one.dtype)
        return
    capacity = CACHE_STEP * -(-(width + ROOM_MIN) // CACHE_STEP)
    for name in ("keys", "values"):
        old, one = getattr(target, name), getattr(source, name)
        shape = (count, one.shape[1], capacity, one.shape[3])
        kept = None if old is None else old[:, :, :before]
        setattr(target, name, _larger(kept, shape, one.dtype, at=width - before))


def _larger(old: mx.array | None, shape: tuple[int, ...], dtype: mx.Dtype, at: int = 0) -> mx.array:
    """Zeros, with ``old`` in the first slots, from position ``at`` on its third axis."""
    larger = mx.zeros(shape, dtype)
    if old is None:
        return larger
    if at or old.shape[1:] != shape[1:]:
        larger[: old.shape[0], :, at : at + old.shape[2]] = old
    else:
        larger[: old.shape[0]] = old
    return larger


def _chosen(array: mx.array, slots: Iterable[int], first: int) -> mx.array:
    """These slots of a batch's array, from position ``first`` on. Whole slots one behind the other:
    on a CPU, indexing with a list is several times slower."""
    return mx.concatenate([array[slot : slot + 1, :, first:] for slot in slots])


def _place(target: Any, slot: int, source: Any, width: int, length: int) -> None:
    """Write one request's leaf into a slot of a batch leaf, the last position at the end. What was
    there before stays to the left, where the mask hides it."""
    if isinstance(target, BatchKVCache):
        target.keys[slot : slot + 1, :, width - length : width] = source.keys[:, :, :length]
        target.values[slot : slot + 1, :, width - length : width] = source.values[:, :, :length]
        return
    for index, state in enumerate(source.cache):
        if state is not None:
            target.cache[index][slot : slot + 1] = state


def _extracted(cache: Any, slot: int, first: int, length: int) -> Any:
    """One slot of a batch cache as a cache of its own, positions ``first`` to ``first +
    length``."""
    if isinstance(cache, CacheList):
        return CacheList(*(_extracted(part, slot, first, length) for part in cache.caches))
    if isinstance(cache, BatchKVCache):
        taken = KVCache()
        rows = slice(slot, slot + 1)
        positions = slice(first, first + length)
        taken.keys = mx.contiguous(cache.keys[rows, :, positions])
        taken.values = mx.contiguous(cache.values[rows, :, positions])
        taken.offset = length
        return taken
    alone = ArraysCache(len(cache.cache))
    alone.cache = [None if s is None else mx.contiguous(s[slot : slot + 1]) for s in cache.cache]
    return alone
