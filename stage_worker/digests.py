"""Digests of activations at layer boundaries: what lets a wrong computation be traced to a stage.

For each token one checksum and two numbers. The checksum is equal exactly if the bytes are, which
is the test where kernels are bit-exact. The numbers (root mean square, and the projection on a
fixed sequence of signs, over the square root of the size) differ by about as much as the
activations do, relative to their size, which is the test where they are not: a random error of
relative size e moves the projection by about e times the root mean square, whichever elements it
is in.

The signs come from a counter-based generator with a fixed key, so every worker has the same ones.
Cost for a token of 576 elements: about 5 µs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from stage_worker.tensors import Floats, float_view, to_bytes, wire_dtype
from stagemesh.checksum import crc32c
from stagemesh.frame import BoundaryDigest
from stagemesh.tensor import Tensor

_SIGNS_KEY = 0x5747_4D45
FINITE_MAX = 3e38
"""Larger sums are reported as this: the fields travel as float32."""


@functools.lru_cache(maxsize=8)
def signs(size: int) -> Floats:
    """``size`` signs (1 or -1), always the same ones."""
    words = np.random.Philox(key=np.array([_SIGNS_KEY, 0], np.uint64)).random_raw(-(-size // 64))
    bits = np.unpackbits(words.view(np.uint8))[:size]
    return np.where(bits, np.float32(1), np.float32(-1)).astype(np.float32)


def digests(array: mx.array, layer: int, first_position: int) -> tuple[BoundaryDigest, ...]:
    """One digest per token of ``array`` ([tokens, hidden] or [1, tokens, hidden])."""
    payload, size = to_bytes(array), int(array.shape[-1])
    count = int(array.size) // size
    return of_payload(
        Tensor(wire_dtype(array.dtype), (count, size), payload), layer, first_position
    )


def of_payload(tensor: Tensor, layer: int, first_position: int) -> tuple[BoundaryDigest, ...]:
    """The same for the bytes that travel: ``tensor`` [tokens, hidden]."""
    count, size = tensor.shape
    line = size * tensor.dtype.itemsize
    payload = memoryview(tensor.payload)
    values = float_view(tensor)
    with np.errstate(over="ignore", invalid="ignore"):
        roots = np.sqrt(np.einsum("ij,ij->i", values, values) / size)
        projections = values @ signs(size) / np.float32(math.sqrt(size))
    return tuple(
        BoundaryDigest(
            layer,
            first_position + index,
            crc32c(payload[index * line : (index + 1) * line]),
            _bounded(roots[index]),
            _bounded(projections[index]),
        )
        for index in range(count)
    )


def wanted(boundaries: Sequence[int], first: int, last: int, layer_count: int) -> tuple[int, ...]:
    """Which of ``boundaries`` a span ``[first, last)`` can answer: those behind one of its layers,
    but for the model's last."""
    return tuple(sorted({b for b in boundaries if first < b <= last and b < layer_count}))


def _bounded(value: np.floating) -> float:
    number = float(value)
    return number if abs(number) < FINITE_MAX else FINITE_MAX  # also for what is no number
