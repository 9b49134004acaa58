"""A tensor is believed only if dtype, shape and length agree."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagemesh.errors import FrameMalformed, FrameTooLarge
from stagemesh.tensor import PAYLOAD_BYTES_MAX, DType, Tensor, check_tensor

DTYPES = [dtype for dtype in DType if dtype is not DType.NONE]


@given(st.sampled_from(DTYPES), st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple))
def test_a_tensor_whose_length_matches_its_shape_passes_and_any_other_length_does_not(dtype, shape):
    size = math.prod(shape) * dtype.itemsize
    check_tensor(Tensor(dtype, shape, bytes(size)))
    check_tensor(Tensor(dtype, shape, memoryview(bytes(size))))
    for wrong in (size - 1, size + 1, 0):
        with pytest.raises(FrameMalformed, match="length"):
            check_tensor(Tensor(dtype, shape, bytes(wrong)))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (-1, -2), (1, 1, 1, 1, 1)])
def test_shapes_out_of_range_are_malformed(shape):
    with pytest.raises(FrameMalformed, match="shape"):
        check_tensor(Tensor(DType.F32, shape, bytes(8)))


def test_a_tensor_needs_a_dtype():
    with pytest.raises(FrameMalformed, match="dtype"):
        check_tensor(Tensor(DType.NONE, (1,), b""))


def test_a_shape_over_the_limit_is_refused_before_its_length_is_looked_at():
    with pytest.raises(FrameTooLarge):
        check_tensor(Tensor(DType.F32, (PAYLOAD_BYTES_MAX,), b""))
    with pytest.raises(FrameTooLarge):
        check_tensor(Tensor(DType.U8, (2**31, 2**31, 2**31), b""))


def test_element_sizes_are_those_of_their_formats():
    sizes = {dtype.name: dtype.itemsize for dtype in DType}
    assert sizes["BF16"] == sizes["F16"] == 2
    assert sizes["F32"] == sizes["I32"] == sizes["U32"] == 4
    assert (sizes["I64"], sizes["U8"], sizes["NONE"]) == (8, 1, 0)


def test_a_tensor_prints_as_dtype_shape_and_size():
    assert str(Tensor(DType.BF16, (1, 1, 576), bytes(1152))) == "bf16[1,1,576] 1152 B"
