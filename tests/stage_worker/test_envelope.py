"""The numeric envelope refuses what no honest activation looks like, and nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stage_worker.envelope import WIDENING, Band, Envelope, measure
from stagemesh.frame import RowStatus


def activation(tokens: int = 12, size: float = 1.0, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((tokens, 64)) * size
    return values.astype(np.float32)


@pytest.fixture
def envelope() -> Envelope:
    learnt = Envelope()
    for seed in range(4):
        learnt.learn(activation(seed=seed))
    return learnt


def test_sizes_are_the_same_for_one_token_and_for_many() -> None:
    values = activation(5)
    each = [measure(values[index : index + 1]) for index in range(5)]
    together = measure(values)
    assert together.rms_low == pytest.approx(min(band.rms_low for band in each), rel=1e-5)
    assert together.rms_high == pytest.approx(max(band.rms_high for band in each), rel=1e-5)
    assert together.peak == max(band.peak for band in each)


def test_honest_activations_pass(envelope: Envelope) -> None:
    for seed in range(100, 400):
        for tokens in (1, 7):
            for size in (0.3, 1.0, 4.0):
                assert envelope.check(activation(tokens, size, seed)) == (RowStatus.OK, "")


@pytest.mark.parametrize("size", [1e-3, 100.0, 1e10])
@pytest.mark.parametrize("tokens", [1, 4])
def test_outsized_and_vanishing_activations_are_refused(
    size: float, tokens: int, envelope: Envelope
) -> None:
    status, detail = envelope.check(activation(tokens, size))
    assert status is RowStatus.OUT_OF_ENVELOPE
    assert "calibrated" in detail


def test_one_outsized_token_among_good_ones_is_refused(envelope: Envelope) -> None:
    values = activation(8)
    values[5] *= 1e-3
    assert envelope.check(values)[0] is RowStatus.OUT_OF_ENVELOPE


def test_one_outsized_element_is_refused_even_if_the_mean_square_hides_it() -> None:
    envelope = Envelope()
    envelope.set_band(Band(1.0, 1.0, 1.5), 4096)
    values = np.ones((1, 4096), np.float32)
    values[0, 77] = 1.5 * WIDENING * 2
    status, detail = envelope.check(values)
    assert status is RowStatus.OUT_OF_ENVELOPE
    assert "largest element" in detail


def test_a_flipped_top_exponent_bit_is_refused_wherever_it_strikes(envelope: Envelope) -> None:
    small = np.flatnonzero(np.abs(activation(1, seed=9)[0]) < 2.0)
    assert (
        small.size > 50
    )  # of a larger element the same flip makes nearly zero, which is no outlier
    for index in small:
        values = activation(1, seed=9)
        values.view(np.uint32)[0, index] ^= 1 << 30
        assert envelope.check(values)[0] is not RowStatus.OK


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.filterwarnings("error")
def test_nan_infinity_and_overflow_are_non_finite_before_and_after_learning(
    bad: float, tokens: int, envelope: Envelope
) -> None:
    values = activation(tokens)
    values[-1, 3] = bad
    assert Envelope().check(values)[0] is RowStatus.NON_FINITE
    assert envelope.check(values)[0] is RowStatus.NON_FINITE
    before = envelope.band
    envelope.learn(values)
    assert envelope.band == before


def test_before_learning_any_finite_size_passes() -> None:
    assert Envelope().check(activation(3, 1e6)) == (RowStatus.OK, "")


@given(st.floats(-3, 4), st.integers(0, 63), st.floats(-3, 6), st.integers(0, 2**16))
def test_one_token_is_judged_alone_as_it_is_among_others(
    size: float, place: int, element: float, seed: int
) -> None:
    """The short way of one token must refuse what the long way of many refuses, and nothing
    else."""
    envelope = Envelope()
    envelope.learn(activation(seed=1))
    line = activation(1, 10.0**size, seed)
    line[0, place] = 10.0**element
    status, detail = envelope.check(line)
    several, told = envelope.check(np.vstack([line, line]))
    band = envelope.band
    assert band is not None
    seen = measure(line)
    near = [
        abs(math.log(value / limit)) < 1e-3
        for value, limit in (
            (seen.rms_high, band.rms_high * WIDENING),
            (seen.rms_low, band.rms_low / WIDENING),
            (seen.peak, band.peak * WIDENING),
        )
    ]
    assert any(near) or (status, detail.split(" ")[0]) == (several, told.split(" ")[0])
