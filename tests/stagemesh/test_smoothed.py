"""Durations are smoothed as RFC 6298 says."""

import pytest

from stagemesh.smoothed import Smoothed


def test_the_mean_and_the_deviation_follow_rfc_6298():
    seen = Smoothed()
    assert (seen.samples, seen.bound_s(4.0)) == (0, 0.0)
    seen.add(1.0)
    assert (seen.mean_s, seen.deviation_s) == (1.0, 0.5)
    seen.add(2.0)
    assert seen.mean_s == pytest.approx(1.125)
    assert seen.deviation_s == pytest.approx(0.625)
    assert seen.bound_s(4.0) == pytest.approx(1.125 + 4 * 0.625)
    assert seen.samples == 2


def test_what_is_regular_is_bounded_closely_and_an_exception_widens_the_bound():
    seen = Smoothed()
    for _ in range(50):
        seen.add(0.05)
    assert 0.05 <= seen.bound_s(2.0) < 0.06
    seen.add(0.5)
    assert seen.bound_s(2.0) > 0.1
