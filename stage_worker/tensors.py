"""mlx arrays to frame tensors and back, exact for every dtype.

A frame's payload is little-endian row-major bytes. mlx exposes an array's memory as a buffer but
numpy has no bfloat16, so bytes are always moved as integers and viewed as the real dtype
afterwards; no element is ever converted. One copy each way: device memory to ``bytes`` on the way
out, payload to device memory on the way in. Arrays are evaluated here, before transport; nothing
lazy leaves the compute thread.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from stagemesh.errors import FrameMalformed
from stagemesh.tensor import DType, Tensor, check_tensor

_TO_MLX: dict[DType, mx.Dtype] = {
    DType.F32: mx.float32,
    DType.F16: mx.float16,
    DType.BF16: mx.bfloat16,
    DType.I32: mx.int32,
    DType.U32: mx.uint32,
    DType.I64: mx.int64,
    DType.U8: mx.uint8,
    DType.I8: mx.int8,
    DType.I16: mx.int16,
    DType.U16: mx.uint16,
}
_FROM_MLX = {kind: dtype for dtype, kind in _TO_MLX.items()}
_CARRIER: dict[int, type[np.generic]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.int64}
"""Integer type that carries an element of so many bytes without interpreting it."""

Floats = npt.NDArray[np.float32]


def wire_dtype(dtype: mx.Dtype) -> DType:
    """The frame's name for an mlx dtype. Raises FrameMalformed for one that has none (complex,
    bool)."""
    try:
        return _FROM_MLX[dtype]
    except KeyError:
        raise FrameMalformed("dtype cannot travel in a frame", dtype=dtype) from None


def to_tensor(array: mx.array) -> Tensor:
    """``array`` (any shape of rank 1 to 4), evaluated and copied once into ``bytes``."""
    return Tensor(wire_dtype(array.dtype), tuple(array.shape), to_bytes(array))


def to_bytes(array: mx.array) -> bytes:
    """The array's elements, little-endian and row-major. Evaluates it."""
    flat = mx.contiguous(array).view(mx.uint8)
    mx.eval(flat)
    return bytes(memoryview(flat))  # type: ignore[arg-type]


def to_array(tensor: Tensor) -> mx.array:
    """The mlx array a tensor describes. Raises FrameMalformed if dtype, shape and length
    disagree."""
    check_tensor(tensor)
    kind = _TO_MLX[tensor.dtype]
    if kind == mx.float32:
        return mx.array(np.frombuffer(tensor.payload, np.float32).reshape(tensor.shape))
    carrier = np.frombuffer(tensor.payload, _CARRIER[tensor.dtype.itemsize])
    return mx.array(carrier).view(kind).reshape(tensor.shape)


def float_view(tensor: Tensor) -> Floats:
    """The tensor's values as float32, for checks: a view for f32, a widened copy for f16 and bf16.

    Raises FrameMalformed for an integer tensor.
    """
    if tensor.dtype is DType.F32:
        values = np.frombuffer(tensor.payload, np.float32)
    elif tensor.dtype is DType.F16:
        values = np.frombuffer(tensor.payload, np.float16).astype(np.float32)
    elif tensor.dtype is DType.BF16:
        halves = np.frombuffer(tensor.payload, np.uint16).astype(np.uint32)
        values = (halves << np.uint32(16)).view(np.float32)
    else:
        raise FrameMalformed("not a floating-point tensor", dtype=tensor.dtype.name)
    return values.reshape(tensor.shape)


def to_floats(array: mx.array) -> Floats:
    """The array's values as a float32 numpy array on the host; a view when it is float32
    already."""
    wide: Any = array if array.dtype == mx.float32 else array.astype(mx.float32)
    mx.eval(wide)
    return np.asarray(memoryview(wide))
