"""Sampling parameters are checked where they enter, and packed without ambiguity."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagemesh.errors import InvalidRequest
from stagemesh.sampling import (
    LOGIT_BIAS_ABS_MAX,
    LOGIT_BIAS_MAX,
    LOGPROBS_MAX,
    PENALTY_CONTEXT_TOKENS_MAX,
    REPETITION_PENALTY_MIN,
    TOP_P_MIN,
    RowOpening,
    SamplingSpec,
)

VOCAB = 1000
CHAIN = bytes(range(16))


@pytest.mark.parametrize(
    "spec",
    [
        SamplingSpec(),
        SamplingSpec(temperature=100.0, top_p=TOP_P_MIN, min_p=1.0, top_k=2**31 - 1),
        SamplingSpec(repetition_penalty=REPETITION_PENALTY_MIN, repetition_context=0),
        SamplingSpec(frequency_penalty=-2.0, presence_penalty=2.0, seed=2**64 - 1),
        SamplingSpec(logprobs=LOGPROBS_MAX, logit_bias=((0, -LOGIT_BIAS_ABS_MAX), (999, 1.0))),
    ],
)
def test_parameters_at_their_limits_are_accepted_and_can_be_packed(spec):
    spec.check(vocab_size=VOCAB)
    assert RowOpening(spec, 3, CHAIN, 64).pack()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1e-46),  # would travel as 0
        ("top_p", 1.1),
        ("min_p", -1.0),
        ("min_p", math.nan),
        ("top_k", -1),
        ("top_k", 2**31),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-46),  # would travel as 0 and divide by it
        ("repetition_penalty", math.inf),
        ("repetition_context", PENALTY_CONTEXT_TOKENS_MAX + 1),
        ("frequency_penalty", 2.5),
        ("presence_penalty", math.nan),
        ("seed", -1),
        ("seed", 2**64),
        ("logprobs", LOGPROBS_MAX + 1),
        ("logit_bias", ((0, 0.0),) * (LOGIT_BIAS_MAX + 1)),
        ("logit_bias", ((VOCAB, 0.0),)),
        ("logit_bias", ((-1, 0.0),)),
        ("logit_bias", ((0, math.nan),)),
        ("logit_bias", ((0, math.inf),)),
        ("logit_bias", ((0, 1e39),)),  # finite, but does not fit an f32
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(InvalidRequest) as caught:
        SamplingSpec(**{field: value}).check(vocab_size=VOCAB)
    assert caught.value.metadata["field"] == field


def test_an_opening_needs_a_whole_chain_digest():
    with pytest.raises(InvalidRequest):
        RowOpening(SamplingSpec(), 3, CHAIN[:15], 64).pack()


def test_any_alteration_of_an_opening_changes_its_packed_bytes(altered):
    spec = SamplingSpec(temperature=0.5, logit_bias=((3, -1.5), (4, 2.0)), seed=9, logprobs=2)
    opening = RowOpening(spec, 3, CHAIN, 64)
    compared = 0
    for path, other in altered(opening):
        try:
            packed = other.pack()
        except (struct.error, ValueError, InvalidRequest):
            continue
        compared += 1
        assert packed != opening.pack(), path
    assert compared > 600


FLOATS = st.floats(width=32)
SPECS = st.builds(
    SamplingSpec,
    temperature=st.floats(0, 100),
    top_p=st.floats(TOP_P_MIN, 1.0),
    repetition_penalty=st.floats(REPETITION_PENALTY_MIN, 100.0),
    seed=st.integers(0, 2**64 - 1),
    logit_bias=st.lists(
        st.tuples(st.integers(0, VOCAB - 1), st.floats(-LOGIT_BIAS_ABS_MAX, LOGIT_BIAS_ABS_MAX)),
        max_size=5,
    ).map(tuple),
)


@given(SPECS)
def test_whatever_passes_the_check_can_be_packed_and_stays_in_range_as_f32(spec):
    spec.check(vocab_size=VOCAB)
    packed = RowOpening(spec, 1, CHAIN, 1).pack()
    temperature, top_p, _, penalty = struct.unpack_from("<ffff", packed)
    assert (temperature == 0.0) <= (spec.temperature < 1e-44)
    assert top_p > 0.0
    assert penalty > 0.0
