"""Arrays cross to bytes and back without a bit changed."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from stage_worker.tensors import float_view, to_array, to_bytes, to_floats, to_tensor, wire_dtype
from stagemesh.errors import FrameMalformed
from stagemesh.tensor import DType, Tensor

TRAVELLING = [
    (mx.float32, DType.F32),
    (mx.float16, DType.F16),
    (mx.bfloat16, DType.BF16),
    (mx.int32, DType.I32),
    (mx.uint32, DType.U32),
    (mx.int64, DType.I64),
    (mx.uint8, DType.U8),
    (mx.int8, DType.I8),
    (mx.int16, DType.I16),
    (mx.uint16, DType.U16),
]


@pytest.mark.parametrize(("dtype", "kind"), TRAVELLING)
def test_every_dtype_survives_the_round_trip(dtype: mx.Dtype, kind: DType) -> None:
    array = (mx.random.normal((2, 3, 5), key=mx.random.key(1)) * 50).astype(dtype)
    tensor = to_tensor(array)
    assert (tensor.dtype, tensor.shape) == (kind, (2, 3, 5))
    back = to_array(tensor)
    assert back.dtype == dtype
    assert mx.array_equal(back, array).item()
    assert to_bytes(back) == tensor.payload


def test_every_bfloat16_pattern_survives_even_nan_payloads() -> None:
    patterns = np.arange(65536, dtype=np.uint16)
    tensor = Tensor(DType.BF16, (256, 256), patterns.tobytes())
    assert to_bytes(to_array(tensor)) == tensor.payload


def test_transposed_and_sliced_arrays_travel_in_row_order() -> None:
    array = mx.arange(24, dtype=mx.float32).reshape(4, 6)
    for view in (array.T, array[1:3, ::2], array[:, 5:]):
        expected = np.array(view.tolist(), np.float32)
        assert to_tensor(view).payload == expected.tobytes()


def test_a_payload_may_be_a_memoryview() -> None:
    payload = memoryview(b"xxxx" + np.float32([1.5, 2.5]).tobytes())[4:]
    assert to_array(Tensor(DType.F32, (1, 2), payload)).tolist() == [[1.5, 2.5]]


def test_a_dtype_without_a_name_on_the_wire_is_refused() -> None:
    for dtype in (mx.bool_, mx.complex64):
        with pytest.raises(FrameMalformed):
            wire_dtype(dtype)


def test_a_payload_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(FrameMalformed):
        to_array(Tensor(DType.F32, (2, 2), bytes(15)))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_float_views_widen_exactly(dtype: mx.Dtype) -> None:
    array = mx.random.normal((3, 4), key=mx.random.key(2)).astype(dtype)
    expected = np.array(array.astype(mx.float32).tolist(), np.float32)
    view = float_view(to_tensor(array))
    assert np.array_equal(view, expected)
    assert np.array_equal(to_floats(array), expected)


def test_integer_tensors_have_no_float_view() -> None:
    with pytest.raises(FrameMalformed):
        float_view(to_tensor(mx.arange(4)))
