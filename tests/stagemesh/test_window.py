"""InflightWindow: bounded by frames and by bytes, freed cumulatively, loud when misused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagemesh.window import InflightWindow


def test_a_window_is_full_at_its_number_of_frames():
    window = InflightWindow(frames_max=2, bytes_max=1000)
    window.add(1, 10)
    assert not window.full
    window.add(2, 10)
    assert window.full
    assert (window.frames, window.size) == (2, 20)


def test_a_window_is_full_at_its_bytes():
    window = InflightWindow(frames_max=10, bytes_max=100)
    window.add(1, 60)
    assert window.fits(40)
    assert not window.fits(41)


def test_an_empty_window_takes_one_frame_of_any_size():
    window = InflightWindow(frames_max=4, bytes_max=100)
    assert window.fits(10**9)
    window.add(1, 10**9)
    assert window.full
    assert not window.fits(1)


def test_freeing_is_cumulative_and_reports_how_many():
    window = InflightWindow(frames_max=8, bytes_max=1000)
    for step in range(1, 6):
        window.add(step, step)
    assert window.free_through(3) == 3
    assert window.free_through(3) == 0
    assert (window.frames, window.size) == (2, 9)


def test_a_smaller_window_takes_nothing_until_it_has_drained():
    window = InflightWindow(frames_max=4, bytes_max=1000)
    for step in (1, 2, 3):
        window.add(step, 10)
    window.resize(frames_max=2, bytes_max=1000)
    assert window.full
    window.free_through(2)
    assert not window.full


@pytest.mark.parametrize(
    ("step", "size"),
    [(2, 10), (1, 10), (4, -1), (4, 1000)],
    ids=["same", "older", "negative", "big"],
)
def test_misuse_raises(step, size):
    window = InflightWindow(frames_max=4, bytes_max=100)
    window.add(2, 50)
    with pytest.raises(ValueError, match=f"step {step}"):
        window.add(step, size)


@pytest.mark.parametrize(("frames", "size"), [(0, 1), (1, 0), (-1, 5)])
def test_a_window_that_admits_nothing_is_refused(frames, size):
    with pytest.raises(ValueError, match="admits nothing"):
        InflightWindow(frames_max=frames, bytes_max=size)


@given(
    st.integers(1, 6),
    st.integers(1, 300),
    st.lists(st.tuples(st.booleans(), st.integers(0, 120)), max_size=60),
)
def test_bounds_hold_whatever_happens(frames_max, bytes_max, moves):
    window = InflightWindow(frames_max=frames_max, bytes_max=bytes_max)
    step, inflight = 0, []
    for add, number in moves:
        if add and window.fits(number):
            step += 1
            window.add(step, number)
            inflight.append((step, number))
        elif not add:
            through = step - number % 4
            freed = window.free_through(through)
            gone = [entry for entry in inflight if entry[0] <= through]
            inflight = inflight[len(gone) :]
            assert freed == len(gone)
        assert window.frames == len(inflight) <= frames_max
        assert window.size == sum(size for _, size in inflight)
        assert window.size <= bytes_max or window.frames == 1
