"""The hop that the support sweep sends every boundary through."""

from __future__ import annotations

import mlx.core as mx
import pytest

from services.hop_roundtrip import DOTTED_NAME, through_hop
from stage_worker.support import check_type, named_roundtrip, run_support
from stagemesh.errors import FrameMalformed, InvalidConfiguration


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_an_activation_comes_back_bit_for_bit(dtype: mx.Dtype) -> None:
    sent = mx.random.normal((1, 7, 24), key=mx.random.key(1)).astype(dtype)
    back = through_hop(sent)
    assert back.dtype == dtype
    assert bool(mx.array_equal(sent, back).item())


def test_one_too_large_for_a_single_frame_is_refused() -> None:
    with pytest.raises(FrameMalformed):
        through_hop(mx.zeros((1, 1024, 512)))


def test_a_type_is_exact_over_the_real_codec() -> None:
    assert check_type("llama", through_hop).verdict == "exact"


def test_the_sweeps_children_really_use_the_hop_they_are_given() -> None:
    assert named_roundtrip(DOTTED_NAME) is through_hop
    assert run_support(["llama"], roundtrip=DOTTED_NAME).ok
    bent = run_support(["llama"], roundtrip="tests.faults.planted:bend")
    assert [one.model_type for one in bent.of("wrong")] == ["llama"]


@pytest.mark.parametrize("name", ["services.nowhere:f", "services.codec:nothing", ""])
def test_a_hop_that_does_not_exist_is_a_clear_error(name: str) -> None:
    with pytest.raises(InvalidConfiguration):
        named_roundtrip(name)
