"""Tensors as they travel: a dtype, a shape and little-endian row-major bytes.

bfloat16 has no standard library or numpy representation, so a payload is never interpreted here; it
is bytes whose length must equal ``product(shape) * itemsize``. All limits are checked before any
allocation.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from stagemesh.errors import FrameMalformed, FrameTooLarge

RANK_MAX = 4
"""Activations are [batch, tokens, hidden]; one more axis of room."""
PAYLOAD_BYTES_MAX = 256 * 1024 * 1024
"""Largest tensor of one step: 8,192 tokens × 8,192 hidden × 4 bytes."""


class DType(enum.IntEnum):
    """Element types a hop accepts. Wire values are frozen."""

    NONE = 0
    F32 = 1
    F16 = 2
    BF16 = 3
    I32 = 4
    U32 = 5
    I64 = 6
    U8 = 7
    I8 = 8
    I16 = 9
    U16 = 10

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return _ITEMSIZE[self]


_ITEMSIZE = {
    DType.NONE: 0,
    DType.F32: 4,
    DType.F16: 2,
    DType.BF16: 2,
    DType.I32: 4,
    DType.U32: 4,
    DType.I64: 8,
    DType.U8: 1,
    DType.I8: 1,
    DType.I16: 2,
    DType.U16: 2,
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """An activation: ``payload`` holds ``product(shape)`` elements of ``dtype``."""

    dtype: DType
    shape: tuple[int, ...]
    payload: bytes | memoryview

    def __str__(self) -> str:
        size = ",".join(map(str, self.shape))
        return f"{self.dtype.name.lower()}[{size}] {len(self.payload)} B"


def check_tensor(tensor: Tensor) -> None:
    """Raise FrameMalformed or FrameTooLarge unless dtype, shape and length agree."""
    check_tensor_size(tensor.dtype, tensor.shape, len(tensor.payload))


def check_tensor_size(dtype: DType, shape: tuple[int, ...], payload_length: int) -> None:
    """``check_tensor`` for a payload that has a length but is not here yet."""
    if dtype is DType.NONE:
        raise FrameMalformed("a tensor needs a dtype")
    if not 1 <= len(shape) <= RANK_MAX or any(axis < 1 for axis in shape):
        raise FrameMalformed("tensor shape out of range", shape=shape)
    size = math.prod(shape) * dtype.itemsize
    if size > PAYLOAD_BYTES_MAX:
        raise FrameTooLarge("tensor over payload_bytes_max", size=size, limit=PAYLOAD_BYTES_MAX)
    if size != payload_length:
        raise FrameMalformed(
            "payload length does not match its shape",
            shape=shape,
            expected=size,
            actual=payload_length,
        )
