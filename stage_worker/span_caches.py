"""Which caches a span has, and what is asked of one cache, of whatever kind.

A model indexes its caches by layer to make masks and positions (``cache[fa_idx]``). A span *owns*
the caches of its layers, plus a *companion* for each kind of cache that the model indexes but the
span has none of. Companions hold one zero per position, so that they merge, trim, filter and count
like any other; ``advance`` keeps them in step. In the full-length list that a model wants, entries
outside the span alias an owned cache of the same kind.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList

from stage_worker.layout import Layout
from stagemesh.topology import Span


def _kind(cache: Any) -> tuple[Any, ...]:
    """Caches of one kind make the same masks at the same positions."""
    if isinstance(cache, CacheList):
        return ("CacheList", *(_kind(entry) for entry in cache.caches))
    if isinstance(cache, ArraysCache):
        return (type(cache).__name__,)
    return (
        type(cache).__name__,
        *(getattr(cache, name, None) for name in ("max_size", "chunk_size", "keep")),
    )


def plan(layout: Layout, span: Span) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Which entries of the model's cache list the span owns, which of those are companions, and for
    every entry the position in the owned list that stands in for it."""
    kinds = [_kind(cache) for cache in layout.template]
    assigned = {layout.cache_of[layer] for layer in range(span.first, span.last)}
    inside = {slot for slot in assigned if slot is not None}
    if len(span) == layout.layer_count:
        inside = set(range(len(kinds)))
    companions: set[int] = set()
    present = {kinds[slot] for slot in inside}
    for slot in sorted(layout.indexed):
        if kinds[slot] not in present:
            present.add(kinds[slot])
            companions.add(slot)
    if not inside and not companions and kinds:
        companions.add(0)
    owned = tuple(sorted(inside | companions))
    first_of_kind: dict[tuple[Any, ...], int] = {}
    for position, slot in enumerate(owned):
        first_of_kind.setdefault(kinds[slot], position)
    alias = tuple(
        owned.index(slot) if slot in owned else first_of_kind.get(kind, 0)
        for slot, kind in enumerate(kinds)
    )
    return owned, tuple(sorted(companions)), alias


def advance(cache: Any, batch: int, tokens: int) -> None:
    """Let a companion count ``tokens`` more positions, as a layer would have."""
    if isinstance(cache, CacheList):
        for entry in cache.caches:
            advance(entry, batch, tokens)
    elif isinstance(cache, ArraysCache):
        if cache.empty():
            for index in range(len(cache.cache)):
                cache[index] = mx.zeros((batch, 1))
        cache.advance(tokens)
    elif hasattr(cache, "update_and_fetch"):
        nothing = mx.zeros((batch, 1, tokens, 1))
        cache.update_and_fetch(nothing, nothing)


def offset_of(cache: Any) -> int | None:
    """Positions it holds of one request; None if it does not count them."""
    if isinstance(cache, CacheList):
        return offset_of(cache.caches[0])
    offset = getattr(cache, "offset", None)
    return offset if isinstance(offset, int) else None


def can_merge(cache: Any) -> bool:
    """Whether several requests can lie side by side in one of this kind."""
    if isinstance(cache, CacheList):
        return all(can_merge(entry) for entry in cache.caches)
    return hasattr(cache, "merge")


def can_trim(cache: Any) -> bool:
    """Whether its last positions can be forgotten, as it is now."""
    check = getattr(cache, "is_trimmable", None)
    return bool(check()) if check is not None else False
