"""Is an activation free of NaN and infinity? Decided on the bits, so that bfloat16 needs no
conversion.

An IEEE 754 number is NaN or infinite exactly when all its exponent bits are set. Most of them are
in its highest byte; where no element has a highest byte in which they all are, nothing else has to
be looked at. Searching bytes needs nothing of numpy, which a decode step would find in no cache.
Otherwise the payload is viewed as unsigned integers, without copying it, and masked.
"""

from __future__ import annotations

import numpy as np

from stagemesh.frame import RowStatus, StepFrame
from stagemesh.tensor import DType

_EXPONENTS: dict[DType, tuple[str, int]] = {
    DType.F32: ("<u4", 0x7F800000),
    DType.F16: ("<u2", 0x7C00),
    DType.BF16: ("<u2", 0x7F80),
}


def _highest(dtype: DType, exponent: int) -> tuple[int, ...]:
    held = exponent >> 8 * (dtype.itemsize - 1)
    return tuple(byte for byte in range(256) if byte & held == held)


_HIGHEST = {dtype: _highest(dtype, exponent) for dtype, (_, exponent) in _EXPONENTS.items()}
"""Highest bytes, of either sign, in which every exponent bit that they hold is set."""


def rows_are_finite(frame: StepFrame) -> bool:
    """True unless a row that is still good holds NaN or infinity.

    The tensor is [tokens of all rows, hidden]; its dtype, shape and length must have been checked.
    """
    tensor = frame.tensor
    if tensor is None or tensor.dtype not in _EXPONENTS:
        return True
    size = tensor.dtype.itemsize
    highest = bytes(tensor.payload[size - 1 :: size])
    if not any(byte in highest for byte in _HIGHEST[tensor.dtype]):
        return True
    carrier, exponent = _EXPONENTS[tensor.dtype]
    exponents = np.frombuffer(tensor.payload, carrier) & exponent
    if exponents.max(initial=0) != exponent:
        return True
    lines = exponents.reshape(tensor.shape[0], -1).max(axis=1) == exponent
    first = 0
    for row in frame.rows:
        if row.status is RowStatus.OK and lines[first : first + row.token_count].any():
            return False
        first += row.token_count
    return first == len(lines)
